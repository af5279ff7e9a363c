"""A session's journal: what was submitted and how it ended, a record for a frame of many tasks.

The journal is all that is kept of a session's tasks. A starting server reads it once and has the tasks without an end, in
order, and the answers that their clients have not acknowledged. Clients are known by an id of their own making, and number
their tasks, so that what is sent again after a broken connection is known.

So that a session of millions of tasks does not grow without end, a *summary* is written now and then: what has been, in
numbers, and which tasks have no end. The records before it that nobody needs any more are removed. Of the ends the newest stay, for
people to look at.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from flame.errors import StoreError
from flame.sessions.lifecycle import Book, End, Options, Work

SUBMITTED, ENDED, ACKNOWLEDGED, ATTEMPT, SUMMARY = range(5)
#: Frames of one client that are remembered, to know them when they are sent again: those that were not acknowledged yet.
REMEMBERED = 1024
#: Records of ends that are kept for people to look at, and records between two summaries.
HISTORY, RECORDS = 2000, 4000

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Any]).decode

#: Number and id of the first, and how many.
Block = tuple[int, int, int]
#: Number, id, state, payload: an end as its client is told it.
Row = tuple[int, int, int, bytes]


def name(session: str) -> str:
    """The journal of a session."""
    return f"session/{session}"


def submitted(client: str, first: int, begin: int, options: Options, payloads: Sequence[bytes]) -> bytes:
    """Tasks of a client, from its number ``first`` and the id ``begin`` on."""
    return _encode((SUBMITTED, client, first, begin, options, payloads))


def ended(ends: Sequence[End]) -> bytes:
    """How tasks ended."""
    return _encode((ENDED, [(w.client, w.number, w.id, w.attempt, state, payload) for w, state, payload in ends]))


def acknowledged(client: str, entries: Sequence[int]) -> bytes:
    """A client has the answers of these records."""
    return _encode((ACKNOWLEDGED, client, entries))


def attempt(work: Work) -> bytes:
    """A task is on its next attempt, since the executor of the last one was lost."""
    return _encode((ATTEMPT, work.id, work.attempt, work.lost))


def summary(book: Book, members: Mapping[str, Member]) -> bytes:
    """All that the records before this one say, but for inputs and outputs."""
    live = sorted(book.live.values(), key=lambda work: work.id)
    clients = {name: (member.last, [*member.blocks], [*member.unread]) for name, member in members.items()}
    ended = (book.succeed, book.failed, book.cancelled)
    again = [(work.id, work.attempt, work.lost) for work in live if work.attempt > 1]
    return _encode((SUMMARY, book.next, ended, ranges([work.id for work in live]), again, clients))


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, first and last."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


class Member:
    """A client of a session: what it has submitted, and the answers that it has not acknowledged.

    :ivar last: the greatest number that was accepted.
    :ivar blocks: the newest frames of tasks.
    :ivar unread: answers by the number of the journal's record that holds them.
    """

    __slots__ = ("blocks", "channel", "last", "link", "unread")

    def __init__(self) -> None:
        self.last = 0
        self.blocks: deque[Block] = deque(maxlen=REMEMBERED)
        self.unread: dict[int, list[Row]] = {}
        self.link: Any = None
        self.channel = 0

    def accept(self, block: Block) -> None:
        """Tasks were submitted."""
        first, _, count = block
        self.last = first + count - 1
        self.blocks.append(block)


class Past:
    """A session's tasks, as its journal tells them.

    :ivar next: the id of the task that comes next.
    :ivar works: tasks without an end, in order.
    :ivar ended: how many ended in which state.
    :ivar last: the number of the last record.
    """

    def __init__(self) -> None:
        self.next = 1
        self.last = 0
        self.works: dict[int, Work] = {}
        self.ended: Counter[int] = Counter()
        self.members: dict[str, Member] = {}
        self.keeper = Keeper()

    def add(self, number: int, data: bytes) -> None:
        """The next record.

        :raises flame.errors.StoreError: it is damaged.
        """
        try:
            self._add(number, _decode(data))
        except (msgspec.MsgspecError, ValueError, TypeError, LookupError) as error:
            raise StoreError(f"Record {number} of a session's journal is damaged: {error}.") from error

    def _add(self, number: int, entry: list[Any]) -> None:
        self.last = number
        kind, *fields = entry
        if kind != SUBMITTED:
            self.keeper.note(number, kind)
        if kind == SUBMITTED:
            client, first, begin, options, payloads = fields
            chosen = Options(*options)
            for place, payload in enumerate(payloads):
                self.works[begin + place] = Work(begin + place, client, first + place, payload, chosen)
            self.next = begin + len(payloads)
            self.keeper.note(number, kind, begin, len(payloads))
            self.members.setdefault(client, Member()).accept((first, begin, len(payloads)))
        elif kind == ENDED:
            for client, own, task, _, state, payload in fields[0]:
                self.works.pop(task, None)
                self.ended[state] += 1
                self.members.setdefault(client, Member()).unread.setdefault(number, []).append(
                    (own, task, state, payload)
                )
        elif kind == ACKNOWLEDGED:
            client, entries = fields
            for one in entries:
                self.members.setdefault(client, Member()).unread.pop(one, None)
        elif kind == ATTEMPT:
            task, count, lost = fields
            if task in self.works:
                self.works[task].attempt, self.works[task].lost = count, lost
        elif kind == SUMMARY:
            self._sum_up(*fields)
        else:
            raise ValueError(f"an unknown kind {kind}")

    def _sum_up(
        self,
        following: int,
        ended: Sequence[int],
        live: Sequence[Sequence[int]],
        again: Sequence[Sequence[int]],
        clients: Mapping[str, Sequence[Any]],
    ) -> None:
        self.next = following
        self.ended = Counter(dict(enumerate(ended)))
        wanted = {number for first, last in live for number in range(first, last + 1)}
        self.works = {task: work for task, work in self.works.items() if task in wanted}
        for task, count, lost in again:
            self.works[task].attempt, self.works[task].lost = count, lost
        for client, (last, blocks, unread) in clients.items():
            member = self.members.setdefault(client, Member())
            member.last, member.blocks = last, deque(map(tuple, blocks), maxlen=REMEMBERED)
            member.unread = {entry: rows for entry, rows in member.unread.items() if entry in set(unread)}


def ends_in(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Id, attempt, state and payload of the ends in a record; none where it is of another kind."""
    kind, *fields = _decode(data)
    if kind == ENDED:
        for _, _, task, count, state, payload in fields[0]:
            yield task, count, state, payload


def begun_in(data: bytes) -> tuple[int, int]:
    """Id of the first, and how many, of the tasks that a record submits."""
    kind, *fields = _decode(data)
    return (fields[2], len(fields[4])) if kind == SUBMITTED else (0, 0)


class Keeper:
    """Which records of a session's journal are there, and which of them nobody needs after a summary.

    :ivar due: it is time for a summary.
    """

    def __init__(self) -> None:
        self._submitted: dict[int, tuple[int, int]] = {}  # id of the first, and how many
        self._ended: deque[int] = deque()
        self._passing: list[int] = []  # what a summary says, too
        self._since = 0  # the last summary

    @property
    def due(self) -> bool:
        """See the class."""
        return self._since > RECORDS

    def note(self, number: int, kind: int, begin: int = 0, count: int = 0) -> None:
        """A record is there; one that submits tasks with the id of the first, and how many they are."""
        self._since += 1
        if kind == SUBMITTED:
            self._submitted[number] = (begin, count)
        elif kind == ENDED:
            self._ended.append(number)
        else:
            self._passing.append(number)

    def outdated(self, book: Book, members: Mapping[str, Member]) -> list[int]:
        """The records that a summary makes needless."""
        live = sorted(book.live)
        self._since = 0
        found, self._passing = self._passing, []
        for number, (begin, count) in list(self._submitted.items()):
            place = bisect_left(live, begin)
            if place == len(live) or live[place] >= begin + count:
                found.append(number)
                del self._submitted[number]
        unread = {entry for member in members.values() for entry in member.unread}
        while len(self._ended) > HISTORY and self._ended[0] not in unread:
            found.append(self._ended.popleft())
        return found
