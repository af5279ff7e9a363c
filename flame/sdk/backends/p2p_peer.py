"""The peers of one channel's group: whom this worker knows of, whom it is connected with, and whom it must dial.

Who dials is settled without a word: a data consumer, which may sit behind a NAT, dials those who are none; among equals the
greater id dials the smaller. A connection that is lost is dialled again, with growing and random pauses, for as long as
the rendezvous says that the peer is there. Everything here happens in the loop's thread.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.sdk.backends import p2p_address
from flame.sdk.backends.base import Member, Sink
from flame.sdk.backends.p2p_greeting import Greeting, dialing
from flame.sdk.backends.p2p_handshake import Hello
from flame.sdk.backends.p2p_loop import Timer
from flame.sdk.backends.p2p_memory import Window

if TYPE_CHECKING:
    from flame.sdk.backends.p2p import P2pBackend
    from flame.sdk.backends.p2p_connection import Connection
    from flame.sdk.backends.p2p_stream import Stream

log = logging.getLogger(__name__)

BACKOFF_SECONDS = (0.02, 2.0)
#: A peer that the rendezvous says has left is given so long to finish what it is sending.
FAREWELL_SECONDS = 5.0


class Peer:
    """One worker at the other end."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.present = True  # by the rendezvous
        self.connection: Connection | None = None
        self.greeting: Greeting | None = None
        self.timer: Timer | None = None
        self.wait = BACKOFF_SECONDS[0]
        self.tried = 0
        self.told = False

    def stop(self) -> None:
        """Dial no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.greeting is not None:
            self.greeting.cancel()
            self.greeting = None


class Room:
    """One channel and group that this worker has joined."""

    def __init__(self, backend: P2pBackend, channel: str, group: str, sink: Sink) -> None:
        self.backend = backend
        self.channel = channel
        self.group = group
        self.sink = sink
        self.window = Window(sink.window)
        self.peers: dict[str, Peer] = {}
        self.connections: dict[str, Connection] = {}  # by end; read by senders in other threads
        self.closing = False
        self.on_empty: Callable[[], object] | None = None

    def update(self, joined: list[Member], left: list[str]) -> None:
        """News from the rendezvous."""
        for member in joined:
            if not self.closing and member.end != self.backend.me.end and self.sink.wants(member):
                self._join(member)
        for end in left:
            self._leave(end)

    def _join(self, member: Member) -> None:
        peer = self.peers.get(member.end)
        if peer is None:
            peer = self.peers[member.end] = Peer(member)
        elif member.attempt < peer.member.attempt:
            return
        connection = peer.connection
        if connection is not None and connection.member.attempt < member.attempt:
            connection.end_with("was replaced by a newer attempt")
        if member != peer.member or not peer.present:
            peer.stop()
            peer.wait, peer.tried, peer.told = BACKOFF_SECONDS[0], 0, False
        peer.member, peer.present = member, True
        if peer.connection is None and peer.greeting is None and peer.timer is None:
            self._dial(peer)

    def _leave(self, end: str) -> None:
        peer = self.peers.get(end)
        if peer is None:
            return
        peer.present = False
        peer.stop()
        if peer.connection is None:
            del self.peers[end]
        else:
            self._expect_end(peer, peer.connection)

    def _expect_end(self, peer: Peer, connection: Connection) -> None:
        """It may still be sending; cut it off when nothing more comes."""

        def look(seen: float) -> None:
            if peer.present or peer.connection is not connection:
                return
            if connection.progress == seen and not connection.held:
                connection.end_with("has left, says the rendezvous")
            else:
                self.backend.loop.later(FAREWELL_SECONDS, lambda: look(connection.progress))

        self.backend.loop.later(FAREWELL_SECONDS, lambda: look(connection.progress))

    # Dialling.

    def _should_dial(self, member: Member) -> bool:
        me = self.backend.me
        return me.dials if me.dials != member.dials else me.end > member.end

    def _dial(self, peer: Peer) -> None:
        peer.timer = None
        if self.closing or not peer.present or not self._should_dial(peer.member):
            return
        addresses = p2p_address.dialable(peer.member.addresses, same_host=self.backend.same_host)
        if not addresses:
            log.warning("%s gives no address at which it could be reached from here.", peer.member.end)
            return
        address = addresses[peer.tried % len(addresses)]
        peer.tried += 1
        try:
            where = p2p_address.target(address)
        except ValueError as error:
            self._failed(peer, str(error))
            return
        if where is not None:
            self._connect(peer, where[0], where[1], address)
            return
        # A name: looking it up may take seconds, which the loop does not have.
        host, port = p2p_address.split(address)

        def look_up() -> None:
            try:
                info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            except OSError as error:
                self.backend.loop.call(self._failed, peer, f"{host} is not known ({error.strerror or error})")
            else:
                self.backend.loop.call(self._connect, peer, info[0], info[4], address)

        threading.Thread(target=look_up, name="flame-lookup", daemon=True).start()

    def _connect(self, peer: Peer, family: socket.AddressFamily, where: object, address: str) -> None:
        if self.closing or not peer.present or peer.connection is not None or peer.greeting is not None:
            return
        me, backend = self.backend.me, self.backend
        hello = Hello(
            job=backend.context.job,
            channel=self.channel,
            group=self.group,
            end=me.end,
            role=me.role,
            attempt=me.attempt,
            dials=me.dials,
            to=peer.member.end,
            nonce=b"",
            order=me.order,
        )

        def on_done(stream: Stream, member: Member) -> None:
            peer.greeting = None
            if self.closing or not peer.present or peer.connection is not None:
                stream.close()
            elif member.end != peer.member.end:
                stream.close()
                self._failed(peer, f"somebody else ({member.end}) answers at {address}")
            else:
                self.connected(stream, member)

        def on_fail(reason: Exception) -> None:
            peer.greeting = None
            self._failed(peer, f"at {address}: {reason}")

        peer.greeting = dialing(backend, family, where, hello, on_done=on_done, on_fail=on_fail)

    def _failed(self, peer: Peer, reason: str) -> None:
        """A try has failed: the next address at once, or all of them again after a pause."""
        if self.closing or not peer.present or peer.connection is not None:
            return
        addresses = p2p_address.dialable(peer.member.addresses, same_host=self.backend.same_host)
        log.debug("%s cannot be reached: %s", peer.member.end, reason)
        if addresses and peer.tried % len(addresses):
            self._dial(peer)
            return
        if not peer.told and peer.wait >= BACKOFF_SECONDS[1]:
            peer.told = True
            log.warning("%s cannot be reached on channel %s (%s). Trying on.", peer.member.end, self.channel, reason)
        peer.timer = self.backend.loop.later(peer.wait * random.uniform(0.5, 1.5), lambda: self._dial(peer))
        peer.wait = min(2 * peer.wait, BACKOFF_SECONDS[1])

    # Connections.

    def refusal(self, hello: Hello) -> str | None:
        """Why a worker of this job that dials this one is sent away; None when it is welcome."""
        member = Member(end=hello.end, role=hello.role, attempt=hello.attempt, dials=hello.dials)
        if self.closing:
            return "has left the channel"
        if not self.sink.wants(member):
            return f"does not talk with the role {hello.role} on this channel"
        peer = self.peers.get(hello.end)
        if peer is not None and hello.attempt < max(
            peer.member.attempt, peer.connection.member.attempt if peer.connection else 0
        ):
            return "knows a newer attempt of this task"
        return None

    def connected(self, stream: Stream, member: Member) -> None:
        """The handshake is over: the peer can be talked with."""
        peer = self.peers.get(member.end)
        if peer is None:
            peer = self.peers[member.end] = Peer(member)
        if peer.connection is not None:
            newer = member.attempt > peer.connection.member.attempt
            peer.connection.end_with("was replaced by a newer attempt" if newer else "has connected again")
        peer.stop()
        peer.wait, peer.tried, peer.told = BACKOFF_SECONDS[0], 0, False
        if member.attempt > peer.member.attempt:
            peer.member = member
        # The rendezvous may tell of it later than it dials.
        peer.present = True
        connection = self.backend.make_connection(self, stream, member)
        peer.connection = connection
        self.connections[member.end] = connection
        self.sink.on_join(member)

    def ended(self, connection: Connection, reason: str) -> None:
        """A connection is over."""
        peer = self.peers.get(connection.end)
        if peer is None or peer.connection is not connection:
            return
        peer.connection = None
        self.connections.pop(connection.end, None)
        log.debug("%s %s on channel %s", connection.end, reason, self.channel)
        self.sink.on_leave(connection.end, reason)
        if reason == "left the channel":
            peer.present = False
        if not peer.present:
            peer.stop()
            self.peers.pop(connection.end, None)
        elif not self.closing and self._should_dial(peer.member):
            # Not at once: a peer that was killed would be dialled before the rendezvous knows.
            peer.timer = self.backend.loop.later(peer.wait * random.uniform(0.5, 1.5), lambda: self._dial(peer))
        if self.closing and not self.connections and self.on_empty is not None:
            self.on_empty()

    def depart(self, on_empty: Callable[[], object]) -> None:
        """Leave: say good-bye to everyone; ``on_empty`` is called when all connections are over."""
        self.closing = True
        self.on_empty = on_empty
        for peer in self.peers.values():
            peer.stop()
        if not self.connections:
            on_empty()
        for connection in list(self.connections.values()):
            connection.depart()

    def cut(self) -> None:
        """End all connections now."""
        for connection in list(self.connections.values()):
            connection.end_with("this worker left the channel")
