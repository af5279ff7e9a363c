"""Direct connections between workers: TCP, and between processes of one host a unix socket and shared memory.

One thread per worker waits for all sockets (:mod:`.p2p_loop`); messages are written by the thread that sends them and
read by that one straight into the buffer in which they are used (:mod:`.p2p_connection`). Workers hear of each
other from the rendezvous and then need nobody else (:mod:`.p2p_peer`). Whoever connects must prove that it knows
the job's secret (:mod:`.p2p_handshake`). Two workers on one host find that out by their addresses (:mod:`.p2p_address`)
and pass large messages through shared memory (:mod:`.shm`), with no setting needed.

Options (``BackendContext.options``, or the environment): ``host``, ``port``, ``bind`` (see :func:`.p2p_address.listen_tcp`);
``tls_cert``, ``tls_key``, ``tls_ca`` (``FLAME_P2P_TLS_CERT`` ...): PEM files; with them everything travels under TLS and
both sides show certificates of that CA; ``same_host`` (``FLAME_P2P_SAME_HOST=0`` turns it off);
``max_message``: bytes.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Collection, Sequence
from typing import ClassVar

import msgspec

from flame.errors import BackendError
from flame.sdk.backends import p2p_address, shm
from flame.sdk.backends.base import Backend, BackendContext, Frames, Member, Sink
from flame.sdk.backends.p2p_connection import Connection
from flame.sdk.backends.p2p_greeting import Doorkeeper
from flame.sdk.backends.p2p_handshake import Hello, SentAway, Welcome
from flame.sdk.backends.p2p_loop import Loop
from flame.sdk.backends.p2p_memory import Pool
from flame.sdk.backends.p2p_peer import Room
from flame.sdk.backends.p2p_records import data_record, segment_record
from flame.sdk.backends.p2p_send import LATE, send_all
from flame.sdk.backends.p2p_stream import LOOK_SECONDS, Stream, TlsStream, host_is_silent

log = logging.getLogger(__name__)

#: The longest message that is taken in, unless the option ``max_message`` says otherwise.
MAX_MESSAGE = 64 << 30
#: How long leaving waits for peers to take what was sent. The kernel goes on delivering after that.
LINGER_SECONDS = 2.0
_SCRATCH = 256 << 10


class P2pBackend(Backend):
    """See the module."""

    sort: ClassVar[str] = "p2p"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        if context.rendezvous is None:
            raise BackendError("The p2p backend needs a rendezvous through which workers find each other.")
        self._rendezvous = context.rendezvous
        option = context.options.get
        self._tls_client, self._tls_server = _tls_contexts(context)
        wanted = option("same_host", os.environ.get("FLAME_P2P_SAME_HOST", "1"))
        self.same_host = str(wanted).lower() not in ("0", "false", "no") and self._tls_client is None
        self._limit = int(option("max_message") or MAX_MESSAGE)
        self.me = context.me
        self._rooms: dict[tuple[str, str], Room] = {}
        self._doors: list[Doorkeeper] = []
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._pool = Pool(0)
        self._segments = shm.Segments() if self.same_host and p2p_address.host_id() else None
        self._closed = False
        self._lock = threading.Lock()
        self.loop = Loop("flame-p2p")
        try:
            self._listen()
        except OSError as error:
            self.loop.close()
            raise BackendError(
                f"This worker cannot listen for its peers: {error.strerror or error}. "
                "FLAME_P2P_BIND and FLAME_P2P_PORT say where it does."
            ) from error

    @property
    def turned_away(self) -> int:
        """How many connections of strangers were closed."""
        return sum(door.turned_away for door in self._doors)

    def join(self, channel: str, group: str, sink: Sink) -> None:
        """See the base class."""
        room = Room(self, channel, group, sink)
        self._pool.keep = max(self._pool.keep, sink.window)
        with self._lock:
            self._rooms[channel, group] = room
        self._rendezvous.join(channel, group, self.me, lambda joined, left: self.loop.call(room.update, joined, left))

    def leave(self, channel: str, group: str) -> None:
        """See the base class."""
        with self._lock:
            room = self._rooms.pop((channel, group), None)
        if room is None:
            return
        over = threading.Event()
        self.loop.call(room.depart, over.set)
        self._rendezvous.leave(channel, group)
        if not over.wait(LINGER_SECONDS):
            self.loop.run(room.cut, LINGER_SECONDS)

    def send(
        self, channel: str, group: str, ends: Sequence[str], frames: Frames, timeout: float | None
    ) -> dict[str, str]:
        """See the base class."""
        room = self._rooms.get((channel, group))
        if room is None:
            return dict.fromkeys(ends, "is not there: this worker has left the channel")
        deadline = None if timeout is None else time.monotonic() + timeout
        failed: dict[str, str] = {}
        plain: list[Connection] = []
        shared: list[Connection] = []
        for end in ends:
            connection = room.connections.get(end)
            if connection is None:
                failed[end] = "is not connected"
            elif connection.shared is not None and frames.nbytes >= shm.THRESHOLD:
                shared.append(connection)
            else:
                plain.append(connection)
        if shared:
            failed.update(self._send_shared(shared, frames, deadline))
        if plain:
            failed.update(send_all(plain, data_record(frames), deadline))
        return failed

    def want(self, channel: str, group: str, ends: Collection[str]) -> None:
        """See the base class."""
        room = self._rooms.get((channel, group))
        if room is not None and room.window.want(ends):
            self.loop.call(room.window.resume, self.loop.call)

    def close(self) -> None:
        """See the base class."""
        if self._closed:
            return
        self._closed = True
        for channel, group in list(self._rooms):
            self.leave(channel, group)
        for door in self._doors:
            self.loop.call(door.close)
        self.loop.close()
        if self._segments is not None:
            self._segments.close()

    # For rooms and greetings.

    def wrap(self, sock: socket.socket, *, server: bool) -> Stream:
        """A connected socket as the stream that this worker's settings ask for.

        :raises OSError: it cannot be used.
        """
        if sock.family == socket.AF_UNIX:
            return Stream(sock)
        if server and self._tls_server is not None:
            return TlsStream(sock, self._tls_server, server=True)
        if not server and self._tls_client is not None:
            return TlsStream(sock, self._tls_client, server=False)
        return Stream(sock)

    def make_connection(self, room: Room, stream: Stream, member: Member) -> Connection:
        """A stream past its handshake becomes a connection of a room."""
        connection = Connection(
            loop=self.loop,
            stream=stream,
            member=member,
            sink=room.sink,
            window=room.window,
            pool=self._pool,
            scratch=self._scratch,
            limit=self._limit,
            shared=self._segments if stream.local else None,
            on_end=room.ended,
        )
        if not stream.local and hasattr(socket, "TCP_INFO"):
            self.loop.later(LOOK_SECONDS, lambda: self._look_after(connection))
        return connection

    def _send_shared(self, connections: list[Connection], frames: Frames, deadline: float | None) -> dict[str, str]:
        """Through one segment for all of them."""
        segments = self._segments
        if segments is None:
            return {}
        segment = segments.write(frames)
        failed: dict[str, str] = {}
        record = segment_record(segment.number, frames.nbytes)
        try:
            waiting = []
            for connection in connections:
                if connection.take_credit(0):
                    failed.update(self._hand_over(connection, segment, record, deadline))
                else:
                    waiting.append(connection)
            for connection in waiting:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if connection.take_credit(left):
                    failed.update(self._hand_over(connection, segment, record, deadline))
                else:
                    failed[connection.end] = connection.broken or LATE
        finally:
            segments.sent(segment)
        return failed

    def _hand_over(
        self, connection: Connection, segment: shm.Segment, record: list[bytes | memoryview], deadline: float | None
    ) -> dict[str, str]:
        segments = self._segments
        if segments is None:
            return {}
        segments.use(segment, connection)
        failed = send_all([connection], record, deadline, segment.fd)
        if failed or connection.broken is not None:
            connection.forsake()
        return failed

    def _look_after(self, connection: Connection, *, suspected: bool = False) -> None:
        """Timer: is the host at the other end still there? A kernel says so only to who asks while data is on its way."""
        if connection.broken is None and not self._closed:
            info = connection.stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            silent = host_is_silent(info)
            if silent and suspected:
                connection.end_with("is not reachable any more")
            else:
                self.loop.later(LOOK_SECONDS, lambda: self._look_after(connection, suspected=silent))

    # Listening.

    def _listen(self) -> None:
        listening: list[socket.socket] = []
        addresses: list[str] = []
        try:
            sock, address = p2p_address.listen_tcp(self.context.options, self.context.broker)
            listening, addresses = [sock], [address]
        except OSError as error:
            if not self.me.dials:
                raise
            log.warning("This worker does not listen (%s); it dials its peers.", error.strerror or error)
        unix = p2p_address.listen_unix() if self.same_host else None
        if unix is not None:
            listening.insert(0, unix[0])
            addresses.insert(0, unix[1])
        self.me = msgspec.structs.replace(self.context.me, addresses=addresses)

        def start() -> None:
            self._doors = [Doorkeeper(self, each, self._admit, self._welcomed) for each in listening]

        self.loop.run(start)

    def _admit(self, hello: Hello) -> Welcome:
        me = self.me
        room = self._rooms.get((hello.channel, hello.group))
        if hello.job != self.context.job:
            raise SentAway("is of another job")
        if hello.to != me.end:
            raise SentAway("is not whom this worker looks for")
        if room is None:
            raise SentAway("has not joined this channel and group")
        reason = room.refusal(hello)
        if reason is not None:
            raise SentAway(reason)
        return Welcome(end=me.end, role=me.role, attempt=me.attempt, order=me.order)

    def _welcomed(self, stream: Stream, hello: Hello) -> None:
        room = self._rooms.get((hello.channel, hello.group))
        if room is None:
            stream.close()
        else:
            member = Member(end=hello.end, role=hello.role, attempt=hello.attempt, dials=hello.dials, order=hello.order)
            room.connected(stream, member)


def _tls_contexts(context: BackendContext) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """Contexts for dialling and for listening; none where no files are named. Both sides must show a certificate of the CA.

    :raises flame.errors.BackendError: the files cannot be used.
    """
    names = ("tls_cert", "tls_key", "tls_ca")
    cert, key, authority = (context.options.get(n) or os.environ.get(f"FLAME_P2P_{n.upper()}") for n in names)
    if not cert and not authority:
        return None, None
    if not (cert and authority):
        raise BackendError("TLS between workers needs both tls_cert (with tls_key) and tls_ca.")
    try:
        pair = []
        for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
            tls = ssl.SSLContext(protocol)
            tls.minimum_version = ssl.TLSVersion.TLSv1_3
            tls.check_hostname = False  # workers are known by the CA and the job's key, not by a host's name
            tls.verify_mode = ssl.CERT_REQUIRED
            tls.load_verify_locations(authority)
            tls.load_cert_chain(cert, key or None)
            pair.append(tls)
    except (OSError, ValueError) as error:
        raise BackendError(f"The TLS files for connections between workers cannot be used: {error}.") from error
    return pair[0], pair[1]
