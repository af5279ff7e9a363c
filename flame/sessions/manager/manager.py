"""The manager of elastic sessions: the shell around the scheduler and the lifecycles.

Events come from clients (:mod:`clients`), executors, runners and timers. Each changes the pure parts, is written by the
:class:`Committer`, and leads to orders for executors. The scheduler is asked when something has happened that may
change who should have which executor, at most every :data:`CALM` seconds while there is no room for everyone; a session's
tasks go to the executors that it has without asking anyone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterable, Iterable, Sequence
from typing import Any

import msgspec

from flame.controller.controller import Controller
from flame.controller.shelf import Saved, Shelf
from flame.errors import Conflict, FlameError, Forbidden, NotFound, RunnerError, SpecError, Unauthorized
from flame.runners.base import WorkerExit, WorkerInfo, WorkerSpec
from flame.sessions import wire
from flame.sessions.lifecycle import MOST_DEATHS, MOST_FAILED_BINDS, End, Options, check_close, check_same
from flame.sessions.link import Link
from flame.sessions.manager import journal
from flame.sessions.manager.apps import Apps, Sees
from flame.sessions.manager.committer import Committer
from flame.sessions.manager.executors import JOB, STALLED, Executor
from flame.sessions.manager.ground import Ground
from flame.sessions.manager.live import Live
from flame.sessions.manager.objects import Objects
from flame.sessions.scheduler import Bind, Release, Service, Start, Unbind, plan
from flame.spec.sessions import (
    Application,
    ExecutorRecord,
    ExecutorState,
    SessionForm,
    SessionRecord,
    SessionState,
    WorkFailure,
    WorkRecord,
    WorkState,
)

log = logging.getLogger("flame.sessions")

#: Seconds between two looks of the scheduler while sessions wait for each other.
CALM = 0.02
#: Seconds that an executor may take to appear.
DEPLOY = 120.0
#: Seconds that an executor may be without a connection. Its end is mostly noticed by its runner, at once.
REUNION = 15.0
#: Seconds between two looks at closed sessions.
RETIRING = 600.0
#: Seconds that an executor gets to end once it was let go.
PARTING = 5.0

_STATES = {wire.SUCCEED: WorkState.SUCCEED, wire.FAILED: WorkState.FAILED, wire.WAS_CANCELLED: WorkState.CANCELLED}


class Manager:
    """All sessions of a server. Made by :meth:`open`, let go of by :meth:`close`; the executors outlive it.

    :param controller: whose store, keys and computes it shares.
    """

    def __init__(self, controller: Controller) -> None:
        context = controller.context
        self._catalog = controller.catalog
        self.context = context
        self.apps = Apps(context)
        self.objects = Objects(context.store, context.place, context.options.largest_artifact)
        self._sessions: Shelf[SessionRecord] = Shelf(context.store, "sessions", SessionRecord)
        self._records: Shelf[ExecutorRecord] = Shelf(context.store, "executors", ExecutorRecord)
        self._ground = Ground(context.computes)
        context.computes.add_tenant(self)
        self._lives: dict[str, Live] = {}
        self._executors: dict[str, Executor] = {}
        self._links: set[Link] = set()
        self._committer = Committer(context.store, Live.changed)
        self._service = Service()
        self._opening = asyncio.Lock()
        self._order = 0
        self._looking: asyncio.Handle | None = None
        self._looked = 0.0
        self._contended = False
        self._open = False

    # -------------------------------------------------------------------------------------------- coming and going

    async def open(self) -> None:
        """Take up the sessions that are open, and the executors that are there."""
        for saved in await self._sessions.all({"state": SessionState.OPEN.value}):
            self._lives[saved.id] = await self._restore(saved)
        there = {info.task: (compute, info) for compute, info in self._ground.there()}
        for known in await self._records.all():
            executor = Executor(known.id, known.record, known.record.app)
            executor.saved = known
            _, info = there.pop(known.id, (None, None))
            if info is None and self._ground.reachable(known.record.compute):
                await self._records.delete(known.id)
                continue
            # On a compute that cannot be reached it may be there all the same: its connection will tell.
            executor.info = info
            executor.started.set()
            executor.state = ExecutorState.IDLE
            executor.leaving = True  # nobody counts on it before it is back
            self._executors[known.id] = executor
            self._ground.hold(executor)
            executor.after("reunion", REUNION, lambda one=executor: self._lose(one, "It did not come back."))  # type: ignore[misc]
        for compute, info in there.values():
            self.context.background.spawn(self._end_stranger(compute, info))
        self._open = True
        self.wake()

    async def _restore(self, saved: Saved[SessionRecord]) -> Live:
        past, after = journal.Past(), 0
        place = journal.name(saved.id)
        while records := await self.context.store.recall(place, after=after, limit=500):
            for number, data in records:
                past.add(number, data)
            after = records[-1][0]
        self._order += 1
        live = Live(saved, self._order)
        live.last, live.keeper = past.last, past.keeper
        live.members = past.members
        live.book.restore(past.next, past.works.values(), past.ended)
        await self._look_for_common(live)
        try:
            live.files = await self.apps.load(live.application.code)
        except FlameError as error:
            live.reason = f"Its code is not there any more: {error}"
        log.info("session %s goes on with %d tasks", live.id, len(live.book.live))
        return live

    async def close(self) -> None:
        """Let go. Executors go on, and look for the next process of the server."""
        self._open = False
        if self._looking is not None:
            self._looking.cancel()
        await self._committer.settled()
        for executor in self._executors.values():
            executor.silence()

    def disconnect(self) -> None:
        """Close the connections of executors and clients; they look for the next process of the server."""
        self._open = False
        for link in list(self._links):
            link.close()

    def join(self, link: Link) -> None:
        """A client's connection is there."""
        self._links.add(link)

    def part(self, link: Link) -> None:
        """A client's connection is over."""
        self._links.discard(link)

    async def stop_all(self) -> None:
        """End all executors: a private server takes them with it."""
        for name in list(self._lives):
            await self.close_session(name, force=True)
        self._open = False
        for executor in list(self._executors.values()):
            self._lose(executor, "The server ends.")
        await self.context.background.drain()

    # -------------------------------------------------------------------------------------------------- sessions

    async def open_session(self, form: SessionForm, *, project: str, owner: str, sees: Sees) -> Live:
        """Open a session, or give the one that is open under this id.

        :param sees: whether who asks may see a record.
        :raises flame.errors.Conflict: the id is that of a closed session, or of one that was opened with something else.
        :raises flame.errors.NotFound: there is no such application.
        """
        if form.id is None:
            return await self._open_new(form, project, owner, sees)
        async with self._opening:
            live = self._lives.get(form.id)
            if live is not None:
                if not sees(live.saved.record):
                    raise Conflict(f"There is a session {form.id!r} already; choose another id.")
                check_same(form, live.form, SessionState.OPEN)
                return live
            saved = await self._sessions.get(form.id)
            if saved is not None and not sees(saved.record):
                raise Conflict(f"There is a session {form.id!r} already; choose another id.")
            if saved is not None:
                check_same(form, saved.record.form, saved.record.state)
            return await self._open_new(form, project, owner, sees)

    async def _open_new(self, form: SessionForm, project: str, owner: str, sees: Sees) -> Live:
        application = await self.apps.resolve(form, sees)
        if form.max_instances is not None and form.max_instances < max(form.min_instances, form.batch_size):
            raise SpecError("is smaller than minInstances or batchSize, so nothing could ever run.", "maxInstances")
        files = await self.apps.load(application.code)
        record = SessionRecord(
            id=form.id or f"{int(time.time() * 1000):012x}{secrets.token_hex(6)}",
            state=SessionState.OPEN,
            form=form,
            application=application,
            code=application.code,
            created_at=time.time(),
            project=project,
            owner=owner,
        )
        saved = await self._sessions.insert(record.id, record)
        self._order += 1
        live = self._lives[saved.id] = Live(saved, self._order)
        live.files = files
        await self._look_for_common(live)
        if live.lacks:
            self.wake()
        return live

    async def _look_for_common(self, live: Live) -> None:
        digest = live.form.common_digest
        live.awaits = None if digest is None or await self.objects.has(live.id, digest) else digest

    async def put_object(self, id: str, digest: str, data: AsyncIterable[bytes]) -> None:
        """A session gets an object; it may be the common data that it waits for.

        :raises flame.errors.NotFound: there is no such session.
        :raises flame.errors.Conflict: it is closed.
        """
        live = self._lives.get(id)
        if live is None or live.closing:
            await self.session(id)
            raise Conflict(f"Session {id} is closed.")
        await self.objects.put(id, digest, data)
        if id not in self._lives:  # closed while the object was on its way
            await self.objects.drop(id)
        if live.awaits == digest:
            live.awaits = None
            self.wake()

    async def sessions(self, state: SessionState | None, after: str | None, limit: int) -> list[SessionRecord]:
        """Sessions in order of their ids."""
        where = {"state": state.value} if state is not None else None
        found = await self._sessions.find(where, after=after, limit=limit)
        return [self._lives[saved.id].view() if saved.id in self._lives else saved.record for saved in found]

    async def session(self, id: str) -> SessionRecord:
        """A session.

        :raises flame.errors.NotFound: there is none.
        """
        live = self._lives.get(id)
        if live is not None:
            return live.view()
        saved = await self._sessions.get(id)
        if saved is None:
            raise NotFound(f"There is no session {id!r}.")
        return saved.record

    def live(self, id: str) -> Live | None:
        """An open session."""
        return self._lives.get(id)

    async def tasks(self, id: str, after: int, limit: int, state: WorkState | None = None) -> list[WorkRecord]:
        """A session's tasks in order of their ids, from the journal: those without an end, and the newest that have one."""
        await self.session(id)
        live = self._lives.get(id)
        place, ends, total, seen = journal.name(id), dict[int, WorkRecord](), 0, 0
        while records := await self.context.store.recall(place, after=seen, limit=500):
            for _, data in records:
                begin, count = journal.begun_in(data)
                total = max(total, begin + count - 1)
                for number, attempt, how, payload in journal.ends_in(data):
                    if number > after:
                        ends[number] = _work(number, attempt, how, payload)
            seen = records[-1][0]
        running = (
            {next(iter(given)) for one in live.executors.values() if (given := live.book.given(one.id))}
            if live
            else set()
        )
        found: list[WorkRecord] = []
        for number in range(after + 1, total + 1):
            work = ends.get(number)
            if work is None:
                waiting = live.book.live.get(number) if live else None
                if waiting is None:  # so long ago that its record was removed
                    continue
                now = WorkState.RUNNING if number in running else WorkState.PENDING
                work = WorkRecord(id=number, state=now, attempt=waiting.attempt)
            if state is None or work.state is state:
                found.append(work)
                if len(found) == limit:
                    break
        return found

    async def close_session(self, id: str, *, force: bool = False) -> SessionRecord:
        """Close a session: what waits is cancelled. One that is closed stays so.

        :raises flame.errors.Conflict: a task runs, and ``force`` is not given.
        """
        live = self._lives.get(id)
        if live is None:
            return await self.session(id)
        check_close(live.counts, id, force=force)
        live.closing = True
        executors = list(live.executors.values())
        busy = [one for one in executors if live.book.given(one.id)]
        self._ended(live, live.book.close())
        for executor in busy:
            self._lose(executor, "Its session was closed by force.")
        for executor in executors:
            if executor not in busy:
                self._unbind(executor)
        done = asyncio.get_running_loop().create_future()
        self._committer.touch(live, lambda: done.set_result(None))
        await done
        record = msgspec.structs.replace(
            live.saved.record, state=SessionState.CLOSED, counts=live.counts, closed_at=time.time(), reason=live.reason
        )
        await self._sessions.put(live.saved, record)
        self._lives.pop(id, None)
        await self.objects.drop(id)
        live.tell()
        self.wake()
        return record

    async def delete_session(self, id: str) -> None:
        """Remove a closed session, with what is known of its tasks.

        :raises flame.errors.Conflict: it is open.
        """
        record = await self.session(id)
        if id in self._lives:
            raise Conflict(f"Session {id} is open; close it before you delete it.")
        await self.context.store.forget(journal.name(id))
        await self._sessions.delete(id)
        await self._release_code(record.code)

    async def delete_app(self, id: str) -> None:
        """Remove an application; sessions that are open go on."""
        record = await self.apps.get(id)
        await self.apps.delete(id)
        await self._release_code(record.code)

    async def _release_code(self, code: str | None) -> None:
        self.apps.forget(code)
        await self._catalog.release(code)

    async def retire(self, seconds: float) -> None:
        """Remove closed sessions when they are so old; looks again and again, for ever."""
        while True:
            try:
                await self.sweep(time.time() - seconds)
            except FlameError as error:
                log.error("closed sessions cannot be cleaned up: %s", error)
            await asyncio.sleep(RETIRING)

    async def sweep(self, before: float) -> list[str]:
        """Remove the sessions that were closed before a time; gives their ids."""
        removed = []
        for saved in await self._sessions.all({"state": SessionState.CLOSED.value}):
            if (saved.record.closed_at or 0.0) < before:
                await self.delete_session(saved.id)
                removed.append(saved.id)
        return removed

    def submit(
        self, live: Live, client: str, first: int, payloads: list[bytes], options: Options
    ) -> list[tuple[int, int, int]]:
        """Take up tasks of a client; gives the blocks of those that it had sent before.

        :raises flame.errors.Conflict: the session is closed.
        """
        if live.closing:
            raise Conflict(f"Session {live.id} is closed.")
        known = live.submit(client, first, payloads, options)
        if live.reason is not None:
            self._ended(live, live.book.fail_all(_failure("SessionFailed", live.reason)))
        self._committer.touch(live)
        self._serve(live)
        if live.lacks:
            self.wake()
        return known

    def cancel(self, live: Live, client: str, numbers: Sequence[int], *, force: bool = False) -> list[int]:
        """Cancel tasks by their client's numbers; gives those that are cancelled, or will be.

        A task that runs goes on, unless ``force``: then its executor is ended.
        """
        works = {work.id: work for work in live.works_of(client, numbers)}
        ends, held = live.book.cancel(works)
        taken = [end.work.number for end in ends]
        self._ended(live, ends)
        for name, ids in held.items():
            executor = self._executors[name]
            running = next(iter(live.book.given(name)), None)
            ahead = [one for one in ids if one != running]
            for one in ahead:
                works[one].cancelled = True
            if running in ids and force:
                works[running].cancelled = True
                taken.append(works[running].number)
                self._lose(executor, "Its task was cancelled.")
            elif ahead:
                executor.send(wire.REVOKE, ahead)
            taken += [works[one].number for one in ahead]
        return taken

    # ------------------------------------------------------------------------------------------------- executors

    def connected(self, id: str, attempt: int, key: str | None) -> Executor:
        """An executor is at the door.

        :raises flame.errors.Unauthorized: it has no key, or not its own.
        :raises flame.errors.Forbidden: it was given up.
        """
        if key is None or not self.context.keys.opens(key, id, attempt):
            raise Unauthorized("This is for executors only: it needs the executor's key.")
        executor = self._executors.get(id)
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
        link = Link(lambda message: self._hear(executor, link, message), lambda: self._disconnected(executor, link))
        self._links.add(link)
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
                self._limit(executor)
                self._serve(live)
        elif kind == wire.BIND_FAILED:
            self._bind_failed(executor, message[1], message[2])
        elif kind == wire.REVOKED:
            if live is not None and live.id == message[1]:
                self._ended(live, live.book.give_back(executor.id, message[2]))
                executor.stalled = bool(live.book.given(executor.id))
                self._serve(live)
                self._after_work(executor)
        elif kind == wire.UNBOUND:
            self._unbound(executor)
        else:
            raise ValueError(f"an executor says {kind}")

    def _greet(
        self,
        executor: Executor,
        link: Link,
        *said: Any,
    ) -> None:
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
            live = executor.live or next((one for one in self._lives.values() if one.key == executor.record.key), None)
            if live is None or live.closing:  # the session that it was started for is gone
                self._release(executor)
                return
            executor.live = live
            executor.send(wire.WELCOME, live.application.entry, live.application.arguments, live.files)
        if executor.live is not None:  # what it had not begun, it has let go of
            self._drop(executor)
        if session is None:
            executor.state = ExecutorState.IDLE
            if executor.live is not None and not executor.live.closing:
                self._bind(executor, executor.live)
            else:
                self._part(executor)
                executor.leaving = False
                self._idle(executor)
        else:
            self._reunite(executor, session, entered, running, done)
        self.wake()

    def _reunite(
        self, executor: Executor, session: str, entered: bool, running: list[int] | None, done: list[list[int]]
    ) -> None:
        """An executor that is bound to a session is back."""
        live = self._lives.get(session)
        if live is None or live.closing or (executor.live is not None and executor.live is not live):
            self._part(executor)
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
            self._lose(executor, "It ran a task that was given to another.")
            return
        self._limit(executor)
        self._serve(live)
        self._after_work(executor)

    def _drop(self, executor: Executor) -> None:
        """An executor has let go of what it had not begun, as its connection was lost."""
        live = executor.live
        if live is not None:
            self._ended(live, live.book.give_back(executor.id))

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
        self._committer.touch(live, stored)
        self._serve(live)
        self._after_work(executor)
        if self._contended:
            self.wake()

    def _serve(self, live: Live) -> None:
        """Give a session's executors what waits."""
        book = live.book
        if not book.waiting:
            return
        ready = [one for one in live.executors.values() if one.ready]
        if live.form.batch_size > 1:
            ready = ready[: len(ready) // live.form.batch_size * live.form.batch_size]
        if not ready:
            return
        window = live.window()
        share = -(-book.waiting // len(ready))
        if len(ready) > 1:
            ready.sort(key=lambda one: len(book.given(one.id)))
        for executor in ready:
            have = len(book.given(executor.id))
            if have and (executor.stalled or have > window // 2):
                continue
            works = book.give(executor.id, min(window - have, share))
            if not works:
                continue
            executor.never("idle")
            executor.give(works)
            live.changed()
            if not have:
                self._limit(executor)
            if len(works) + have > 1 and "stall" not in executor.timers:
                executor.after("stall", STALLED, lambda one=executor: self._stalled(one))  # type: ignore[misc]
            if not book.waiting:
                return

    def _limit(self, executor: Executor) -> None:
        """See that what an executor runs ends in time. The time of a task begins once its executor is bound."""
        live = executor.live
        if live is None or executor.state is not ExecutorState.BOUND:
            return
        work = next(iter(live.book.given(executor.id).values()), None)
        if work is not None and work.options.timeout is not None:
            executor.after("expiry", work.options.timeout, lambda: self._expired(executor, work.id))

    def _stalled(self, executor: Executor) -> None:
        """An executor with tasks ahead has said nothing for a while: perhaps its task is a long one."""
        live = executor.live
        if live is None or len(live.book.given(executor.id)) < 2:
            return
        quiet = asyncio.get_running_loop().time() - executor.heard
        if quiet >= STALLED:
            executor.send(wire.REVOKE, None)
        else:
            executor.after("stall", STALLED - quiet, lambda: self._stalled(executor))

    def _expired(self, executor: Executor, id: int) -> None:
        """A task has run for too long. It cannot be interrupted, so its executor is ended."""
        live = executor.live
        if live is None or next(iter(live.book.given(executor.id)), None) != id:
            return
        seconds = live.book.live[id].options.timeout
        end = live.book.expire(executor.id, _failure("TimeoutError", f"The task ran for more than {seconds:g} s."))
        self._ended(live, [end] if end is not None else [])
        self._lose(executor, "Its task ran for too long.")

    def _after_work(self, executor: Executor) -> None:
        """An executor may have nothing to do: it is kept for a while."""
        live = executor.live
        if live is None or executor.leaving or live.book.given(executor.id) or live.book.waiting:
            return
        if "idle" not in executor.timers:
            executor.after("idle", live.delay_release, lambda: self._let_go(executor))

    def _let_go(self, executor: Executor) -> None:
        """Nobody has asked anything of an executor for long."""
        live = executor.live
        if live is None:
            self._release(executor)
            return
        if live.book.given(executor.id) or live.book.waiting or executor.leaving:
            return
        if live.held - live.form.batch_size < live.form.min_instances:
            return
        self._unbind(executor)
        self._release(executor)

    def _idle(self, executor: Executor) -> None:
        """An executor serves nobody."""
        executor.after("idle", executor.record.delay_release, lambda: self._let_go(executor))

    # --------------------------------------------------------------------------------------------- the life of one

    def _start(self, live: Live, compute: str) -> None:
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
        self._executors[executor.id] = executor
        self._ground.hold(executor)
        executor.after("reunion", DEPLOY, lambda: self._missed(executor))
        self.context.background.spawn(self._begin(executor, live.application))

    async def _begin(self, executor: Executor, app: Application) -> None:
        compute = executor.record.compute
        spec = WorkerSpec(
            task=executor.id,
            job=JOB,
            attempt=1,
            environment={
                **app.environment,
                **self.context.options.worker_environment,
                "FLAME_SERVER": self._ground.server(compute),
                "FLAME_TASK": executor.id,
                "FLAME_TASK_KEY": self.context.keys.task(executor.id, 1),
                "FLAME_ATTEMPT": "1",
                **self._objects_at(compute),
            },
            dependencies=app.dependencies,
            resources=app.resources,
            module="flame.sessions.executor",
            image=app.image,
        )
        try:
            if executor.releasing:  # its session was closed before it came to this
                return
            # Known before it is there: a restarted server ends executors that it does not know.
            executor.saved = await self._records.insert(executor.id, executor.record)
            executor.info = await self._ground.runner(compute).start(spec)
        except FlameError as error:
            self._failed_to_start(executor, f"An executor could not be started: {error.message}")
            self._lose(executor, error.message)
        finally:
            executor.started.set()

    def _objects_at(self, compute: str) -> dict[str, str]:
        """Where executors find the server's objects as files: those on its own host."""
        folder = self.objects.folder()
        if folder is None or not self._ground.here(compute):
            return {}
        return {"FLAME_OBJECTS": str(folder)}

    def _bind(self, executor: Executor, live: Live) -> None:
        executor.live = live
        executor.leaving = False
        live.executors[executor.id] = executor
        executor.never("idle")
        executor.become(ExecutorState.BINDING)
        executor.send(wire.BIND, live.id, live.common)
        self._serve(live)
        self._after_work(executor)

    def _bind_failed(self, executor: Executor, session: str, failure: bytes) -> None:
        live = executor.live
        if live is None or live.id != session:
            return
        self._ended(live, live.book.give_back(executor.id))
        why = msgspec.msgpack.decode(failure, type=WorkFailure)
        self._failed_to_start(executor, f"on_session_enter failed: {why.type}: {why.message}")
        self._lose(executor, "It could not be bound.")

    def _failed_to_start(self, executor: Executor, why: str, *, died: bool = False) -> None:
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
            self.context.background.spawn(self._sessions.put(live.saved, live.saved.record))
            self._ended(live, live.book.fail_all(_failure("SessionFailed", live.reason)))
            live.tell()

    def _unbind(self, executor: Executor) -> None:
        """Take an executor away from its session, at its task's end."""
        if executor.leaving:
            return
        executor.leaving = True
        executor.never("idle")
        if executor.state is ExecutorState.STARTING:
            self._lose(executor, "It is not needed any more.")
            return
        executor.become(ExecutorState.UNBINDING)
        executor.send(wire.REVOKE, None)
        executor.send(wire.UNBIND)

    def _unbound(self, executor: Executor) -> None:
        self._drop(executor)
        self._part(executor)
        if executor.releasing or executor.state is ExecutorState.IDLE:
            return
        if executor.state is not ExecutorState.UNBINDING:  # an order that was given before its connection broke
            executor.become(ExecutorState.UNBINDING)
        executor.become(ExecutorState.IDLE)
        executor.leaving = False
        self._idle(executor)
        self.wake()

    def _part(self, executor: Executor) -> None:
        """An executor and its session have nothing to do with each other any more."""
        live, executor.live = executor.live, None
        if live is not None:
            live.executors.pop(executor.id, None)
            live.book.forget(executor.id)

    def _release(self, executor: Executor) -> None:
        """Let an executor go, at its own pace."""
        if executor.releasing:
            return
        executor.leaving = executor.releasing = True
        executor.silence()
        executor.send(wire.RELEASE)
        self.context.background.spawn(self._finish(executor, PARTING))

    def _missed(self, executor: Executor) -> None:
        """An executor was started and has never said a word."""
        self._failed_to_start(executor, f"An executor did not appear within {DEPLOY:g} s.")
        self._lose(executor, "It did not appear.")

    def _lose(self, executor: Executor, why: str) -> None:
        """An executor is gone, or as good as gone: what it had goes back, and nothing of it is heard any more."""
        if executor.lost:
            return
        executor.lost = executor.leaving = True
        executor.silence()
        link, executor.link = executor.link, None
        if link is not None:
            link.close()
        live = executor.live
        if live is not None:
            first = next(iter(live.book.given(executor.id).values()), None)
            ends = live.book.lose(
                executor.id, _failure("ExecutorLost", f"Its executors were lost again and again. {why}")
            )
            if first is not None and first.id in live.book.live:
                live.lost(first)
            self._part(executor)
            self._ended(live, ends)
            self._serve(live)
        if not executor.releasing:
            executor.releasing = True
            self.context.background.spawn(self._finish(executor, 0.0))
        self.wake()

    def _disconnected(self, executor: Executor, link: Link) -> None:
        self._links.discard(link)
        if executor.link is not link:
            return
        executor.link = None
        executor.gone.set()
        executor.never("stall")
        if self._open and not executor.releasing:
            executor.after("reunion", REUNION, lambda: self._lose(executor, "Its connection was lost."))

    async def _finish(self, executor: Executor, grace: float) -> None:
        """See to it that nothing of an executor is left.

        :param grace: seconds that it gets to end by itself.
        """
        await executor.started.wait()
        info, pause = executor.info, 0.5
        if info is not None and grace and executor.link is not None:
            try:
                async with asyncio.timeout(grace):
                    await executor.gone.wait()
            except TimeoutError:
                log.warning("executor %s does not leave; it is ended", executor.id)
        while info is not None:
            try:
                runner = self._ground.runner(executor.record.compute)
                await runner.end(info, grace=0.0)
                await runner.clean(info)
                break
            except RunnerError as error:
                log.error("executor %s cannot be ended: %s", executor.id, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)
        await self._forget(executor)

    async def _forget(self, executor: Executor) -> None:
        """Nothing is left of an executor."""
        executor.state = ExecutorState.RELEASED
        self._executors.pop(executor.id, None)
        self._part(executor)
        executor.silence()
        self._ground.give(executor)
        await self._records.delete(executor.id)
        self.wake()

    async def _end_stranger(self, compute: str, info: WorkerInfo) -> None:
        log.warning("executor %s on %s is not known; it is ended", info.task, compute)
        try:
            await self._ground.runner(compute).end(info)
            await self._ground.runner(compute).clean(info)
        except RunnerError as error:
            log.error("executor %s cannot be ended: %s", info.task, error)

    # --------------------------------------------------------------------------------------------- as a tenant

    def owns(self, worker: WorkerInfo) -> bool:
        """Whether a worker is an executor of ours."""
        return worker.job == JOB

    def exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        """The runner has seen the end of an executor that nobody asked to end."""
        executor = self._executors.get(worker.task)
        if executor is None:
            return
        executor.gone.set()
        if executor.releasing:
            return
        cause = how.message or (
            f"It was killed by {how.signal}." if how.signal else f"It ended with status {how.exit_code}."
        )
        log.info("executor %s is gone: %s", executor.id, cause)
        if executor.state in (ExecutorState.STARTING, ExecutorState.BINDING) and not executor.leaving:
            killed = how.signal is not None
            self._failed_to_start(executor, f"An executor ended before it served a task. {cause}", died=killed)
        self._lose(executor, cause)

    def news(self, worker: WorkerInfo, message: str | None) -> None:
        """A compute says what an executor waits for, or why it takes it away. Its end, with the cause, is told besides."""
        if message is not None:
            log.info("executor %s: %s", worker.task, message)

    def freed(self) -> None:
        """There may be room that was not there before."""
        self.wake()

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        """A compute is back, and has these executors."""
        there = {info.task: info for info in workers}
        for executor in [one for one in self._executors.values() if one.record.compute == compute]:
            info = there.pop(executor.id, None)
            if info is not None:
                executor.info = executor.info or info
            elif executor.started.is_set() and executor.began < asked:
                self._lose(executor, f"It is not on {compute} any more.")
        for info in there.values():
            self.context.background.spawn(self._end_stranger(compute, info))

    # ----------------------------------------------------------------------------------------------- scheduling

    def wake(self) -> None:
        """Look at who should have which executor: once, when what happens now has happened, and not too often."""
        if self._looking is None and self._open:
            loop = asyncio.get_running_loop()
            rest = self._looked + CALM - loop.time() if self._contended else 0.0
            self._looking = loop.call_later(rest, self._look) if rest > 0 else loop.call_soon(self._look)

    def _look(self) -> None:
        self._looking = None
        self._looked = asyncio.get_running_loop().time()
        needs = [live.need() for live in self._lives.values()]
        wanting = [need for need in needs if need.wants or self._lives[need.id].executors]
        slots = {need.id: self._lives[need.id].held * need.slots / need.weight for need in wanting}
        lacking = [need.id for need in wanting if need.wants > self._lives[need.id].held and not need.blocked]
        self._service.note(self._looked, slots, lacking)
        needs = [need._replace(had=self._service.had.get(need.id, 0.0)) for need in wanting]
        caps = {
            live.app: live.application.max_instances
            for live in self._lives.values()
            if live.application.max_instances is not None
        }
        for executor in list(self._executors.values()):
            if (
                self._ground.wanted(executor) and "idle" in executor.timers
            ):  # it does nothing, and jobs wait for its room
                executor.never("idle")
                self._let_go(executor)
        held = [executor.held() for executor in self._executors.values()]
        nodes = self._ground.nodes(self._executors.values())
        actions = plan(needs, nodes, held, caps)
        for action in actions:
            if isinstance(action, Start):
                self._start(self._lives[action.session], action.node)
            elif isinstance(action, Bind):
                self._bind(self._executors[action.executor], self._lives[action.session])
            elif isinstance(action, Unbind):
                self._unbind(self._executors[action.executor])
            elif isinstance(action, Release):
                self._release(self._executors[action.executor])
        self._contended = any(need.wants > self._lives[need.id].held and not need.blocked for need in needs)

    # ---------------------------------------------------------------------------------------------------- pieces

    def _ended(self, live: Live, ends: Iterable[End]) -> None:
        """Tasks have ended: write it, and then tell their clients."""
        before = len(live.ends)
        live.ends.extend(ends)
        if len(live.ends) != before or live.entries:
            self._committer.touch(live)

    def acknowledge(self, live: Live, client: str, entry: int) -> None:
        """A client has the answers of a record; written along with whatever is written next."""
        member = live.members.get(client)
        if member is not None and member.unread.pop(entry, None) is not None:
            live.read.setdefault(client, []).append(entry)


def _failure(kind: str, message: str) -> bytes:
    return msgspec.msgpack.encode(WorkFailure(type=kind, message=message))


def _work(id: int, attempt: int, state: int, payload: bytes) -> WorkRecord:
    failure = msgspec.msgpack.decode(payload, type=WorkFailure) if state == wire.FAILED and payload else None
    return WorkRecord(id=id, state=_STATES[state], attempt=attempt, failure=failure)
