"""A session's journal: what was submitted and how it ended, a record for a frame of many tasks.

The journal is all that is kept of a session's tasks. A starting server reads it once and has the tasks without an end, in
order, and the answers that their clients have not acknowledged. Clients are known by an id of their own making, and number
their tasks, so that what is sent again after a broken connection is known.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from flame.errors import StoreError
from flame.sessions.lifecycle import End, Options, Work

SUBMITTED, ENDED, ACKNOWLEDGED, ATTEMPT = range(4)
#: Frames of one client that are remembered, to know them when they are sent again: those that were not acknowledged yet.
REMEMBERED = 1024

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
        if kind == SUBMITTED:
            client, first, begin, options, payloads = fields
            chosen = Options(*options)
            for place, payload in enumerate(payloads):
                self.works[begin + place] = Work(begin + place, client, first + place, payload, chosen)
            self.next = begin + len(payloads)
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
        else:
            raise ValueError(f"an unknown kind {kind}")


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
