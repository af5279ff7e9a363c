"""Sending messages through a broker that may lose them: what is sent, when it is sent again, and who holds up whom.

A broker is no safe place: it drops what exceeds a client's queue, and forgets everything when it is killed without
persistence. So each message stays with its sender until the *receiver* has acknowledged it. Small messages go out at
once, a few ahead of their acknowledgements. A large one is offered first, goes out in chunks as far as its receivers
allow (so that the broker's queues stay short however many senders there are), and lost chunks are sent again.

A message for several ends is published once, on a topic that they all listen to, at the pace of the slowest.
One that falls behind by more than :data:`LAG_SECONDS` is taken out and served by itself.

This module only decides: it is told the time and what arrives, and says what to publish. No thread, clock or socket
is in it, so that tests can drive it through any order of events.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from flame.sdk.backends.mqtt_wire import Ack, Chunk, Offer, Said, Small, Status, set_name

#: How many small messages to one end may be unacknowledged.
EAGER = 16
#: A receiver that keeps others waiting for so long is served by itself.
LAG_SECONDS = 1.0
#: How long to wait for a sign of progress before asking, at first and at most.
RETRY_SECONDS = (1.0, 8.0)

#: Called with the SET topic (empty for an inbox), the end (empty for a SET topic), what to say and its body.
Put = Callable[[str, str, Said, Sequence[memoryview]], None]


class Sending:
    """One message on its way to some ends.

    :param parts: its bytes, in pieces; not copied, so they must not change before ``on_done``.
    :param chunk: the length of a chunk.
    :param small: send it whole, at once.
    :param on_done: called once no end is waited for any more.
    :ivar failures: the ends that it did not reach, each with the reason.
    """

    def __init__(self, parts: Sequence[memoryview], chunk: int, small: bool, on_done: Callable[[], None]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = [0, *itertools.accumulate(len(part) for part in self.parts)]
        self.nbytes = self.starts[-1]
        self.small = small
        self.cut(chunk)
        self.number = 0
        self.failures: dict[str, str] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.lanes: list[Lane] = []
        self.on_done = on_done

    def cut(self, chunk: int) -> None:
        """Cut it into pieces of ``chunk`` bytes."""
        self.chunk = chunk
        self.count = -(-self.nbytes // chunk)

    def piece(self, index: int) -> list[memoryview]:
        """The bytes of a chunk, as views."""
        position, end = index * self.chunk, min((index + 1) * self.chunk, self.nbytes)
        part = bisect.bisect_right(self.starts, position) - 1
        views = []
        while position < end:
            stop = min(end, self.starts[part + 1])
            views.append(self.parts[part][position - self.starts[part] : stop - self.starts[part]])
            position, part = stop, part + 1
        return views

    def finished(self, delivery: Delivery) -> None:
        """An end has the message, or will not get it."""
        if self.deliveries.pop(delivery.flow.end, None) is None:
            return
        for lane in self.lanes:
            if delivery in lane.members:
                lane.members.remove(delivery)
        self.lanes = [lane for lane in self.lanes if lane.members]
        if not self.deliveries:
            self.on_done()


class Flow:
    """The messages for one life of one end, in order."""

    def __init__(self, end: str, epoch: int) -> None:
        self.end = end
        self.epoch = epoch
        self.present = True
        self.next_seq = 0
        self.queue: deque[Delivery] = deque()
        self.retry_at = 0.0
        self.patience = RETRY_SECONDS[0]

    def progress(self, now: float) -> None:
        """The end gave a sign of progress."""
        self.patience = RETRY_SECONDS[0]
        self.retry_at = now + self.patience


class Delivery:
    """One message for one end."""

    def __init__(self, sending: Sending, flow: Flow) -> None:
        self.sending = sending
        self.flow = flow
        self.seq = flow.next_seq
        self.reset()

    def reset(self) -> None:
        """Nothing of it has been sent."""
        self.published = False  # a small one was sent at least once
        self.lane: Lane | None = None
        self.ready = False  # listens to its lane's topic
        self.next = 0
        self.limit = 0
        self.repairs: dict[int, None] = {}  # chunks to send again, an ordered set


class Lane:
    """Receivers that get a large message's chunks together.

    :ivar cursor: the next chunk to publish.
    :ivar held_since: since when some of them keep others waiting.
    """

    def __init__(self, members: list[Delivery], cursor: int) -> None:
        self.members = members
        self.topic = set_name([each.flow.end for each in members]) if len(members) > 1 else ""
        self.cursor = cursor
        self.held_since: float | None = None

    def holding(self) -> list[Delivery]:
        """The members for whom the next chunk has to wait."""
        return [each for each in self.members if not each.ready or each.limit <= self.cursor]


class Outbox:
    """Everything that this worker sends on one channel's group.

    :param me: this worker's end.
    :param epoch: its nonce.
    :param put: publishes.
    """

    def __init__(self, me: str, epoch: int, put: Put) -> None:
        self._me = me
        self._epoch = epoch
        self._put = put
        self._flows: dict[str, Flow] = {}
        self._dirty: set[Flow] = set()  # their queues may have something to send
        self._streaming: list[Sending] = []
        self._numbers = itertools.count(1)

    @property
    def idle(self) -> bool:
        """True when everything is delivered, or given up."""
        return not any(flow.queue for flow in self._flows.values())

    def meet(self, end: str, epoch: int) -> None:
        """``end`` is there, in that life; what was for an earlier one fails."""
        flow = self._flows.get(end)
        if flow is None or flow.epoch != epoch:
            self.part(end, "was started anew")
            self._flows[end] = Flow(end, epoch)
        else:
            flow.present = True

    def part(self, end: str, reason: str) -> None:
        """``end`` is gone: nothing more is sent to it."""
        flow = self._flows.get(end)
        if flow is None:
            return
        flow.present = False
        for delivery in list(flow.queue):
            self._fail(delivery, reason)

    def submit(self, sending: Sending, ends: Sequence[str], now: float) -> None:
        """Begin to send; :meth:`pump` then publishes."""
        sending.number = next(self._numbers)
        free = []
        for end in ends:
            flow = self._flows.get(end)
            if flow is None or not flow.present:
                sending.failures[end] = "is not there"
                continue
            delivery = sending.deliveries[end] = Delivery(sending, flow)
            flow.next_seq += 1
            if not flow.queue:
                free.append(delivery)
                flow.progress(now)
            flow.queue.append(delivery)
            self._dirty.add(flow)
        if not sending.deliveries:
            sending.on_done()
        elif not sending.small:
            self._streaming.append(sending)
            if free:
                # Who is busy with an earlier message gets a lane of its own when that is done.
                self._open_lane(sending, free, 0)

    def cut_smaller(self, chunk: int, now: float) -> None:
        """The broker takes no packets as large as the ones that are on their way: begin those messages anew."""
        sendings = {id(each.sending): each.sending for flow in self._flows.values() for each in flow.queue}
        for sending in sendings.values():
            if min(sending.chunk, sending.nbytes) <= chunk:
                continue
            sending.number = next(self._numbers)  # what is left of the old pieces is not taken for new ones
            sending.cut(chunk)
            sending.lanes.clear()
            if sending.small:
                sending.small = False
                self._streaming.append(sending)
            first = []
            for delivery in sending.deliveries.values():
                delivery.reset()
                if delivery.flow.queue[0] is delivery:
                    first.append(delivery)
            if first:
                self._open_lane(sending, first, 0)

    def cancel(self, sending: Sending, reason: str) -> None:
        """Give up on the ends that do not have the message yet."""
        for delivery in list(sending.deliveries.values()):
            self._fail(delivery, reason)

    def on_ack(self, end: str, said: Ack, now: float) -> None:
        """An end has delivered all below a number."""
        flow = self._flow(end, said)
        if flow is None:
            return
        while flow.queue and flow.queue[0].seq < said.next:
            delivery = flow.queue.popleft()
            flow.progress(now)
            self._dirty.add(flow)
            delivery.sending.finished(delivery)

    def on_status(self, end: str, said: Status, now: float) -> None:
        """An end says how far it is with a large message."""
        flow = self._flow(end, said)
        if flow is None or not flow.queue:
            return
        delivery = flow.queue[0]
        sending = delivery.sending
        if sending.small or sending.number != said.transfer or delivery.lane is None:
            return
        if said.limit < 0:
            self._fail(delivery, f"cannot take a message of {sending.nbytes} bytes")
            return
        if said.next > delivery.next or said.limit > delivery.limit:
            flow.progress(now)
        delivery.ready = delivery.ready or delivery.lane.topic in ("", said.topic)
        delivery.next = max(delivery.next, said.next)
        delivery.limit = max(delivery.limit, min(said.limit, sending.count))
        for first, last in said.missing:
            for index in range(first, min(last, delivery.lane.cursor)):
                delivery.repairs[index] = None

    def reconnected(self, now: float) -> None:
        """The connection was lost and is back: whatever was on its way may be lost, so ask or send again at once."""
        for flow in self._flows.values():
            flow.patience = RETRY_SECONDS[0]
            flow.retry_at = now

    def pump(self, now: float, room: int) -> int:
        """Publish what may be published now.

        :param room: how many chunks may be published at most.
        :returns: what is left of ``room``.
        """
        for flow in self._flows.values():
            if flow.queue and flow.retry_at <= now:
                self._retry(flow, now)
        while self._dirty:
            self._advance(self._dirty.pop(), now)
        self._streaming = [sending for sending in self._streaming if sending.deliveries]
        lanes = [(sending, lane) for sending in self._streaming for lane in sending.lanes]
        # In turns, one chunk each, so that no receiver waits for another one's message.
        while lanes and room > 0:
            going = []
            for sending, lane in lanes:
                if room > 0 and self._step(sending, lane, now):
                    room -= 1
                    going.append((sending, lane))
            lanes = going
        return room

    def deadline(self) -> float | None:
        """When :meth:`pump` has to be called even if nothing happens."""
        times = [flow.retry_at for flow in self._flows.values() if flow.queue]
        times += [
            lane.held_since + LAG_SECONDS
            for sending in self._streaming
            for lane in sending.lanes
            if lane.held_since is not None and len(lane.members) > 1
        ]
        return min(times, default=None)

    def _flow(self, end: str, said: Ack | Status) -> Flow | None:
        flow = self._flows.get(end)
        return flow if flow is not None and (flow.epoch, self._epoch) == (said.epoch, said.to) else None

    def _fail(self, delivery: Delivery, reason: str) -> None:
        flow = delivery.flow
        if delivery in flow.queue:
            flow.queue.remove(delivery)
            self._dirty.add(flow)
        if flow.end in delivery.sending.deliveries:
            delivery.sending.failures[flow.end] = reason
        delivery.sending.finished(delivery)

    def _advance(self, flow: Flow, now: float) -> None:
        """Send small messages ahead; begin with a large one when it is the first in the queue."""
        for place, delivery in enumerate(itertools.islice(flow.queue, EAGER)):
            if not delivery.sending.small:
                if place == 0 and delivery.lane is None:
                    flow.progress(now)
                    self._open_lane(delivery.sending, [delivery], 0)
                return
            if not delivery.published:
                if place == 0:
                    flow.progress(now)
                self._put_small(delivery)

    def _retry(self, flow: Flow, now: float) -> None:
        flow.retry_at = now + flow.patience
        flow.patience = min(flow.patience * 2, RETRY_SECONDS[1])
        for delivery in itertools.islice(flow.queue, EAGER):
            if not delivery.sending.small:
                if delivery.lane is not None:
                    self._put_offer(delivery, delivery.lane)
                return
            if delivery.published:
                self._put_small(delivery)

    def _open_lane(self, sending: Sending, members: list[Delivery], cursor: int) -> None:
        lane = Lane(members, cursor)
        sending.lanes.append(lane)
        for delivery in members:
            delivery.lane = lane
            # An inbox is always listened to; a shared topic has to be confirmed.
            delivery.ready = not lane.topic
            self._put_offer(delivery, lane)

    def _step(self, sending: Sending, lane: Lane, now: float) -> bool:
        """Publish one chunk of a lane, if one may go."""
        for delivery in lane.members:
            if delivery.repairs:
                index = next(iter(delivery.repairs))
                del delivery.repairs[index]
                self._put_chunk("", delivery.flow.end, sending, index)
                return True
        if lane.cursor >= sending.count:
            return False
        holding = lane.holding()
        if not holding:
            lane.held_since = None
            topic, end = (lane.topic, "") if lane.topic else ("", lane.members[0].flow.end)
            self._put_chunk(topic, end, sending, lane.cursor)
            lane.cursor += 1
            return True
        if len(holding) == len(lane.members):
            lane.held_since = None
        elif lane.held_since is None:
            lane.held_since = now
        elif now - lane.held_since >= LAG_SECONDS:
            self._split(sending, lane, holding)
        return False

    def _split(self, sending: Sending, lane: Lane, slow: list[Delivery]) -> None:
        """Take the slow ones out. What the lane has published is on its way to them; they go on from there."""
        sending.lanes.remove(lane)
        for delivery in slow:
            self._open_lane(sending, [delivery], lane.cursor)
        self._open_lane(sending, [each for each in lane.members if each not in slow], lane.cursor)

    def _put_small(self, delivery: Delivery) -> None:
        flow = delivery.flow
        delivery.published = True
        said = Small(self._me, self._epoch, flow.epoch, delivery.seq, flow.queue[0].seq)
        self._put("", flow.end, said, delivery.sending.parts)

    def _put_offer(self, delivery: Delivery, lane: Lane) -> None:
        flow, sending = delivery.flow, delivery.sending
        said = Offer(
            self._me,
            self._epoch,
            flow.epoch,
            delivery.seq,
            flow.queue[0].seq,
            sending.number,
            sending.nbytes,
            sending.chunk,
            lane.topic,
            lane.cursor,
        )
        self._put("", flow.end, said, ())

    def _put_chunk(self, topic: str, end: str, sending: Sending, index: int) -> None:
        self._put(topic, end, Chunk(self._me, self._epoch, sending.number, index), sending.piece(index))
