"""Connections that are not connections yet: being dialled, or accepted, and in the handshake.

Each has a deadline and costs a few kilobytes at most, and there may be only so many strangers at a time, so that who
connects and says nothing, or something else, harms nobody.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.sdk.backends.base import Member
from flame.sdk.backends.p2p_handshake import SECONDS, Hello, Refused, SentAway, Steps, Welcome, dial, listen
from flame.sdk.backends.p2p_loop import READ, WRITE
from flame.sdk.backends.p2p_stream import Broken, Stream

if TYPE_CHECKING:
    from flame.sdk.backends.p2p import P2pBackend

log = logging.getLogger(__name__)

OnDone = Callable[[Stream, Member], object]


class Greeting:
    """One handshake in progress; in the loop's thread.

    :param steps: what is to be said and heard, see :mod:`flame.sdk.backends.p2p_handshake`.
    :param on_done: called with the stream and who the other side is; the stream is the callee's then.
    :param on_fail: called with the reason, whose text is a sentence's end; everything is closed then.
    """

    def __init__(
        self,
        backend: P2pBackend,
        stream: Stream,
        steps: Steps,
        *,
        on_done: OnDone,
        on_fail: Callable[[Exception], object],
        connecting: bool = False,
    ) -> None:
        self._backend = backend
        self._loop = backend.loop
        self._stream = stream
        self._steps = steps
        self._on_done = on_done
        self._on_fail = on_fail
        self._connecting = connecting
        self._out = b""
        self._in = bytearray()
        self._wanted = 0
        self._over = False
        self._timer = self._loop.later(SECONDS, lambda: self._fail(Broken(f"said nothing useful for {SECONDS:g} s")))
        self._loop.register(stream.sock, WRITE if connecting else READ | WRITE, self._on_events)
        self._begun = False

    def cancel(self) -> None:
        """Close it without a word."""
        if not self._over:
            self._end()
            self._stream.close()

    def _on_events(self, _events: int) -> None:
        try:
            if self._connecting:
                number = self._stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise Broken(os.strerror(number).lower())
                self._connecting = False
                self._loop.unregister(self._stream.sock)
                self._stream = self._backend.wrap(self._stream.sock, server=False)
                self._loop.register(self._stream.sock, READ | WRITE, self._on_events)
            self._go_on()
        except (Broken, Refused) as error:
            self._fail(error)
        except OSError as error:
            self._fail(Broken(error.strerror or str(error)))

    def _go_on(self) -> None:
        """Say and hear as much as is possible now."""
        if not self._begun:
            self._begun = True
            self._advance(None)
        while not self._over:
            if self._out:
                self._out = self._out[self._stream.send([self._out]) :]
                if self._out:
                    break
            if len(self._in) < self._wanted:
                # Exactly what is wanted: what follows belongs to the connection.
                piece = bytearray(self._wanted - len(self._in))
                count = self._stream.receive(memoryview(piece))
                if not count:
                    break
                self._in += piece[:count]
            else:
                heard, self._in = bytes(self._in), bytearray()
                self._advance(heard)
        if not self._over:
            self._loop.modify(self._stream.sock, READ | (WRITE if self._out else 0))

    def _advance(self, heard: bytes | None) -> None:
        try:
            out, self._wanted = next(self._steps) if heard is None else self._steps.send(heard)
            self._out += out
        except StopIteration as stop:
            other: Hello | Welcome = stop.value
            dials = other.dials if isinstance(other, Hello) else False
            self._end()
            member = Member(end=other.end, role=other.role, attempt=other.attempt, dials=dials, order=other.order)
            self._on_done(self._stream, member)

    def _fail(self, reason: Exception) -> None:
        if not self._over:
            self._end()
            self._stream.close()
            self._on_fail(reason)

    def _end(self) -> None:
        self._over = True
        self._timer.cancel()
        self._loop.unregister(self._stream.sock)
        self._steps.close()


def dialing(
    backend: P2pBackend,
    family: socket.AddressFamily,
    where: object,
    hello: Hello,
    *,
    on_done: OnDone,
    on_fail: Callable[[Exception], object],
) -> Greeting | None:
    """Connect to a peer and greet it; None when that failed at once (``on_fail`` was called, later)."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    number = sock.connect_ex(where)  # type: ignore[arg-type]
    if number not in (0, errno.EINPROGRESS):
        sock.close()
        backend.loop.call(on_fail, Broken(os.strerror(number).lower()))
        return None
    steps = dial(backend.context.key, hello)
    return Greeting(backend, Stream(sock), steps, on_done=on_done, on_fail=on_fail, connecting=True)


class Doorkeeper:
    """A listening socket, and those who have come and not said who they are.

    :param admit: what to answer a worker that has proven itself, or :class:`Refused`.
    :param on_done: called with the stream and its greeting.
    """

    #: Strangers at a time; more push out the oldest.
    LIMIT = 256

    def __init__(
        self,
        backend: P2pBackend,
        sock: socket.socket,
        admit: Callable[[Hello], Welcome],
        on_done: Callable[[Stream, Hello], object],
    ) -> None:
        self.turned_away = 0
        self._backend = backend
        self._sock = sock
        self._admit = admit
        self._on_done = on_done
        self._greetings: dict[Greeting, None] = {}
        self._reported = 0.0
        sock.setblocking(False)
        backend.loop.register(sock, READ, self._on_events)

    def close(self) -> None:
        """Listen no more."""
        self._backend.loop.unregister(self._sock)
        self._sock.close()
        for greeting in list(self._greetings):
            greeting.cancel()
        self._greetings.clear()

    def _on_events(self, _events: int) -> None:
        for _ in range(64):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors or memory left: look away for a moment, or this would spin.
                log.warning("A worker cannot be let in now: %s.", error.strerror or error)
                self._backend.loop.modify(self._sock, 0)
                self._backend.loop.later(0.2, self._look_again)
                return
            self._greet(sock)

    def _look_again(self) -> None:
        if self._sock.fileno() >= 0:
            self._backend.loop.modify(self._sock, READ)

    def _greet(self, sock: socket.socket) -> None:
        greeted: list[Hello] = []

        def answer(hello: Hello) -> Welcome:
            welcome = self._admit(hello)
            greeted.append(hello)
            return welcome

        def on_done(stream: Stream, _member: Member) -> None:
            self._greetings.pop(greeting, None)
            self._on_done(stream, greeted[0])

        def on_fail(reason: Exception) -> None:
            self._greetings.pop(greeting, None)
            if not isinstance(reason, SentAway):
                self._turn_away(str(reason))

        try:
            stream = self._backend.wrap(sock, server=True)
        except OSError:
            sock.close()
            return
        steps = listen(self._backend.context.key, answer)
        greeting = Greeting(self._backend, stream, steps, on_done=on_done, on_fail=on_fail)
        self._greetings[greeting] = None
        if len(self._greetings) > self.LIMIT:
            oldest = next(iter(self._greetings))
            del self._greetings[oldest]
            oldest.cancel()
            self._turn_away("was one of too many at once")

    def _turn_away(self, reason: str) -> None:
        """Count; and one line in the log, for the first of many."""
        self.turned_away += 1
        if self.turned_away & (self.turned_away - 1) == 0:
            log.warning("Turned away somebody who connected: it %s (%d so far).", reason, self.turned_away)
