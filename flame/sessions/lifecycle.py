"""The life of a session's tasks, of a session and of an executor. Pure: no clock, no socket, no store.

A :class:`Book` holds the tasks of a session that are not answered yet. They wait in the order of their ids, go to executors in
that order, and end once: an executor answers for an attempt, and an answer for any other attempt than the one that it
was given is refused. An executor is given a few tasks ahead, so that it never waits for the next one; only the first of them
runs. What it has not begun goes back to its place in the line, as the same attempt; what it was running when it was lost goes
to the front as the next attempt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flame.errors import Conflict
from flame.sessions import wire
from flame.spec.sessions import Counts, ExecutorState, SessionForm, SessionState, WorkState

#: How many executors a task may take down with it.
MOST_LOST = 5
#: How often ``on_session_enter`` may fail before a session gets no executors any more.
MOST_FAILED_BINDS = 5
#: How often in a row executors may die before they are bound: that can be the application's fault, or anybody's.
MOST_DEATHS = 20

_STATES = {wire.SUCCEED: WorkState.SUCCEED, wire.FAILED: WorkState.FAILED, wire.WAS_CANCELLED: WorkState.CANCELLED}


class Options(NamedTuple):
    """What a task may do: seconds, and how often it is tried again when it fails."""

    timeout: float | None = None
    retries: int = 0


class Work:
    """A task that is not answered yet. ``client`` and ``number`` say whose it is, and which of theirs."""

    __slots__ = ("attempt", "cancelled", "client", "failed", "id", "lost", "number", "options", "payload")

    def __init__(self, id: int, client: str, number: int, payload: bytes, options: Options) -> None:
        self.id = id
        self.client = client
        self.number = number
        self.payload = payload
        self.options = options
        self.attempt = 1
        self.failed = 0
        self.lost = 0
        self.cancelled = False


class End(NamedTuple):
    """How a task ended. ``payload``: its output, or its failure as :class:`flame.spec.sessions.WorkFailure` in msgpack."""

    work: Work
    state: int
    payload: bytes


class Book:
    """The tasks of one session."""

    def __init__(self, retry_budget: int | None = None) -> None:
        self.next = 1
        self.succeed = self.failed = self.cancelled = 0
        self.retry_budget = retry_budget
        self.live: dict[int, Work] = {}
        self._line: deque[Work] = deque()
        self._gone = 0  # cancelled ones that are still in the line
        self._given: dict[str, dict[int, Work]] = {}

    @property
    def waiting(self) -> int:
        """How many tasks wait for an executor."""
        return len(self._line) - self._gone

    @property
    def running(self) -> int:
        """How many tasks run: the first of each executor's."""
        return sum(1 for given in self._given.values() if given)

    @property
    def counts(self) -> Counts:
        """The tasks by state."""
        running, live = self.running, len(self.live)
        return Counts(
            total=self.next - 1,
            pending=live - running,
            running=running,
            succeed=self.succeed,
            failed=self.failed,
            cancelled=self.cancelled,
        )

    def submit(self, client: str, first: int, payloads: Sequence[bytes], options: Options) -> int:
        """Take up tasks; gives the id of the first."""
        begin = self.next
        works = [Work(begin + i, client, first + i, payload, options) for i, payload in enumerate(payloads)]
        self.next += len(works)
        self.live.update((work.id, work) for work in works)
        self._line.extend(works)
        return begin

    def first(self) -> Work | None:
        """The task that is next."""
        self._skip()
        return self._line[0] if self._line else None

    def give(self, executor: str, most: int) -> list[Work]:
        """The next tasks go to an executor. One with a timeout goes alone, since its time runs from now on."""
        given = self._given.setdefault(executor, {})
        found: list[Work] = []
        while len(found) < most and (work := self.first()) is not None:
            if work.options.timeout is not None and (given or found):
                break
            self._line.popleft()
            found.append(work)
            if work.options.timeout is not None:
                break
        given.update((work.id, work) for work in found)
        return found

    def given(self, executor: str) -> Mapping[int, Work]:
        """What an executor has, in order; the first of it runs."""
        return self._given.get(executor, {})

    def answer(self, executor: str, id: int, attempt: int, ok: bool, payload: bytes) -> End | None:
        """An executor answers for an attempt. None: it is refused, or the task is tried again."""
        given = self._given.get(executor)
        work = given.get(id) if given is not None else None
        if given is None or work is None or work.attempt != attempt:
            return None
        del given[id]
        if ok:
            return self._end(work, wire.SUCCEED, payload)
        if work.cancelled:
            return self._end(work, wire.WAS_CANCELLED, payload)
        work.failed += 1
        if work.failed <= work.options.retries and self._may_retry():
            work.attempt += 1
            self._put_back([work])
            return None
        return self._end(work, wire.FAILED, payload)

    def give_back(self, executor: str, ids: Iterable[int] | None = None) -> list[End]:
        """An executor has not begun these tasks (None: any). They are in the line again, unless they were cancelled."""
        given = self._given.get(executor, {})
        works = [given.pop(one) for one in (list(given) if ids is None else ids) if one in given]
        self._put_back([work for work in works if not work.cancelled])
        return [self._end(work, wire.WAS_CANCELLED, b"") for work in works if work.cancelled]

    def lose(self, executor: str, why: bytes) -> list[End]:
        """An executor is lost, and what it was running with it. The rest it had not begun.

        :param why: the failure of a task that has taken down too many executors.
        """
        given = self._given.pop(executor, {})
        works, ends = list(given.values()), list[End]()
        if works:
            first = works[0]
            first.attempt += 1
            first.lost += 1
            if first.cancelled or first.lost >= MOST_LOST:
                state = wire.WAS_CANCELLED if first.cancelled else wire.FAILED
                ends.append(self._end(works.pop(0), state, b"" if first.cancelled else why))
        ends += [self._end(work, wire.WAS_CANCELLED, b"") for work in works if work.cancelled]
        self._put_back([work for work in works if not work.cancelled])
        return ends

    def expire(self, executor: str, failure: bytes) -> End | None:
        """The task that an executor runs has run for too long: it fails, or is tried again."""
        given = self._given.get(executor)
        if not given:
            return None
        work = next(iter(given.values()))
        return self.answer(executor, work.id, work.attempt, False, failure)

    def cancel(self, ids: Iterable[int]) -> tuple[list[End], dict[str, list[int]]]:
        """Cancel tasks. What waits has ended; what executors have is marked, and given here by executor: it is theirs to say
        whether they have begun it.
        """
        ends: list[End] = []
        held: dict[str, list[int]] = {}
        homes = {one: executor for executor, given in self._given.items() for one in given}
        for one in ids:
            work = self.live.get(one)
            if work is None:
                continue
            if one in homes:
                held.setdefault(homes[one], []).append(one)
            else:
                work.cancelled = True
                self._gone += 1
                ends.append(self._end(work, wire.WAS_CANCELLED, b""))
        return ends, held

    def fail_all(self, failure: bytes) -> list[End]:
        """Nothing can serve this session: what waits fails."""
        self._skip()
        works = [work for work in self._line if not work.cancelled]
        self._line.clear()
        self._gone = 0
        return [self._end(work, wire.FAILED, failure) for work in works]

    def close(self) -> list[End]:
        """Everything that has no end yet is cancelled, also what runs."""
        self._line.clear()
        self._gone = 0
        self._given.clear()
        return [self._end(work, wire.WAS_CANCELLED, b"") for work in list(self.live.values())]

    def forget(self, executor: str) -> None:
        """An executor has left, with nothing in its hands."""
        self._given.pop(executor, None)

    # ---------------------------------------------------------------------------------------------- recovery

    def restore(self, next: int, works: Iterable[Work], ended: Mapping[int, int]) -> None:
        """Take up what a journal says: tasks without an end, in order, and how many ended in which state."""
        self.next = next
        self.succeed, self.failed, self.cancelled = (ended.get(state, 0) for state in _STATES)
        for work in works:
            self.live[work.id] = work
            self._line.append(work)

    def claim(self, executor: str, id: int, attempt: int) -> bool:
        """An executor that was there before a restart runs this; False: that is not so any more, and its answer will be refused."""
        work = self.live.get(id)
        if (
            work is None
            or work.attempt != attempt
            or work.cancelled
            or any(id in given for given in self._given.values())
        ):
            return False
        self._line.remove(work)
        self._given.setdefault(executor, {})[id] = work
        return True

    # ------------------------------------------------------------------------------------------------ pieces

    def _end(self, work: Work, state: int, payload: bytes) -> End:
        del self.live[work.id]
        if state == wire.SUCCEED:
            self.succeed += 1
        elif state == wire.FAILED:
            self.failed += 1
        else:
            self.cancelled += 1
        return End(work, state, payload)

    def _skip(self) -> None:
        while self._line and self._line[0].cancelled:
            self._line.popleft()
            self._gone -= 1

    def _put_back(self, works: list[Work]) -> None:
        """Put tasks into the line at their places, which are at its front or near it."""
        works.sort(key=lambda work: work.id)
        self._skip()
        before: list[Work] = []
        while works and self._line and self._line[0].id < works[-1].id:
            before.append(self._line.popleft())
        works = sorted([*works, *before], key=lambda work: work.id) if before else works
        self._line.extendleft(reversed(works))

    def _may_retry(self) -> bool:
        if self.retry_budget is None:
            return True
        if self.retry_budget <= 0:
            return False
        self.retry_budget -= 1
        return True


# -------------------------------------------------------------------------------------------------- sessions


def check_same(wanted: SessionForm, there: SessionForm, state: SessionState) -> None:
    """Opening a session that is there gives that one, if it is the same.

    :raises flame.errors.Conflict: it is closed, or something differs.
    """
    if state is SessionState.CLOSED:
        raise Conflict(f"Session {there.id} is closed; open one with another id.")
    differing = [
        f"{_camel(name)} is {_short(getattr(there, name))}, not {_short(getattr(wanted, name))}"
        for name in SessionForm.__struct_fields__
        if getattr(wanted, name) != getattr(there, name)
    ]
    if differing:
        raise Conflict(f"Session {there.id} is open with another specification: {'; '.join(differing)}.")


def check_close(counts: Counts, id: str, *, force: bool) -> None:
    """Refuse to close a session whose tasks run.

    :raises flame.errors.Conflict: some do, and ``force`` is not given.
    """
    if counts.running and not force:
        some = "a task" if counts.running == 1 else f"{counts.running} tasks"
        raise Conflict(f"Session {id} runs {some}; wait for the end, or close it with force.")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------- executors

_NEXT: Mapping[ExecutorState, frozenset[ExecutorState]] = {
    ExecutorState.STARTING: frozenset({ExecutorState.IDLE, ExecutorState.BINDING, ExecutorState.RELEASED}),
    ExecutorState.IDLE: frozenset({ExecutorState.BINDING, ExecutorState.RELEASED}),
    ExecutorState.BINDING: frozenset({ExecutorState.BOUND, ExecutorState.UNBINDING, ExecutorState.RELEASED}),
    ExecutorState.BOUND: frozenset({ExecutorState.UNBINDING, ExecutorState.RELEASED}),
    ExecutorState.UNBINDING: frozenset({ExecutorState.IDLE, ExecutorState.RELEASED}),
    ExecutorState.RELEASED: frozenset(),
}


def follows(state: ExecutorState, after: ExecutorState) -> bool:
    """Whether an executor may go from one state to another. One that is back after a restart is where it was."""
    return after in _NEXT[state]
