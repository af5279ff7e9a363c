"""What clients ask of tasks: to take them up, to cancel them, to say what has become of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from flame.errors import Conflict
from flame.sessions import wire
from flame.sessions.lifecycle import Options
from flame.sessions.manager import journal
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.live import Live, failure
from flame.sessions.manager.pool import Pool
from flame.sessions.manager.register import Register
from flame.spec.sessions import WorkFailure, WorkRecord, WorkState

_STATES = {wire.SUCCEED: WorkState.SUCCEED, wire.FAILED: WorkState.FAILED, wire.WAS_CANCELLED: WorkState.CANCELLED}


class Tasks:
    """The tasks of all sessions."""

    def __init__(self, floor: Floor, pool: Pool, register: Register, wake: Callable[[], None]) -> None:
        self._floor = floor
        self._pool = pool
        self._register = register
        self._wake = wake

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
            self._floor.committer.ended(live, live.book.fail_all(failure("SessionFailed", live.reason)))
        self._floor.committer.touch(live)
        self._pool.serving.serve(live)
        if live.lacks:
            self._wake()
        return known

    def cancel(self, live: Live, client: str, numbers: Sequence[int], *, force: bool = False) -> list[int]:
        """Cancel tasks by their client's numbers; gives those that are cancelled, or will be.

        A task that runs goes on, unless ``force``: then its executor is ended.
        """
        works = {work.id: work for work in live.works_of(client, numbers)}
        ends, held = live.book.cancel(works)
        taken = [end.work.number for end in ends]
        self._floor.committer.ended(live, ends)
        for name, ids in held.items():
            executor = self._floor.executors[name]
            running = next(iter(live.book.given(name)), None)
            ahead = [one for one in ids if one != running]
            for one in ahead:
                works[one].cancelled = True
            if running in ids and force:
                works[running].cancelled = True
                taken.append(works[running].number)
                self._pool.lose(executor, "Its task was cancelled.")
            elif ahead:
                executor.send(wire.REVOKE, ahead)
            taken += [works[one].number for one in ahead]
        return taken

    def acknowledge(self, live: Live, client: str, entry: int) -> None:
        """A client has the answers of a record; written along with whatever is written next."""
        member = live.members.get(client)
        if member is not None and member.unread.pop(entry, None) is not None:
            live.read.setdefault(client, []).append(entry)

    async def find(self, id: str, after: int, limit: int, state: WorkState | None = None) -> list[WorkRecord]:
        """A session's tasks in order of their ids, from the journal: those without an end, and the newest that have one."""
        await self._register.get(id)
        live = self._floor.lives.get(id)
        place, ends, total, seen = journal.name(id), dict[int, WorkRecord](), 0, 0
        while records := await self._floor.context.store.recall(place, after=seen, limit=500):
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


def _work(id: int, attempt: int, state: int, payload: bytes) -> WorkRecord:
    failure = msgspec.msgpack.decode(payload, type=WorkFailure) if state == wire.FAILED and payload else None
    return WorkRecord(id=id, state=_STATES[state], attempt=attempt, failure=failure)
