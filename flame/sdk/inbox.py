"""Where a backend puts what arrives, and where a role's threads wait for it.

One condition guards everything: the backend's thread adds under it, and waiting threads are woken by it, so nothing
polls. A wait for several ends registers them once; from then on each arrival costs the same however many ends there
are. An end that leaves is delivered like a message, with nothing in it, so that nobody waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flame.sdk.end import End

if TYPE_CHECKING:
    from flame.sdk.backends.base import Member
    from flame.sdk.codec import Message


#: The reason with which backends report an end that has left in good order. With any other its connection was lost.
LEFT = "left the channel"


class Arrival:
    """A message as it arrived; opened (decoded) by who takes it, or peeks at it."""

    __slots__ = ("data", "message", "release", "seq", "time")

    def __init__(self, seq: int, data: memoryview | bytearray | bytes, release: Callable[[], None] | None) -> None:
        self.seq = seq
        self.data: memoryview | bytearray | bytes | None = data
        self.release = release
        self.time = time.time()
        self.message: Message | None = None

    def drop(self) -> None:
        """Let go of a message that nobody will look at."""
        release, self.release, self.data, self.message = self.release, None, None, None
        if release is not None:
            release()


class Wait:
    """One thread's wait for a message from each of some ends, in the order of arrival."""

    def __init__(self, ends: Collection[str]) -> None:
        self.pending = set(ends)
        self.ready: deque[str] = deque()


class Inbox:
    """The arrived messages of a channel, and who is there.

    :param window: see :class:`flame.sdk.backends.base.Sink`.
    :param wants: whether a member is one that the channel talks with.
    :param on_want: called (under the lock) with the ends that are waited for while nothing of theirs is there, and with
        none when that is over.
    :param condition: notified in place of one of its own: a worker's channels share one, so that a wait on one of them can
        look at the others too.
    :ivar condition: notified whenever an end comes or goes, or a message arrives.
    :ivar present: the ends that are there, in the order in which they came.
    :ivar reasons: of the ends that are gone, why.
    :ivar visits: how often each end has come.
    :ivar lost: when the connection of those was lost that have not left in good order, by the monotonic clock.
    """

    def __init__(
        self,
        window: int,
        wants: Callable[[Member], bool],
        on_want: Callable[[Collection[str]], None],
        condition: threading.Condition | None = None,
    ) -> None:
        self.window = window
        self.wants = wants
        self.condition = condition or threading.Condition()
        self.present: dict[str, End] = {}
        self.reasons: dict[str, str] = {}
        self.lost: dict[str, float] = {}
        self.visits: dict[str, int] = {}
        self._on_want = on_want
        self._left: dict[str, End] = {}  # gone, with messages that were not taken yet
        self._waits: list[Wait] = []
        self._blocked: list[Wait] = []  # those with nothing to take
        self._seq = 0
        self._closed = False

    # What the backend calls.

    def on_join(self, member: Member) -> None:
        """See :class:`flame.sdk.backends.base.Sink`."""
        if not self.wants(member):
            return
        with self.condition:
            end = self.present.get(member.end) or self._left.pop(member.end, None) or End(member.end)
            end.member = member
            self.present[member.end] = end
            self.reasons.pop(member.end, None)
            self.lost.pop(member.end, None)
            self.visits[member.end] = self.visits.get(member.end, 0) + 1
            self.condition.notify_all()

    def on_leave(self, end: str, reason: str) -> None:
        """See :class:`flame.sdk.backends.base.Sink`."""
        with self.condition:
            gone = self.present.pop(end, None)
            if gone is None:
                return
            self.reasons[end] = reason
            if reason != LEFT:
                self.lost[end] = time.monotonic()
            if gone.queue:
                self._left[end] = gone
            self._answer(end)

    def on_frames(
        self, end: str, data: memoryview | bytearray | bytes, release: Callable[[], None] | None = None
    ) -> None:
        """See :class:`flame.sdk.backends.base.Sink`."""
        with self.condition:
            known = self.present.get(end) or self._left.get(end)
            if known is not None and not self._closed:
                self._seq += 1
                known.queue.append(Arrival(self._seq, data, release))
                self._answer(end)
                return
        if release is not None:
            release()

    # What the channel calls.

    @contextmanager
    def waiting(self, ends: Collection[str], visits: Mapping[str, int] | None = None) -> Iterator[Wait]:
        """Register a wait for one message (or the leaving) of each of ``ends``.

        :param visits: by end, the visit whose messages are waited for: who has come anew since then has left, to whoever waits.
        """
        wait = Wait(ends)
        with self.condition:
            here = [(self._find(end).queue[0].seq, end) for end in wait.pending if self._queued(end)]
            gone = sorted(end for end in wait.pending if not self._queued(end) and self._has_left(end, visits or {}))
            wait.ready.extend(end for _, end in sorted(here))
            wait.ready.extend(gone)
            wait.pending.difference_update(wait.ready)
            self._waits.append(wait)
        try:
            yield wait
        finally:
            with self.condition:
                self._waits.remove(wait)

    def take(self, wait: Wait, deadline: float | None) -> tuple[str, Arrival | None] | None:
        """The next of the ends that are waited for, and its message.

        :param deadline: by :func:`time.monotonic`; None waits as long as it takes.
        :returns: the end, and what arrived, or None in its place when the end has left; None at the deadline.
        """
        with self.condition:
            if not wait.ready and wait.pending:
                self._blocked.append(wait)
                self._tell_wanted()
                try:
                    while not wait.ready:
                        left = None if deadline is None else deadline - time.monotonic()
                        if left is not None and left <= 0:
                            return None
                        self.condition.wait(left)
                finally:
                    self._blocked.remove(wait)
                    self._tell_wanted()
            if not wait.ready:
                return None
            end = wait.ready.popleft()
            return end, self._pop(end)

    def peek(self, end: str) -> Arrival | None:
        """The next message of an end, left where it is; None when there is none."""
        with self.condition:
            return self._find(end).queue[0] if self._queued(end) else None

    def drain(self, ends: Collection[str] | None = None) -> int:
        """Drop what has arrived and was not taken, of all ends or some; returns how many messages."""
        dropped: list[Arrival] = []
        with self.condition:
            for end in [*self.present, *self._left] if ends is None else ends:
                while self._queued(end):
                    arrival = self._pop(end)
                    if arrival is not None:
                        dropped.append(arrival)
        for arrival in dropped:
            arrival.drop()
        return len(dropped)

    def empty(self, end: str) -> bool:
        """True when no message of ``end`` waits to be taken."""
        with self.condition:
            return not self._queued(end)

    def heard(self) -> list[str]:
        """The ends, also those that have left, of which a message waits to be taken."""
        with self.condition:
            return [end for end in [*self.present, *self._left] if self._queued(end)]

    def close(self, reason: str) -> None:
        """All ends are gone, and nothing is taken in any more; whoever waits is told."""
        for end in list(self.present):
            self.on_leave(end, reason)
        with self.condition:
            self._closed = True
        self.drain()

    def open(self) -> None:
        """Take messages in (again)."""
        with self.condition:
            self._closed = False

    def _answer(self, end: str) -> None:
        """There is news of an end: whoever waits for it need not wait on."""
        for wait in self._waits:
            if end in wait.pending:
                wait.pending.discard(end)
                wait.ready.append(end)
        if self._blocked:
            self._tell_wanted()
        self.condition.notify_all()

    def _tell_wanted(self) -> None:
        wanted = [wait.pending for wait in self._blocked if not wait.ready]
        self._on_want(wanted[0] if len(wanted) == 1 else set().union(*wanted))

    def _find(self, end: str) -> End:
        return self.present.get(end) or self._left[end]

    def _has_left(self, end: str, visits: Mapping[str, int]) -> bool:
        here = self.visits.get(end, 0)
        return end not in self.present or here != visits.get(end, here)

    def _queued(self, end: str) -> bool:
        known = self.present.get(end) or self._left.get(end)
        return known is not None and bool(known.queue)

    def _pop(self, end: str) -> Arrival | None:
        if not self._queued(end):
            return None
        known = self._find(end)
        arrival = known.queue.popleft()
        if not known.queue:
            self._left.pop(end, None)
        return arrival
