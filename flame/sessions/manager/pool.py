"""The life of executors: started for a session, bound to it, unbound, kept for a while, let go, or lost.

Each step changes what the server knows of an executor, and tells it so where it has a connection. All that matters is said again
when there is one, so an order that got lost does no harm.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

import msgspec

from flame.errors import FlameError, Forbidden
from flame.sessions import wire
from flame.sessions.lifecycle import MOST_DEATHS, MOST_FAILED_BINDS
from flame.sessions.link import Link
from flame.sessions.manager.executors import Executor
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.live import Live, failure
from flame.sessions.manager.serving import Serving
from flame.sessions.manager.workers import Workers
from flame.spec.sessions import Application, ExecutorRecord, ExecutorState, WorkFailure

log = logging.getLogger("flame.sessions")

#: Seconds that an executor may take to appear.
DEPLOY = 120.0
#: Seconds that an executor may be without a connection. Its end is mostly noticed by its runner, at once.
REUNION = 15.0
#: Seconds that an executor gets to end once it was let go.
PARTING = 5.0


class Pool:
    """All executors.

    :param workers: how executors are started and ended.
    :param wake: called when somebody else may get an executor, or needs another.
    :ivar serving: gives them tasks.
    """

    def __init__(self, floor: Floor, workers: Workers, wake: Callable[[], None]) -> None:
        self._floor = floor
        self._workers = workers
        self._wake = wake
        self.serving = Serving(floor.committer, self.lose)

    # ---------------------------------------------------------------------------------------------- coming

    def start(self, live: Live, compute: str) -> None:
        """Have an executor started for a session."""
        need, app = live.need(), live.application
        record = ExecutorRecord(
            id=secrets.token_hex(8),
            compute=compute,
            key=live.key,
            app=live.app,
            slots=need.slots,
            resources=app.resources,
            delay_release=live.delay_release,
            created_at=time.time(),
        )
        executor = Executor(record.id, record, live.app)
        executor.live = live
        live.executors[executor.id] = executor
        self._floor.executors[executor.id] = executor
        self._floor.ground.hold(executor)
        self.awaited(executor, waits=False)
        self._floor.context.background.spawn(self._begin(executor, live.application))

    def awaited(self, executor: Executor, *, waits: bool) -> None:
        """An executor must appear in time; while its compute has it wait, for how long is the compute's affair.

        :param waits: for room, for its image, for what is being installed.
        """
        if executor.state is not ExecutorState.STARTING or executor.link is not None or executor.releasing:
            return
        if waits:
            executor.never("reunion")
        else:
            executor.after("reunion", DEPLOY, lambda: self._missed(executor))

    def _missed(self, executor: Executor) -> None:
        """An executor was started and has never said a word."""
        self.failed_to_start(executor, f"An executor did not appear within {DEPLOY:g} s.")
        self.lose(executor, "It did not appear.")

    async def _begin(self, executor: Executor, app: Application) -> None:
        try:
            await self._workers.start(executor, app)
        except FlameError as error:
            self.failed_to_start(executor, f"An executor could not be started: {error.message}")
            self.lose(executor, error.message)

    def failed_to_start(self, executor: Executor, why: str, *, died: bool = False) -> None:
        """Something is wrong with a session's executors; several times in a row, and it gets none any more."""
        live = executor.live
        if live is None:
            return
        live.failed += not died
        live.died += died
        log.warning("session %s: %s", live.id, why)
        times = live.died if died else live.failed
        if times >= (MOST_DEATHS if died else MOST_FAILED_BINDS) and live.reason is None:
            live.reason = f"{why} (That was {times} times in a row, so the session gets no executors any more.)"
            live.saved.record.reason = live.reason
            self._floor.context.background.spawn(self._floor.sessions.put(live.saved, live.saved.record))
            self._floor.committer.ended(live, live.book.fail_all(failure("SessionFailed", live.reason)))
            live.tell()

    def await_return(self, executor: Executor, why: str) -> None:
        """An executor has no connection: it is lost unless it has one soon."""
        executor.after("reunion", REUNION, lambda: self.lose(executor, why))

    # ---------------------------------------------------------------------------------------------- serving

    def bind(self, executor: Executor, live: Live) -> None:
        """Give an executor to a session."""
        executor.live = live
        executor.leaving = False
        live.executors[executor.id] = executor
        executor.never("idle")
        executor.become(ExecutorState.BINDING)
        executor.send(wire.BIND, live.id, live.common)
        self.after_work(executor)

    def bind_failed(self, executor: Executor, session: str, payload: bytes) -> None:
        """An executor could not be bound."""
        live = executor.live
        if live is None or live.id != session:
            return
        self._floor.committer.ended(live, live.book.give_back(executor.id))
        why = msgspec.msgpack.decode(payload, type=WorkFailure)
        self.failed_to_start(executor, f"on_session_enter failed: {why.type}: {why.message}")
        self.lose(executor, "It could not be bound.")

    def unbind(self, executor: Executor) -> None:
        """Take an executor away from its session, at its task's end."""
        if executor.leaving:
            return
        executor.leaving = True
        executor.never("idle")
        if executor.state is ExecutorState.STARTING:
            self.lose(executor, "It is not needed any more.")
            return
        executor.become(ExecutorState.UNBINDING)
        executor.send(wire.REVOKE, None)
        executor.send(wire.UNBIND)

    def unbound(self, executor: Executor) -> None:
        """An executor has left its session."""
        self.drop(executor)
        self.part(executor)
        if executor.releasing or executor.state is ExecutorState.IDLE:
            return
        if executor.state is not ExecutorState.UNBINDING:  # an order that was given before its connection broke
            executor.become(ExecutorState.UNBINDING)
        executor.become(ExecutorState.IDLE)
        executor.leaving = False
        self.idle(executor)
        self._wake()

    def drop(self, executor: Executor) -> None:
        """An executor has let go of what it had not begun, as its connection was lost."""
        live = executor.live
        if live is not None:
            self._floor.committer.ended(live, live.book.give_back(executor.id))

    def part(self, executor: Executor) -> None:
        """An executor and its session have nothing to do with each other any more."""
        live, executor.live = executor.live, None
        if live is not None:
            live.executors.pop(executor.id, None)
            live.book.forget(executor.id)

    # ---------------------------------------------------------------------------------------------- resting

    def after_work(self, executor: Executor) -> None:
        """An executor may have nothing to do: it is kept for a while."""
        live = executor.live
        if live is None or executor.leaving or live.book.given(executor.id) or live.book.waiting:
            return
        if "idle" not in executor.timers:
            executor.after("idle", live.delay_release, lambda: self.let_go(executor))

    def idle(self, executor: Executor) -> None:
        """An executor serves nobody."""
        executor.after("idle", executor.record.delay_release, lambda: self.let_go(executor))

    def let_go(self, executor: Executor) -> None:
        """Nobody has asked anything of an executor for long."""
        live = executor.live
        if live is None:
            self.release(executor)
            return
        if live.book.given(executor.id) or live.book.waiting or executor.leaving:
            return
        if live.held - live.form.batch_size < live.form.min_instances:
            return
        self.unbind(executor)
        self.release(executor)

    # ---------------------------------------------------------------------------------------------- going

    def release(self, executor: Executor) -> None:
        """Let an executor go, at its own pace."""
        if executor.releasing:
            return
        executor.leaving = executor.releasing = True
        executor.silence()
        executor.send(wire.RELEASE)
        self._floor.context.background.spawn(self._finish(executor, PARTING))

    def lose(self, executor: Executor, why: str) -> None:
        """An executor is gone, or as good as gone: what it had goes back, and nothing of it is heard any more."""
        if executor.lost:
            return
        executor.lost = executor.leaving = True
        executor.silence()
        link, executor.link = executor.link, None
        if link is not None:
            link.close()
        self._shut_out(executor)
        live = executor.live
        if live is not None:
            first = next(iter(live.book.given(executor.id).values()), None)
            ends = live.book.lose(
                executor.id, failure("ExecutorLost", f"Its executors were lost again and again. {why}")
            )
            if first is not None and first.id in live.book.live:
                live.lost(first)
            self.part(executor)
            self._floor.committer.ended(live, ends)
            self.serving.serve(live)
        if not executor.releasing:
            executor.releasing = True
            self._floor.context.background.spawn(self._finish(executor, 0.0))
        self._wake()

    def disconnected(self, executor: Executor, link: Link) -> None:
        """A connection of an executor is over."""
        self._floor.links.discard(link)
        if executor.link is not link:
            return
        executor.link = None
        executor.gone.set()
        executor.never("stall")
        if self._floor.open and not executor.releasing:
            self.await_return(executor, "Its connection was lost.")

    async def _finish(self, executor: Executor, grace: float) -> None:
        await self._workers.end(executor, grace)
        self._shut_out(executor)
        await self._forget(executor)

    def _shut_out(self, executor: Executor) -> None:
        """Whatever an executor's key has opened is closed."""
        over = Forbidden(f"Executor {executor.id} is not known any more.")
        self._floor.context.standing.end(("task", executor.id, 1), over)

    async def _forget(self, executor: Executor) -> None:
        """Nothing is left of an executor."""
        executor.state = ExecutorState.RELEASED
        self._floor.executors.pop(executor.id, None)
        self.part(executor)
        executor.silence()
        self._floor.ground.give(executor)
        await self._floor.records.delete(executor.id)
        self._wake()
