"""Receiving messages through a broker that may lose, repeat or delay them: each is delivered once, in order.

The counterpart of :mod:`flame.sdk.backends.mqtt_send`, and as free of threads, clocks and sockets. A receiver decides
how much is on its way to it: a large message is let in only while there is room for it (``window``, in bytes), and
then a number of chunks at a time, which shrinks when chunks were lost (the broker's queue for this client is then
shorter than expected) and grows again message by message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from flame.sdk.backends.mqtt_send import EAGER, Put
from flame.sdk.backends.mqtt_wire import Ack, Chunk, Offer, Small, Status

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Chunks on the way to one receiver: of one message, and of all together. The broker's queue for a client holds 1000
#: messages where nobody says otherwise.
CHUNKS_OF_ONE = 32
CHUNKS_OF_ALL = 96
#: At least so many may be on their way, whatever is lost.
CHUNKS_LEAST = 2


class Incoming:
    """A large message that is on its way.

    :ivar buffer: where it is put together; None until it is let in.
    :ivar top: the first chunk after all that have been seen.
    :ivar next: the first chunk that is not there.
    """

    def __init__(self, said: Offer) -> None:
        self.transfer = said.transfer
        self.nbytes = said.nbytes
        self.chunk = said.chunk
        self.count = -(-said.nbytes // said.chunk)
        self.topic = ""
        self.buffer: npt.NDArray[np.uint8] | None = None
        self.have = bytearray()
        self.next = 0
        self.top = 0
        self.unsaid = 0  # chunks since the last status
        self.cut = 0  # losses below this chunk have been answered for

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """The ranges of chunks between two that are not there."""
        ranges = []
        start = self.have.find(0, first, last)
        while start != -1:
            stop = self.have.find(1, start, last)
            stop = last if stop == -1 else stop
            ranges.append((start, stop))
            start = self.have.find(0, stop, last)
        return ranges


class Source:
    """What comes from one life of one end."""

    def __init__(self, end: str, epoch: int) -> None:
        self.end = end
        self.epoch = epoch
        self.next = 0
        self.incoming: Incoming | None = None
        self.parked: deque[bytes] = deque()  # small messages for which there is no room yet


class Intake:
    """Everything that this worker receives on one channel's group.

    :param me: this worker's end.
    :param epoch: its nonce.
    :param window: bytes of messages that may be held; one message is always let in.
    :param put: publishes (to an inbox).
    :param deliver: takes a whole message: end, data; :meth:`released` is to be called for it.
    :param subscribe: listen to a SET topic of an end; :meth:`subscribed` is to be called when that is in force.
    """

    def __init__(
        self,
        me: str,
        epoch: int,
        *,
        window: int,
        put: Put,
        deliver: Callable[[str, memoryview | bytes], None],
        subscribe: Callable[[str, str], None],
    ) -> None:
        self._me = me
        self._epoch = epoch
        self._window = window
        self._put = put
        self._deliver = deliver
        self._subscribe = subscribe
        self._sources: dict[str, Source] = {}
        self._waiting: deque[tuple[Source, Incoming]] = deque()
        self._active: set[Incoming] = set()
        self._held = 0  # bytes of messages that are let in and not released
        self._wanted: Collection[str] = ()
        self._chunks = float(CHUNKS_OF_ONE)

    def meet(self, end: str, epoch: int) -> None:
        """``end`` is there, in that life."""
        source = self._sources.get(end)
        if source is None or source.epoch != epoch:
            self.part(end)
            self._sources[end] = Source(end, epoch)

    def part(self, end: str) -> None:
        """``end`` is gone: what is on its way from it is dropped. Its numbers are kept, should it come back."""
        source = self._sources.get(end)
        if source is not None:
            self._drop(source)
            source.parked.clear()
            self._let_in()

    def on_small(self, said: Small, body: memoryview) -> None:
        """A whole message has come."""
        source = self._source(said)
        if source is None:
            return
        self._skip(source, said.base)
        expected = source.next + len(source.parked)
        if said.seq < source.next:
            self._ack(source)
        elif said.seq == expected and len(source.parked) < EAGER:
            source.parked.append(bytes(body))
            self._unpark(source)
        # A later one means that one was lost, and all from there on are sent again.

    def on_offer(self, said: Offer) -> None:
        """A large message is offered, or its sender asks how far we are."""
        source = self._source(said)
        if source is None:
            return
        self._skip(source, said.base)
        if said.seq < source.next:
            self._ack(source)
        if said.seq != source.next:
            return
        incoming = source.incoming
        if incoming is None or incoming.transfer != said.transfer:
            self._drop(source)
            incoming = source.incoming = Incoming(said)
            self._waiting.append((source, incoming))
            self._let_in()
        if said.topic and said.topic != incoming.topic:
            self._subscribe(source.end, said.topic)
            return  # the status follows when the topic is heard
        lost = incoming.missing(0, min(said.cursor, incoming.count)) if incoming.buffer is not None else []
        if lost:
            self._slow_down(incoming)
        self._status(source, incoming, lost)

    def subscribed(self, end: str, topic: str) -> None:
        """A SET topic is listened to now."""
        source = self._sources.get(end)
        if source is not None and source.incoming is not None:
            source.incoming.topic = topic
            self._status(source, source.incoming)

    def on_chunk(self, said: Chunk, body: memoryview) -> None:
        """A piece of a large message has come."""
        source = self._sources.get(said.src)
        if source is None or source.epoch != said.epoch:
            return
        incoming = source.incoming
        if incoming is None or incoming.buffer is None or incoming.transfer != said.transfer:
            return
        index, start = said.index, said.index * incoming.chunk
        if index >= incoming.count or len(body) != min(incoming.chunk, incoming.nbytes - start) or incoming.have[index]:
            return
        incoming.buffer.data[start : start + len(body)] = body
        incoming.have[index] = 1
        gaps: list[tuple[int, int]] = []
        if index >= incoming.top:
            gaps = incoming.missing(incoming.top, index)
            incoming.top = index + 1
        while incoming.next < incoming.count and incoming.have[incoming.next]:
            incoming.next += 1
        incoming.unsaid += 1
        if incoming.next == incoming.count:
            self._complete(source, incoming)
        elif gaps:
            self._slow_down(incoming)
            self._status(source, incoming, gaps)
        elif incoming.unsaid * 4 >= self._chunks_each():
            self._status(source, incoming)

    def released(self, nbytes: int) -> None:
        """A delivered message is not used any more."""
        self._held -= nbytes
        self._let_in()

    def want(self, ends: Collection[str]) -> None:
        """Someone waits for these ends: let their next message in even when the window is full."""
        self._wanted = ends
        if ends:
            self._let_in()

    def _source(self, said: Small | Offer) -> Source | None:
        source = self._sources.get(said.src)
        return source if source is not None and (source.epoch, self._epoch) == (said.epoch, said.to) else None

    def _skip(self, source: Source, base: int) -> None:
        """The sender has given up on what is below ``base``."""
        if base > source.next:
            self._drop(source)
            for _ in range(min(base - source.next, len(source.parked))):
                source.parked.popleft()
            source.next = base

    def _drop(self, source: Source) -> None:
        incoming, source.incoming = source.incoming, None
        if incoming is not None and incoming in self._active:
            self._active.discard(incoming)
            self._held -= incoming.nbytes

    def _room(self, source: Source, nbytes: int) -> bool:
        return self._held == 0 or self._held + nbytes <= self._window or source.end in self._wanted

    def _let_in(self) -> None:
        """Use the room that there is, in the order in which messages were offered."""
        for source in self._sources.values():
            if source.parked:
                self._unpark(source)
        waiting, self._waiting = self._waiting, deque()
        for source, incoming in waiting:
            if source.incoming is not incoming:
                continue  # given up meanwhile
            if self._room(source, incoming.nbytes):
                self._begin(source, incoming)
            else:
                self._waiting.append((source, incoming))

    def _begin(self, source: Source, incoming: Incoming) -> None:
        import numpy as np

        try:
            # Not a bytearray: that would be filled with zeros first.
            incoming.buffer = np.empty(incoming.nbytes, np.uint8)
            incoming.have = bytearray(incoming.count)
        except (MemoryError, ValueError):
            source.incoming = None
            self._say(source, Status(self._me, self._epoch, source.epoch, incoming.transfer, "", 0, -1))
            return
        self._held += incoming.nbytes
        self._active.add(incoming)
        self._status(source, incoming)

    def _unpark(self, source: Source) -> None:
        while source.parked and self._room(source, len(source.parked[0])):
            data = source.parked.popleft()
            source.next += 1
            self._held += len(data)
            self._deliver(source.end, data)
            self._ack(source)

    def _complete(self, source: Source, incoming: Incoming) -> None:
        source.incoming = None
        self._active.discard(incoming)
        source.next += 1
        if not incoming.cut:
            self._chunks = min(CHUNKS_OF_ONE, self._chunks + 1)
        if incoming.buffer is not None:
            self._deliver(source.end, incoming.buffer.data)
        self._ack(source)

    def _slow_down(self, incoming: Incoming) -> None:
        """Chunks were lost: let half as many be on their way, once for what was on its way then."""
        if incoming.top >= incoming.cut:
            self._chunks = max(CHUNKS_LEAST, self._chunks / 2)
            incoming.cut = incoming.top + self._chunks_each()

    def _chunks_each(self) -> int:
        return max(CHUNKS_LEAST, min(int(self._chunks), CHUNKS_OF_ALL // max(1, len(self._active))))

    def _ack(self, source: Source) -> None:
        self._say(source, Ack(self._me, self._epoch, source.epoch, source.next))

    def _status(self, source: Source, incoming: Incoming, missing: list[tuple[int, int]] | None = None) -> None:
        limit = 0
        if incoming.buffer is not None:
            limit = min(incoming.count, incoming.next + self._chunks_each())
            incoming.unsaid = 0
        said = Status(
            self._me,
            self._epoch,
            source.epoch,
            incoming.transfer,
            incoming.topic,
            incoming.next,
            limit,
            missing or [],
        )
        self._say(source, said)

    def _say(self, source: Source, said: Ack | Status) -> None:
        self._put("", source.end, said, ())
