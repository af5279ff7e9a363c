"""Messages through an MQTT broker: for workers that can reach nothing but a broker.

What a broker gives (MQTT 5): connections that only workers open, topics with access lists, retained messages and last
wills, from which presence is made. What it does not give is that a message arrives: queues overflow, and a broker
that is killed forgets. So delivery is Flame's own, between the workers (:mod:`flame.sdk.backends.mqtt_send` and
:mod:`flame.sdk.backends.mqtt_receive`), and the broker may be killed and started again in the middle of a model.

A model for several ends is published once, on a topic that exactly these ends subscribe to, and the broker fans it out:
a topic for the whole group would send every message to everyone, and the inboxes would take it once for each end.

Threads: paho's own, which only moves bytes, and one that runs the protocol. Everything that happens is put into a
queue as a call and done there one after the other, so the protocol needs no locks. The queue is a ``SimpleQueue``,
which may be used from a finalizer: that is where messages are released.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from flame.errors import BackendError
from flame.sdk.backends.base import Backend, BackendContext, Frames, Sink
from flame.sdk.backends.mqtt_client import Settings
from flame.sdk.backends.mqtt_line import Line
from flame.sdk.backends.mqtt_receive import Intake
from flame.sdk.backends.mqtt_roster import LOST_SECONDS, Peer, Roster
from flame.sdk.backends.mqtt_send import Outbox, Sending
from flame.sdk.backends.mqtt_wire import (
    LAST_BEAT,
    Ack,
    Chunk,
    Epoch,
    Offer,
    Ping,
    Presence,
    Said,
    Seal,
    Small,
    Status,
    Topics,
    presence_topic,
)

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
#: A message up to this size is copied and sent at once, with no offer before it.
SMALL_BYTES = 64 * 1024
#: Small messages to one end that may be behind before :meth:`MqttBackend.send` waits.
BACKLOG = 64
#: Subscriptions to topics of sets of receivers that are kept; selectors may choose another set each round.
SHARED_TOPICS = 64
#: How many calls may be made before what follows from them is done.
BATCH = 32
FLUSH_SECONDS = 10.0
GOODBYE_SECONDS = 2.0

Place = tuple[str, str]  # channel, group


class Seat:
    """This worker's part in one channel's group."""

    def __init__(self, place: Place, sink: Sink, topics: Topics) -> None:
        self.place = place
        self.sink = sink
        self.topics = topics
        self.present: dict[str, Peer] = {}
        self.behind = 0  # small messages that are not delivered yet
        self.flushed: threading.Event | None = None
        self.outbox: Outbox
        self.intake: Intake


class MqttBackend(Backend):
    """Carries messages through the broker in the configuration's ``brokers`` (sort ``mqtt``).

    Credentials and TLS files come from the environment; see :class:`flame.sdk.backends.mqtt_client.Settings`.

    :raises flame.errors.SpecError: there is no broker in the configuration, or its address is none.
    """

    sort: ClassVar[str] = "mqtt"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        if context.broker is None:
            raise BackendError("The mqtt backend needs a broker: add {sort: mqtt, host: HOST:PORT} to brokers.")
        self._settings = Settings(context.broker, context.options)
        self._me = context.me.end
        self._epoch = Epoch(context.me.attempt, time.time_ns(), secrets.randbits(62))
        self._seal = Seal(context.key)
        self._presence = presence_topic(context.job, self._me)
        lost_seconds = float(context.options.get("mqtt_lost_seconds", LOST_SECONDS))
        self._roster = Roster(self._peer_joined, self._peer_left, lost_seconds)
        self._seats: dict[Place, Seat] = {}
        self._inboxes: dict[str, Seat] = {}
        self._shared: OrderedDict[str, Seat] = OrderedDict()
        self._confirmed: set[str] = set()  # shared topics that the broker sends us
        self._line: Line | None = None
        self._starting = threading.Lock()
        self._beat = 0
        self._chunk = int(context.options.get("mqtt_chunk_bytes", CHUNK_BYTES))
        self._failed: str | None = None
        self._mourned = 0  # the last of this worker's own connections whose will was heard
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[object, ...]]] = queue.SimpleQueue()
        self._running = True
        self._thread = threading.Thread(target=self._run, name="flame-mqtt", daemon=True)

    # Called from the worker's threads.

    def join(self, channel: str, group: str, sink: Sink) -> None:
        """See the base class. Connects on the first call, trying for ten seconds."""
        with self._starting:
            if not self._running:
                raise BackendError("This worker has closed its mqtt backend; make a new one.")
            if self._line is None:
                self._start()
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._post(self._join, (channel, group), sink, answer)
        try:
            refusal = answer.get(timeout=FLUSH_SECONDS)
        except queue.Empty:
            refusal = "it does not answer"
        if refusal is not None:
            where = f"{self._settings.host}:{self._settings.port}"
            raise BackendError(f"The MQTT broker at {where} does not let this worker use channel {channel}: {refusal}.")

    def leave(self, channel: str, group: str) -> None:
        """See the base class. Waits ten seconds at most for ends that do not take what was sent to them."""
        seat = self._seats.get((channel, group))
        if seat is None or self._line is None:
            return
        if self._failed is None:
            seat.flushed = threading.Event()
            self._post(self._turn)
            seat.flushed.wait(FLUSH_SECONDS)
        done = threading.Event()
        self._post(self._leave, seat, done)
        done.wait(GOODBYE_SECONDS)

    def send(
        self, channel: str, group: str, ends: Sequence[str], frames: Frames, timeout: float | None
    ) -> dict[str, str]:
        """See the base class. A large message is waited for until the ends have it; a small one is copied."""
        seat = self._seats.get((channel, group))
        if seat is None or self._failed is not None:
            return dict.fromkeys(ends, self._failed or "is not there")
        done = threading.Event()
        chunk = self._line.chunk if self._line is not None else self._chunk
        parts = [memoryview(frames.head), *frames.buffers]
        small = frames.nbytes <= min(SMALL_BYTES, chunk)
        if small:
            parts = [memoryview(b"".join(parts))]
            seat.behind += 1

            def finished() -> None:
                seat.behind -= 1
                done.set()

            sending = Sending(parts, chunk, small, finished)
        else:
            sending = Sending(parts, chunk, small, done.set)
        self._post(self._submit, seat, sending, list(ends))
        if small and seat.behind <= BACKLOG:
            return {end: "is not there" for end in ends if end not in seat.present}
        if not done.wait(timeout):
            self._post(self._cancel, seat, sending, f"did not take the message within {timeout:g} s")
            done.wait()
        return dict(sending.failures)

    def want(self, channel: str, group: str, ends: Collection[str]) -> None:
        """See the base class."""
        seat = self._seats.get((channel, group))
        if seat is not None:
            self._post(self._want, seat, tuple(ends))

    def close(self) -> None:
        """See the base class."""
        with self._starting:
            line = self._line
            if line is None or not self._running:
                self._running = False
                return
            for channel, group in list(self._seats):
                self.leave(channel, group)
            if self._failed is None:
                gone = threading.Event()
                self._post(self._say_goodbye, line, gone)
                gone.wait(GOODBYE_SECONDS)
            self._running = False
            self._post(self._turn)
            line.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _start(self) -> None:
        # Stable for a start of the task; a start that was thought dead does not throw out its successor.
        name = "\0".join((self.context.job, self._me, str(self._epoch.attempt)))
        line = Line(
            self._settings,
            "flame" + hashlib.sha256(name.encode()).hexdigest()[:18],
            self._chunk,
            post=self._post,
            will=lambda number: (self._presence, self._presence_payload(number, "lost its connection to the broker")),
            message=self._on_message,
            up=self._on_up,
            lost=self._on_lost,
            smaller=self._on_smaller,
        )
        line.connect()
        self._line = line
        self._thread.start()

    def _post(self, call: Callable[..., None], *args: object) -> None:
        self._calls.put((call, args))

    # From here on everything runs in the backend's thread, except the making of a will.

    def _run(self) -> None:
        while self._running:
            deadline = self._deadline()
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(queue.Empty):
                self._do(*self._calls.get(timeout=wait))
                for _ in range(min(self._calls.qsize(), BATCH)):
                    self._do(*self._calls.get_nowait())
            self._do(self._turn, ())

    def _do(self, call: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            call(*args)
        except Exception:
            # One message that a channel cannot take must not end all of them.
            log.exception("Something went wrong in the mqtt backend; going on.")

    def _turn(self) -> None:
        line, now = self._line, time.monotonic()
        if line is not None and line.connected and self._failed is None:
            room = line.room
            for seat in list(self._seats.values()):
                room = seat.outbox.pump(now, room)
            for peer in self._roster.check(now):
                self._ask(line, peer)
        for seat in self._seats.values():
            if seat.flushed is not None and seat.outbox.idle:
                seat.flushed.set()

    def _deadline(self) -> float | None:
        if self._line is None or not self._line.connected or self._failed is not None:
            return None
        times = [seat.outbox.deadline() for seat in self._seats.values()]
        return min((each for each in (*times, self._roster.deadline()) if each is not None), default=None)

    # The connection.

    def _on_up(self, number: int) -> tuple[list[str], Callable[[bool], None]]:
        now = time.monotonic()
        if number > 1:
            self._roster.doubt_all(now)
        for seat in self._seats.values():
            seat.outbox.reconnected(now)
        self._confirmed.clear()
        shared = list(self._shared)

        def then(granted: bool) -> None:
            self._confirmed.update(topic for topic in shared if topic in self._shared)
            self._announce()

        return [presence_topic(self.context.job, "+"), *self._inboxes, *shared], then

    def _on_lost(self, taken_over: bool) -> None:
        if taken_over:
            self._fail("was replaced by another start of the same task")

    def _on_smaller(self) -> None:
        if self._line is not None:
            for seat in self._seats.values():
                seat.outbox.cut_smaller(self._line.chunk, time.monotonic())

    def _fail(self, reason: str) -> None:
        """This worker is out for good."""
        if self._failed is not None:
            return
        log.error("This worker %s; it is off the MQTT broker.", reason)
        self._failed = reason
        for seat in list(self._seats.values()):
            for end in list(seat.present):
                self._peer_left(seat.place, end, "cannot be reached: this worker " + reason)
            if seat.flushed is not None:
                seat.flushed.set()
        if self._line is not None:
            # In a thread of its own: it waits for paho's, and the caller may close at the same time.
            threading.Thread(target=self._line.close, name="flame-mqtt-close", daemon=True).start()

    # Coming and going.

    def _join(self, place: Place, sink: Sink, answer: queue.SimpleQueue[str | None]) -> None:
        line = self._line
        if self._failed is not None or line is None:
            answer.put(f"it {self._failed or 'is closed'}")
            return
        topics = Topics(self.context.job, *place)
        seat = Seat(place, sink, topics)

        def put(shared: str, end: str, said: Said, body: Sequence[memoryview]) -> None:
            topic = topics.shared(self._me, shared) if shared else topics.inbox(end)
            # What is only news and is asked for again when lost needs no acknowledgement of the broker.
            qos = 0 if isinstance(said, Ack | Status | Ping) else 1
            line.publish(topic, self._seal.seal(topic, said, body), qos)

        def deliver(end: str, data: memoryview | bytes) -> None:
            nbytes = len(data)
            sink.on_frames(end, data, lambda: self._post(seat.intake.released, nbytes))

        nonce = self._epoch.nonce
        seat.outbox = Outbox(self._me, nonce, put)
        seat.intake = Intake(
            self._me,
            nonce,
            window=sink.window,
            put=put,
            deliver=deliver,
            subscribe=lambda end, name: self._listen(seat, end, name),
        )
        inbox = topics.inbox(self._me)
        self._seats[place] = self._inboxes[inbox] = seat

        def listening(granted: bool) -> None:
            if granted:
                self._announce(answer.put)
            else:
                answer.put("not authorised to subscribe")

        line.subscribe([inbox], listening)
        for peer in self._roster.peers.values():
            if place in peer.here:
                self._peer_joined(place, peer)

    def _leave(self, seat: Seat, done: threading.Event) -> None:
        self._seats.pop(seat.place, None)
        for end in list(seat.present):
            seat.outbox.part(end, "was not served: this worker left the channel")
        for topic, its in [*self._inboxes.items(), *self._shared.items()]:
            if its is seat:
                self._inboxes.pop(topic, None)
                self._shared.pop(topic, None)
                if self._line is not None:
                    self._line.unsubscribe(topic)
        if self._failed is None and self._line is not None and self._line.connected:
            self._announce(lambda refusal: done.set())
        else:
            done.set()

    def _say_goodbye(self, line: Line, gone: threading.Event) -> None:
        """Tell the others, then leave nothing behind at the broker."""
        if not line.connected:
            gone.set()
            return
        line.publish(self._presence, self._presence_payload(line.connection, "left"))
        line.publish(self._presence, b"", retain=True, then=lambda refusal: gone.set())

    def _presence_payload(self, connection: int, left: str = "") -> bytes:
        beat = LAST_BEAT if left else self._beat
        seats = [] if left else list(self._seats)
        said = Presence(self.context.me, self._epoch, connection, beat, seats, left)
        return self._seal.seal(self._presence, said)

    def _announce(self, then: Callable[[str | None], None] | None = None) -> None:
        if self._line is not None:
            self._beat += 1
            self._line.publish(self._presence, self._presence_payload(self._line.connection), retain=True, then=then)

    def _peer_joined(self, place: Place, peer: Peer) -> None:
        seat = self._seats.get(place)
        if seat is not None and seat.sink.wants(peer.member):
            end = peer.member.end
            seat.outbox.meet(end, peer.epoch)
            seat.intake.meet(end, peer.epoch)
            seat.present[end] = peer
            seat.sink.on_join(peer.member)

    def _peer_left(self, place: Place, end: str, reason: str) -> None:
        seat = self._seats.get(place)
        if seat is not None and seat.present.pop(end, None) is not None:
            seat.outbox.part(end, reason)
            seat.intake.part(end)
            seat.sink.on_leave(end, reason)

    def _ask(self, line: Line, peer: Peer) -> None:
        for place in peer.here:
            if place in self._seats:
                topic = Topics(self.context.job, *place).inbox(peer.member.end)
                said = Ping(self._me, self._epoch.nonce, peer.epoch)
                line.publish(topic, self._seal.seal(topic, said), 0)
                return

    # Messages.

    def _submit(self, seat: Seat, sending: Sending, ends: list[str]) -> None:
        if self._failed is not None or seat.place not in self._seats:
            reason = self._failed or "was not served: this worker left the channel"
            sending.failures.update(dict.fromkeys(ends, reason))
            sending.on_done()
        else:
            seat.outbox.submit(sending, ends, time.monotonic())

    def _cancel(self, seat: Seat, sending: Sending, reason: str) -> None:
        seat.outbox.cancel(sending, reason)

    def _want(self, seat: Seat, ends: Collection[str]) -> None:
        seat.intake.want(ends)

    def _listen(self, seat: Seat, end: str, name: str) -> None:
        """Subscribe to a topic that ``end`` publishes on for a set of receivers; the oldest one is given up for it."""
        topic, line = seat.topics.shared(end, name), self._line
        if line is None:
            return
        if topic in self._confirmed:
            self._shared.move_to_end(topic)
            seat.intake.subscribed(end, name)
            return
        while len(self._shared) >= SHARED_TOPICS:
            oldest, _ = self._shared.popitem(last=False)
            self._confirmed.discard(oldest)
            line.unsubscribe(oldest)
        self._shared[topic] = seat

        def then(granted: bool) -> None:
            if granted and topic in self._shared:
                self._confirmed.add(topic)
                seat.intake.subscribed(end, name)

        line.subscribe([topic], then)

    def _on_message(self, topic: str, payload: bytes, retained: bool) -> None:
        opened = self._seal.open(topic, payload)
        if opened is None:
            if payload:  # nothing clears a retained message
                log.debug("A message on %s is not of this job; passed over.", topic)
            return
        said, body = opened
        if isinstance(said, Presence):
            self._on_presence(topic, said, retained)
            return
        seat = self._inboxes.get(topic) or self._shared.get(topic)
        if seat is None or said.src == self._me:
            return
        self._roster.sign_of_life(said.src, said.epoch)
        if isinstance(said, Chunk):
            seat.intake.on_chunk(said, body)
        elif isinstance(said, Small):
            seat.intake.on_small(said, body)
        elif isinstance(said, Ack):
            seat.outbox.on_ack(said.src, said, time.monotonic())
        elif isinstance(said, Status):
            seat.outbox.on_status(said.src, said, time.monotonic())
        elif isinstance(said, Offer):
            seat.intake.on_offer(said)
        elif not said.answer and said.to == self._epoch.nonce:
            back = seat.topics.inbox(said.src)
            answer = Ping(self._me, self._epoch.nonce, said.epoch, answer=True)
            if self._line is not None:
                self._line.publish(back, self._seal.seal(back, answer), 0)

    def _on_presence(self, topic: str, said: Presence, retained: bool) -> None:
        if topic != presence_topic(self.context.job, said.member.end):
            return
        if said.member.end != self._me:
            self._roster.hear(said, time.monotonic(), retained=retained)
        elif said.epoch > self._epoch and not said.left:
            self._fail("was replaced by another start of the same task")
        elif said.left and said.epoch == self._epoch:
            if self._line is not None and self._mourned < said.connection < self._line.connection:
                # This worker's will: it was away for so long that the broker has published it. It may come twice, from the
                # session and as the topic's retained message; peers that came back in between are not to be lost again.
                self._mourned = said.connection
                self._roster.let_go("lost touch with this worker")
                self._announce()
        elif self._seats and said.epoch < self._epoch:
            self._announce()  # the will of an earlier life has covered our presence
