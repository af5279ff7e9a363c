"""Publish events, and follow them from any number on, without polling and without a gap.

The store is the truth, the notifier only says that there is more of it. An event is stored first and
handed to the followers after that, so a follower that was told of an event can be killed, come back with the last number it
saw, and miss nothing. A follower keeps the number of its last event; whatever it is handed is checked
against that number. One too low is a repetition and dropped, one too high means that something is missing
here, which is then read from the store. That check alone makes the order of things harmless: events handed over while
the follower reads, appends that finish out of order, a follower so slow that its hand-over list was
thrown away. It also bounds memory: a slow follower costs a short list, and a follower with
nothing to do costs one entry in a set and a future.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from flame.spec.records import Event
from flame.store import Store

Until = Callable[[Event], bool]


class _Follower:
    """What is handed over to one follower and not yet taken."""

    __slots__ = ("ended", "handed", "known", "wake")

    def __init__(self) -> None:
        self.handed: deque[Event] = deque()
        self.known = 0  # the highest number heard of, also of events that were thrown away
        self.ended = False
        self.wake: asyncio.Future[None] | None = None

    def hand(self, events: Sequence[Event], backlog: int) -> None:
        if len(self.handed) + len(events) <= backlog:
            self.handed.extend(events)
        else:
            self.handed.clear()
        self.known = max(self.known, events[-1].seq)
        self.rouse()

    def end(self) -> None:
        self.ended = True
        self.rouse()

    def rouse(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    async def wait(self) -> None:
        self.wake = asyncio.get_running_loop().create_future()
        try:
            await self.wake
        finally:
            self.wake = None

    def take(self, after: int) -> list[Event]:
        """What follows directly on number ``after`` of what was handed over; the rest stays."""
        taken: list[Event] = []
        while self.handed and self.handed[0].seq <= after + 1:
            event = self.handed.popleft()
            if event.seq == after + 1:
                taken.append(event)
                after += 1
        return taken


class Notifier:
    """The event streams of a server. Belongs to one event loop.

    :param store: where the events are kept.
    :param backlog: most events held in memory for a follower that is slower than its stream.
    :param page: most events read from the store at once.
    """

    def __init__(self, store: Store, *, backlog: int = 256, page: int = 500) -> None:
        self._store = store
        self._backlog = backlog
        self._page = page
        self._streams: dict[str, set[_Follower]] = {}
        self._closed = False

    async def publish(self, stream: str, type: str, data: dict[str, Any]) -> Event:
        """Store an event at the end of a stream, then tell those who follow it.

        :returns: the event with its number and time.
        :raises flame.errors.StoreError: it was not stored; nobody was told.
        """
        return (await self.publish_many(stream, [(type, data)]))[0]

    async def publish_many(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        """Store several events ``(type, data)`` in this order with nothing between them, then tell those who follow."""
        if not entries:
            return []
        # A task of its own: when the caller is cancelled, the events are stored all the same, so they are told too.
        return await asyncio.shield(asyncio.ensure_future(self._append(stream, entries)))

    async def _append(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        events = await self._store.append(stream, entries)
        for follower in self._streams.get(stream, ()):
            follower.hand(events, self._backlog)
        return events

    async def follow(self, stream: str, after: int = 0, until: Until | None = None) -> AsyncGenerator[Event, None]:
        """The events of a stream with a number above ``after``: those that are stored, then each as it is published.

        The iteration ends after an event for which ``until`` is true, when the stream is dropped and when
        the notifier is closed. Whoever leaves it earlier closes it (:func:`contextlib.aclosing`), or is
        cancelled, which does the same.

        :param after: the number of the last event that the caller has; 0 for none.
        :param until: says whether an event is the last one wanted.
        """
        async with aclosing(self.batches(stream, after, until)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def batches(
        self, stream: str, after: int = 0, until: Until | None = None
    ) -> AsyncGenerator[Sequence[Event], None]:
        """As :meth:`follow`, but gives all events that are there together, for callers that pass them on in one write."""
        follower = _Follower()
        followers = self._streams.setdefault(stream, set())
        followers.add(follower)
        follower.ended = self._closed
        behind = True
        try:
            while not follower.ended:
                if behind:
                    follower.known = 0  # what becomes known during the read counts again
                    events = await self._store.read(stream, after=after, limit=self._page)
                    behind = len(events) == self._page
                else:
                    events = follower.take(after)
                    if not events:
                        behind = follower.known > after
                        if not behind:
                            await follower.wait()
                        continue
                if not events:
                    continue
                last = next((index for index, event in enumerate(events) if until and until(event)), None)
                if last is not None:
                    yield events[: last + 1]
                    return
                after = events[-1].seq
                yield events
        finally:
            followers.discard(follower)
            if not followers and self._streams.get(stream) is followers:
                del self._streams[stream]

    async def drop(self, stream: str) -> None:
        """Remove a stream with its events from the store; those who follow it come to their end."""
        await self._store.drop(stream)
        for follower in self._streams.get(stream, ()):
            follower.end()

    def close(self) -> None:
        """End all followers. Publishing goes on to reach the store."""
        self._closed = True
        for followers in self._streams.values():
            for follower in followers:
                follower.end()
