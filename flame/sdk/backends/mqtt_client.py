"""The connection to an MQTT broker: paho-mqtt, with everything that arrives handed on as events.

paho's thread only reads, writes and puts events into the caller's queue; it never runs Flame's code, so it answers the
broker in time whatever the worker does. It also reconnects by itself; each new connection is an event.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flame.errors import BackendError, MissingExtra
from flame.sdk.backends.hostport import split_hostport

log = logging.getLogger(__name__)

#: The broker takes a client for lost after one and a half times this. Long enough for a process that was paused for
#: twenty seconds; a killed one is noticed at once, because its connection closes.
KEEPALIVE_SECONDS = 20
#: How long the broker keeps a session without a connection, with what is queued in it.
SESSION_SECONDS = 600
#: A connection that comes back within this time leaves no will behind.
WILL_DELAY_SECONDS = 1
WILL_EXPIRY_SECONDS = 3600
CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = (0.1, 3)
IN_FLIGHT = 20
#: Reason codes of MQTT 5 with which a broker ends a connection.
PROTOCOL_ERROR, TAKEN_OVER, PACKET_TOO_LARGE = 0x82, 0x8E, 0x95
QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux


class Settings:
    """Where the broker is and how to get in.

    Secrets come from the environment, never from a job's files: ``FLAME_MQTT_USERNAME``, ``FLAME_MQTT_PASSWORD``,
    ``FLAME_MQTT_CA``, ``FLAME_MQTT_CERT``, ``FLAME_MQTT_KEY`` (paths of PEM files). A caller's options of the same names in
    lower case without ``FLAME_`` (``mqtt_ca`` ...) come first.

    :param broker: ``host[:port]``; ``mqtts://`` before it, or a CA file, asks for TLS.
    :raises flame.errors.SpecError: the address is none.
    """

    def __init__(self, broker: str, options: Mapping[str, Any]) -> None:
        def option(name: str) -> str | None:
            value = options.get(f"mqtt_{name}") or os.environ.get(f"FLAME_MQTT_{name.upper()}")
            return str(value) if value else None

        self.username = option("username")
        self.password = option("password")
        self.ca, self.cert, self.key = option("ca"), option("cert"), option("key")
        self.tls = broker.strip().lower().startswith("mqtts://") or self.ca is not None
        self.host, self.port = split_hostport(broker, 8883 if self.tls else 1883)

    def tls_context(self) -> ssl.SSLContext:
        """What TLS needs.

        :raises flame.errors.BackendError: a file cannot be read, or is no certificate or key.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            # On some systems it speaks all.
            context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            named = ", ".join(path for path in (self.ca, self.cert, self.key) if path)
            raise BackendError(f"The TLS files for the MQTT broker cannot be used ({named}): {error}.") from error
        return context


class Client:
    """One worker's connection.

    :param settings: where to.
    :param client_id: the same for each connection of this start of the task, so that its session is found again.
    :param will: gives topic and payload of the last will for the n-th connection.
    :param on_connect: the connection is there: its number, the broker's largest packet in bytes (None: no limit), and how
        many messages it takes unacknowledged. paho does not heed that and would be thrown out, so the caller has to.
    :param on_disconnect: it is lost: why, in words and as MQTT 5's reason code.
    :param on_message: topic, payload, whether it was retained.
    :param on_published: the broker has acknowledged a message; its packet id and a reason where it refused.
    :param on_subscribed: packet id, and whether all were granted.

    All of them are called in paho's thread and must only put an event into a queue.
    :raises flame.errors.MissingExtra: paho-mqtt is not installed.
    """

    def __init__(
        self,
        settings: Settings,
        client_id: str,
        *,
        will: Callable[[int], tuple[str, bytes]],
        on_connect: Callable[[int, int | None, int], None],
        on_disconnect: Callable[[str, int], None],
        on_message: Callable[[str, bytes, bool], None],
        on_published: Callable[[int, str | None], None],
        on_subscribed: Callable[[int, bool], None],
    ) -> None:
        try:
            from paho.mqtt import client as paho
            from paho.mqtt import enums
        except ModuleNotFoundError:
            raise MissingExtra("paho-mqtt", "mqtt", "The mqtt backend") from None
        self._settings = settings
        self._will = will
        self._connections = 0
        self._first = threading.Event()
        self._refused: str | None = None
        self._trouble = "it does not answer"
        self._paho = paho.Client(
            enums.CallbackAPIVersion.VERSION2, client_id, protocol=enums.MQTTProtocolVersion.MQTTv5
        )
        self._paho.max_inflight_messages_set(IN_FLIGHT)
        self._paho.reconnect_delay_set(RECONNECT_SECONDS[0] * random.uniform(1, 3), RECONNECT_SECONDS[1])
        self._paho.connect_timeout = CONNECT_SECONDS / 2
        if settings.username is not None:
            self._paho.username_pw_set(settings.username, settings.password)
        if settings.tls:
            self._paho.tls_set_context(settings.tls_context())

        def connected(client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
            if reason.is_failure:
                self._refused = str(reason)
                self._first.set()
                return
            if self._refused is not None:
                self._refused = None
            limits = getattr(properties, "MaximumPacketSize", None), getattr(properties, "ReceiveMaximum", 65535)
            on_connect(self._connections, *limits)
            self._first.set()

        def disconnected(client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
            on_disconnect(str(reason).lower(), reason.value)

        def connect_failed(client: Any, data: Any) -> None:
            self._trouble = "nothing answers"

        def before_connect(client: Any, data: Any) -> None:
            self._connections += 1
            self._set_will()

        def opened(client: Any, data: Any, sock: Any) -> None:
            with contextlib.suppress(OSError, AttributeError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def acknowledge() -> None:
            # A broker that gathers small packets (Nagle) sends the next one when this one is acknowledged, which the
            # kernel delays by 40 ms unless it is asked to do so now. The request holds for one time only.
            if QUICKACK is not None:
                with contextlib.suppress(OSError, AttributeError):
                    self._paho.socket().setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)

        def arrived(client: Any, data: Any, message: Any) -> None:
            acknowledge()
            on_message(message.topic, message.payload, bool(message.retain))

        def published(client: Any, data: Any, mid: int, reason: Any, properties: Any) -> None:
            acknowledge()
            on_published(mid, failed([reason]))

        def subscribed(client: Any, data: Any, mid: int, reasons: Any, properties: Any) -> None:
            acknowledge()
            on_subscribed(mid, failed(reasons) is None)

        def failed(reasons: Sequence[Any]) -> str | None:
            return next((str(reason) for reason in reasons if reason.is_failure), None)

        self._paho.on_connect = connected
        self._paho.on_disconnect = disconnected
        self._paho.on_connect_fail = connect_failed
        self._paho.on_pre_connect = before_connect
        self._paho.on_socket_open = opened
        self._paho.on_message = arrived
        self._paho.on_publish = published
        self._paho.on_subscribe = subscribed

    def connect(self) -> None:
        """Get in, trying for ten seconds.

        :raises flame.errors.BackendError: nothing answers, or the broker refuses; the text says why and what to do.
        """
        from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_SECONDS
        # A session belongs to one life of the process: what an earlier one was sent is of no use to this one.
        self._paho.connect_async(
            self._settings.host,
            self._settings.port,
            KEEPALIVE_SECONDS,
            clean_start=MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
        )
        self._paho.loop_start()
        there = self._first.wait(CONNECT_SECONDS)
        if there and self._refused is None:
            return
        reason = self._refused
        self.close()
        where = f"The MQTT broker at {self._settings.host}:{self._settings.port}"
        if reason is None:
            raise BackendError(f"{where} cannot be reached: {self._trouble}. Check the address in brokers (sort mqtt).")
        raise BackendError(
            f"{where} refuses this worker: {reason}. Check FLAME_MQTT_USERNAME, FLAME_MQTT_PASSWORD and the TLS files."
        )

    def publish(self, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> int:
        """Publish; returns the packet id (see ``on_published``; with QoS 0 it only means that it was written)."""
        mid: int = self._paho.publish(topic, payload, qos, retain).mid
        return mid

    def subscribe(self, topics: Sequence[str]) -> int | None:
        """Subscribe with QoS 1; returns the packet id, or None without a connection."""
        from paho.mqtt.subscribeoptions import SubscribeOptions

        mid: int | None = self._paho.subscribe([(topic, SubscribeOptions(qos=1)) for topic in topics])[1]
        return mid

    def unsubscribe(self, topic: str) -> None:
        """Stop listening to a topic."""
        self._paho.unsubscribe(topic)

    def forget(self) -> None:
        """Do not publish again what the broker has not acknowledged."""
        self._paho.drop_out_messages()

    def close(self) -> None:
        """Go, in good order: the session ends and the will is not published. Safe to call again."""
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.DISCONNECT)
        properties.SessionExpiryInterval = 0
        self._paho.disconnect(properties=properties)
        self._paho.loop_stop()

    def _set_will(self) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.WILLMESSAGE)
        properties.WillDelayInterval = WILL_DELAY_SECONDS
        properties.MessageExpiryInterval = WILL_EXPIRY_SECONDS
        topic, payload = self._will(self._connections)
        self._paho.will_set(topic, payload, qos=1, retain=True, properties=properties)
