"""An open session in the server's memory: its tasks, its clients, its executors, and what is about to be written of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from flame.controller.shelf import Saved
from flame.sessions import wire
from flame.sessions.lifecycle import Book, End, Options, Work
from flame.sessions.manager import journal
from flame.sessions.manager.journal import Keeper, Member
from flame.sessions.scheduler import Need
from flame.spec.sessions import Counts, SessionRecord, WorkFailure

if TYPE_CHECKING:
    from flame.sessions.manager.executors import Executor

#: Seconds' worth of tasks that an executor is given ahead.
AHEAD = 0.008
#: Most tasks that an executor is given ahead.
MOST_AHEAD = 512
#: Seconds between two messages about counts.
_COUNTING = 0.05


class Live:
    """An open session.

    :ivar order: when it came, among the others.
    :ivar key: what executors can serve it.
    :ivar app: what its application is known by, over all sessions.
    :ivar files: its application's code.
    :ivar each: about how long a task takes, in seconds; None while that is not known.
    :ivar failed: how often executors could not be started or bound since the last time that it went well; ``died``: how often
        they died on the way.
    :ivar closing: it takes no tasks any more.
    :ivar awaits: the digest of the common data that its client has yet to bring.
    """

    def __init__(self, saved: Saved[SessionRecord], order: int) -> None:
        record = saved.record
        self.saved = saved
        self.id = saved.id
        self.form = record.form
        self.application = record.application
        self.order = order
        self.key = key_of(record)
        self.app = f"{record.project}/{record.application.name}" if record.application.name else self.key
        self.book = Book(record.form.retry_budget)
        self.members: dict[str, Member] = {}
        self.executors: dict[str, Executor] = {}
        self.each: float | None = None
        self.failed = self.died = 0
        self.reason: str | None = record.reason
        self.closing = False
        digest = record.form.common_digest
        self.common = record.form.common if digest is None else wire.reference(digest)
        self.awaits: str | None = None
        self.files: dict[str, bytes] = {}
        self.last = 0  # of the journal's records
        self.keeper = Keeper()
        # What the next commit writes, and whom it then tells.
        self.entries: list[tuple[bytes, int, int, int]] = []
        self.accepted: list[tuple[Member, journal.Block]] = []
        self.ends: list[End] = []
        self.read: dict[str, list[int]] = {}
        self._watchers: set[Callable[[], None]] = set()
        self._counting: asyncio.TimerHandle | None = None

    @property
    def delay_release(self) -> float:
        """Seconds for which an executor with nothing to do is kept."""
        given = self.form.delay_release
        return self.application.delay_release if given is None else given

    @property
    def options(self) -> Options:
        """What holds for tasks that say nothing."""
        return Options(self.form.timeout, self.form.retries)

    def need(self, had: float = 0.0) -> Need:
        """This session for the scheduler."""
        form, app = self.form, self.application
        resources = app.resources
        return Need(
            id=self.id,
            key=self.key,
            app=self.app,
            order=self.order,
            tasks=len(self.book.live),
            priority=form.priority,
            weight=form.weight,
            least=form.min_instances,
            most=form.max_instances,
            batch=form.batch_size,
            slots=form.slots,
            cpu=resources.cpu or 0.0,
            memory=resources.memory_bytes or 0,
            gpu=resources.gpu,
            had=had,
            blocked=self.reason is not None or self.closing or self.awaits is not None,
        )

    @property
    def held(self) -> int:
        """Executors that are its own, or are about to be."""
        return sum(1 for one in self.executors.values() if not one.leaving)

    @property
    def lacks(self) -> bool:
        """Whether it could use more executors than it has."""
        return self.reason is None and not self.closing and self.awaits is None and self.need().wants > self.held

    def window(self) -> int:
        """How many tasks an executor may have, the running one included."""
        if self.each is None:
            return 1
        return min(MOST_AHEAD, 1 + int(AHEAD / max(self.each, 1e-7)))

    def timed(self, count: int, seconds: float) -> None:
        """So many tasks took so long."""
        now = max(seconds, 0.0) / count
        self.each = now if self.each is None else 0.7 * self.each + 0.3 * now

    # ------------------------------------------------------------------------------------------------ tasks

    def submit(self, client: str, first: int, payloads: list[bytes], options: Options) -> list[tuple[int, int, int]]:
        """Take up a client's tasks. Those that it has sent before are known: their blocks are given, to be confirmed again."""
        member = self.members.setdefault(client, Member())
        if first <= member.last:
            known = [block for block in member.blocks if block[0] + block[2] > first]
            payloads, first = payloads[member.last + 1 - first :], member.last + 1
        else:
            known = []
        if payloads:
            begin = self.book.submit(client, first, payloads, options)
            block = (first, begin, len(payloads))
            member.accept(block)
            data = journal.submitted(client, first, begin, options, payloads)
            self.entries.append((data, journal.SUBMITTED, begin, len(payloads)))
            self.accepted.append((member, block))
        return known

    def works_of(self, client: str, numbers: Iterable[int]) -> list[Work]:
        """A client's tasks without an end, by its own numbers."""
        member = self.members.get(client) or Member()
        found: list[Work] = []
        old = set[int]()
        for number in numbers:
            block = next((one for one in reversed(member.blocks) if one[0] <= number < one[0] + one[2]), None)
            if block is None:
                old.add(number)
            elif (work := self.book.live.get(block[1] + number - block[0])) is not None:
                found.append(work)
        if old:  # from before the blocks that are remembered
            found += [work for work in self.book.live.values() if work.client == client and work.number in old]
        return found

    def lost(self, work: Work) -> None:
        """A task is on its next attempt."""
        self.entries.append((journal.attempt(work), journal.ATTEMPT, 0, 0))

    # ------------------------------------------------------------------------------------------------ what is seen

    @property
    def counts(self) -> Counts:
        """Its tasks by state."""
        return self.book.counts

    def view(self) -> SessionRecord:
        """It as it is shown."""
        executors = [one.view() for one in self.executors.values()]
        reason = self.reason
        if reason is None and self.awaits is not None:
            reason = "It waits for its client to bring the common data."
        return msgspec.structs.replace(self.saved.record, counts=self.counts, executors=executors, reason=reason)

    def watch(self, told: Callable[[], None]) -> Callable[[], None]:
        """Call ``told`` when counts have changed, not too often; gives what ends that."""
        self._watchers.add(told)
        return lambda: self._watchers.discard(told)

    def changed(self) -> None:
        """Counts have changed."""
        if self._watchers and self._counting is None:
            self._counting = asyncio.get_running_loop().call_later(_COUNTING, self.tell)

    def tell(self) -> None:
        """Tell the watchers now."""
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None
        for told in list(self._watchers):
            told()


def key_of(record: SessionRecord) -> str:
    """What executors can serve a session: those of the same application, with the same resources, of the same project."""
    app = record.application
    what = (
        record.project,
        app.name,
        app.entry,
        app.code,
        app.image,
        sorted(app.arguments.items()),
        sorted(app.environment.items()),
        app.dependencies,
        app.resources,
        record.form.slots,
    )
    return hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:32]


def failure(kind: str, message: str) -> bytes:
    """Why a task has failed, where it is not its own exception: what its client gets."""
    return msgspec.msgpack.encode(WorkFailure(type=kind, message=message))
