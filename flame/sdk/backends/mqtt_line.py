"""The line to the broker as the protocol's thread sees it: what is on its way to the broker, and what it takes.

Everything here runs in that thread; what paho reports is posted to it as a call.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable

from flame.sdk.backends.mqtt_client import PACKET_TOO_LARGE, PROTOCOL_ERROR, TAKEN_OVER, Client, Settings
from flame.sdk.backends.mqtt_wire import OVERHEAD

log = logging.getLogger(__name__)

CHUNK_LEAST = 512
#: Any broker takes messages of this size, so a broken connection is not put down to it.
CHUNK_SAFE = 4096
#: Messages that the broker may have left unacknowledged.
UNACKNOWLEDGED = 48

#: Called with a reason when the broker refused, with None when it took the message.
Then = Callable[[str | None], None]


class Line:
    """One worker's line.

    :param settings: where to.
    :param client_id: see :class:`Client`.
    :param chunk: the length of pieces that is wished for.
    :param post: has a call made in the protocol's thread.
    :param will: see :class:`Client`.
    :param message: called with each message: topic, payload, whether it was retained.
    :param up: the connection is there; gives all topics to subscribe to. ``number`` 1 is the first one.
    :param lost: it is gone; True when another client has taken its place for good.
    :param smaller: pieces have to be smaller from now on, also those that are on their way.
    :ivar connected: whether there is a connection.
    :ivar connection: its number.
    :ivar chunk: the length of pieces that the broker takes.
    :raises flame.errors.MissingExtra: paho-mqtt is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        client_id: str,
        chunk: int,
        *,
        post: Callable[..., None],
        will: Callable[[int], tuple[str, bytes]],
        message: Callable[[str, bytes, bool], None],
        up: Callable[[int], tuple[Iterable[str], Callable[[bool], None]]],
        lost: Callable[[bool], None],
        smaller: Callable[[], None],
    ) -> None:
        self.connected = False
        self.connection = 0
        self.chunk = self._wanted = chunk
        self._up, self._lost, self._smaller = up, lost, smaller
        self._limit = UNACKNOWLEDGED
        self._closed = False
        self._refused = False
        self._published: dict[int, Then | None] = {}  # by packet id, not acknowledged yet
        self._unpublished: deque[tuple[str, bytes, bool, Then | None]] = deque()
        self._subscribing: dict[int, Callable[[bool], None]] = {}
        self._deferred: list[Callable[[bool], None]] = []  # asked for without a connection
        self._client = Client(
            settings,
            client_id,
            will=will,
            on_connect=lambda *args: post(self._on_connect, *args),
            on_disconnect=lambda *args: post(self._on_disconnect, *args),
            on_message=lambda *args: post(message, *args),
            on_published=lambda *args: post(self._on_published, *args),
            on_subscribed=lambda *args: post(self._on_subscribed, *args),
        )
        self.connect = self._client.connect
        self.unsubscribe = self._client.unsubscribe

    @property
    def room(self) -> int:
        """How many more messages the broker takes now."""
        return self._limit - len(self._published)

    def publish(
        self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False, then: Then | None = None
    ) -> None:
        """Publish; with QoS 1 as soon as the broker takes one more, and ``then`` is told what came of it."""
        if qos == 0:
            self._client.publish(topic, payload, 0)
        elif self.room <= 0:
            self._unpublished.append((topic, payload, retain, then))
        else:
            self._published[self._client.publish(topic, payload, 1, retain=retain)] = then

    def subscribe(self, topics: list[str], then: Callable[[bool], None]) -> None:
        """Subscribe; ``then`` is told whether it was granted. Without a connection, :attr:`up` has to give the topics."""
        mid = self._client.subscribe(topics) if self.connected else None
        if mid is None:
            self._deferred.append(then)
        else:
            self._subscribing[mid] = then

    def close(self) -> None:
        """Go, in good order. May be called from any thread but the protocol's and paho's."""
        self._closed = True
        self._client.close()

    def _on_connect(self, number: int, max_packet: int | None, receive_maximum: int) -> None:
        self.connected, self.connection = True, number
        self._limit = min(UNACKNOWLEDGED, receive_maximum)
        room = self._wanted if max_packet is None else max_packet - OVERHEAD
        self.chunk = max(CHUNK_LEAST, min(self._wanted, room))
        if number > 1:
            log.info("The connection to the MQTT broker is back.")
        topics, announced = self._up(number)
        followers = [announced, *self._subscribing.values(), *self._deferred]
        self._subscribing.clear()
        self._deferred.clear()

        def then(granted: bool) -> None:
            for follower in followers:
                follower(granted)

        self.subscribe(list(topics), then)

    def _on_disconnect(self, reason: str, code: int) -> None:
        if self.connected and not self._closed:
            log.warning("The connection to the MQTT broker is lost (%s); trying on.", reason)
        self.connected = False
        if code in (PROTOCOL_ERROR, PACKET_TOO_LARGE) and self._published and self.chunk > CHUNK_SAFE:
            self._send_smaller()
        self._lost(code == TAKEN_OVER)

    def _send_smaller(self) -> None:
        """A limit that the broker does not announce (``message_size_limit`` of Mosquitto) shows in this way only."""
        self._wanted = self.chunk = max(CHUNK_SAFE, self.chunk // 2)
        log.warning("The MQTT broker may take no messages of this size; going on with %d bytes.", self.chunk)
        self._client.forget()
        waiting = [*self._published.values(), *(each[-1] for each in self._unpublished)]
        self._published.clear()
        self._unpublished.clear()
        for then in waiting:
            if then is not None:
                then(None)  # a presence message, and the next connection begins with one
        self._smaller()

    def _on_published(self, mid: int, refusal: str | None) -> None:
        then = self._published.pop(mid, None)
        if refusal is not None and not self._refused:
            self._refused = True
            log.warning("The MQTT broker refuses what this worker publishes: %s.", refusal)
        if then is not None:
            then(refusal)
        while self._unpublished and self.room > 0:
            topic, payload, retain, then = self._unpublished.popleft()
            self.publish(topic, payload, retain=retain, then=then)

    def _on_subscribed(self, mid: int, granted: bool) -> None:
        then = self._subscribing.pop(mid, None)
        if then is not None:
            then(granted)
