"""Where executors come in, and what they say: of themselves, and of their tasks."""

from __future__ import annotations

import asyncio
from typing import Any

from flame.errors import Forbidden, Unauthorized
from flame.sessions import wire
from flame.sessions.link import Link
from flame.sessions.manager.executors import Executor
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.looking import Looking
from flame.sessions.manager.pool import Pool
from flame.spec.sessions import ExecutorState


class Door:
    """Lets executors in, and hears them."""

    def __init__(self, floor: Floor, pool: Pool, looking: Looking) -> None:
        self._floor = floor
        self._pool = pool
        self._serving = pool.serving
        self._looking = looking

    def connected(self, id: str, attempt: int, key: str | None) -> Executor:
        """An executor is at the door.

        :raises flame.errors.Unauthorized: it has no key, or not its own.
        :raises flame.errors.Forbidden: it was given up.
        """
        if key is None or not self._floor.context.keys.opens(key, id, attempt):
            raise Unauthorized("This is for executors only: it needs the executor's key.")
        executor = self._floor.executors.get(id)
        if executor is None or executor.releasing or attempt != 1:
            raise Forbidden(f"Executor {id} is not known any more.")
        return executor

    def session_of(self, id: str, attempt: int, key: str | None) -> str:
        """The session that an executor serves.

        :raises flame.errors.Forbidden: it serves none, or was given up.
        """
        live = self.connected(id, attempt, key).live
        if live is None:
            raise Forbidden(f"Executor {id} serves no session.")
        return live.id

    def attach(self, executor: Executor) -> Link:
        """The connection for an executor that was let in."""
        link = Link(
            lambda message: self._hear(executor, link, message), lambda: self._pool.disconnected(executor, link)
        )
        self._floor.links.add(link)
        return link

    def _hear(self, executor: Executor, link: Link, message: list[Any]) -> None:
        kind = message[0]
        if kind == wire.HELLO:
            self._greet(executor, link, *message[1:])
            return
        if link is not executor.link:
            return  # it has another connection since
        executor.heard = asyncio.get_running_loop().time()
        live = executor.live
        if kind == wire.RESULTS:
            self._results(executor, link, message[1], message[2], message[3])
        elif kind == wire.BOUND:
            if executor.state is ExecutorState.BINDING and live is not None and live.id == message[1]:
                executor.become(ExecutorState.BOUND)
                live.failed = live.died = 0
                self._serving.limit(executor)
                self._serving.serve(live)
                self._pool.after_work(executor)
        elif kind == wire.BIND_FAILED:
            self._pool.bind_failed(executor, message[1], message[2])
        elif kind == wire.REVOKED:
            if live is not None and live.id == message[1]:
                self._floor.committer.ended(live, live.book.give_back(executor.id, message[2]))
                executor.stalled = bool(live.book.given(executor.id))
                self._serving.serve(live)
                self._pool.after_work(executor)
        elif kind == wire.UNBOUND:
            self._pool.unbound(executor)
        else:
            raise ValueError(f"an executor says {kind}")

    def _greet(self, executor: Executor, link: Link, *said: Any) -> None:
        """An executor is there, for the first time or again.

        It says: which session it is bound to, and whether on_session_enter has returned; id and attempt of the task that it
        runs; those of tasks whose results may not have arrived, and come again; whether it has its application.
        """
        session, entered, running, done, loaded = said
        before, executor.link = executor.link, link
        if before is not None and before is not link:
            before.close()
        executor.never("reunion")
        executor.answered = 0
        executor.stalled = False
        if not loaded:
            live = executor.live or next(
                (one for one in self._floor.lives.values() if one.key == executor.record.key), None
            )
            if live is None or live.closing:  # the session that it was started for is gone
                self._pool.release(executor)
                return
            executor.live = live
            executor.send(wire.WELCOME, live.application.entry, live.application.arguments, live.files)
        if executor.live is not None:  # what it had not begun, it has let go of
            self._pool.drop(executor)
        if session is None:
            executor.state = ExecutorState.IDLE
            if executor.live is not None and not executor.live.closing:
                self._pool.bind(executor, executor.live)
            else:
                self._pool.part(executor)
                executor.leaving = False
                self._pool.idle(executor)
        else:
            self._reunite(executor, session, entered, running, done)
        self._looking.wake()

    def _reunite(
        self, executor: Executor, session: str, entered: bool, running: list[int] | None, done: list[list[int]]
    ) -> None:
        """An executor that is bound to a session is back."""
        live = self._floor.lives.get(session)
        if live is None or live.closing or (executor.live is not None and executor.live is not live):
            self._pool.part(executor)
            executor.state = ExecutorState.UNBINDING
            executor.leaving = True
            executor.send(wire.UNBIND)
            return
        executor.live = live
        live.executors[executor.id] = executor
        executor.leaving = False
        executor.state = ExecutorState.BOUND if entered else ExecutorState.BINDING
        for task, attempt in done:
            live.book.claim(executor.id, task, attempt)
        if running is not None and not live.book.claim(executor.id, *running):
            self._pool.lose(executor, "It ran a task that was given to another.")
            return
        self._serving.limit(executor)
        self._serving.serve(live)
        self._pool.after_work(executor)

    def _results(self, executor: Executor, link: Link, session: str, rows: list[list[Any]], seconds: float) -> None:
        def stored() -> None:
            if executor.link is link:
                executor.answered += 1

        live = executor.live
        if live is None or live.id != session:
            stored()
            return
        executor.never("expiry")
        executor.stalled = False
        answer, ends, name = live.book.answer, live.ends, executor.id
        for task, attempt, ok, payload in rows:
            end = answer(name, task, attempt, ok, payload)
            if end is not None:
                ends.append(end)
        live.timed(len(rows), seconds)
        self._floor.committer.touch(live, stored)
        self._serving.serve(live)
        self._pool.after_work(executor)
        self._looking.glance()
