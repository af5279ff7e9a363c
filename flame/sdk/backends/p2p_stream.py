"""The sockets of the p2p backend: plain ones and those under TLS behind the same four calls, and how they are tuned.

None of the calls waits. None of them raises for a peer that is gone: that is an end of the stream like any other, and
:class:`Broken` says which.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import ssl
import struct
import threading
from collections.abc import Sequence

#: Buffers that are handed to the kernel in one call (at least 16 everywhere; 1024 on Linux).
IOVECS = 64
#: A receiver in the middle of a large message is woken for so many bytes, not for each packet.
LOW_WATER = 1 << 20
#: File descriptors that are taken in at once.
FDS = 4
# A dead host is noticed after KEEP_IDLE + KEEP_COUNT * KEEP_INTERVAL seconds of silence. The kernel of the other host
# answers these probes, so a process that is stopped, or busy in native code, does not count as dead.
KEEP_IDLE, KEEP_INTERVAL, KEEP_COUNT = 4, 2, 3
LOOK_SECONDS = 2.0
DEAD_SECONDS = KEEP_IDLE + KEEP_INTERVAL * KEEP_COUNT


class Broken(Exception):
    """The stream is at its end; the text is a sentence's end such as ``closed the connection``."""


class Stream:
    """A connected stream socket. Only :meth:`send_waiting` waits.

    :param sock: connected.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self.sock = sock
        self._send_timeout = 0.0
        self.local = sock.family not in (socket.AF_INET, socket.AF_INET6)
        self.fds: list[int] = []
        self._low_water = 1
        if not self.local:
            tune(sock)

    def receive(self, into: memoryview) -> int:
        """Read what is there, at most ``len(into)`` bytes; 0 when nothing is there now. Any file descriptors go to ``fds``.

        :raises Broken: the peer closed the connection, or is gone.
        """
        try:
            if self.local:
                count, ancillary, flags, _ = self.sock.recvmsg_into([into], _FD_SPACE, _RECEIVE_FLAGS)
                self._take_fds(ancillary)
                if flags & socket.MSG_CTRUNC:
                    raise Broken("sent more file descriptors than it may")
            else:
                count = self.sock.recv_into(into, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise Broken(_reason(error)) from None
        if not count:
            raise Broken("closed the connection")
        return count

    def expect(self, size: int) -> None:
        """So many bytes of a large message are still to come: do not wake for less than a good part of them."""
        lowest = max(1, min(size, LOW_WATER)) if not self.local else 1
        if lowest != self._low_water:
            self._low_water = lowest
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowest)

    def send(self, buffers: Sequence[bytes | memoryview], fd: int | None = None) -> int:
        """Hand bytes to the kernel, as many as it takes now; returns how many.

        :param fd: a file descriptor to send along with the first byte; only between processes of one host.
        :raises Broken: the peer is gone.
        """
        try:
            if fd is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                return self.sock.sendmsg(buffers, rights, socket.MSG_DONTWAIT)
            return self.sock.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise Broken(_reason(error)) from None

    def send_waiting(self, buffers: Sequence[bytes | memoryview], seconds: float | None) -> int:
        """The same, but the kernel waits for room, until all is taken or the time is over.

        :param seconds: None waits as long as it takes, or until :meth:`abort`.
        :raises Broken: the peer is gone.
        """
        timeout = max(seconds, 0.001) if seconds is not None else 0.0
        try:
            if timeout != self._send_timeout:
                self._send_timeout = timeout
                whole = int(timeout)
                value = struct.pack("@ll", whole, int((timeout - whole) * 1e6))
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            return self.sock.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise Broken(_reason(error)) from None

    @property
    def waits(self) -> bool:
        """Whether :meth:`send_waiting` can be used."""
        return True

    @property
    def pending(self) -> bool:
        """Whether bytes have been read from the kernel that :meth:`receive` has not given out."""
        return False

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        self._shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """End both directions; wakes whoever waits for the socket."""
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        try:
            socket.socket.shutdown(self.sock, how)  # not SSLSocket's, which would go on in plain text
        except OSError:
            pass

    def close(self) -> None:
        """Let go of the socket, and of file descriptors that nobody took."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.sock.close()

    def _take_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, sort, data in ancillary:
            if level == socket.SOL_SOCKET and sort == socket.SCM_RIGHTS:
                rights = array.array("i")
                rights.frombytes(data[: len(data) - len(data) % rights.itemsize])
                self.fds.extend(rights)


class TlsStream(Stream):
    """The same under TLS. OpenSSL's object is not made for two threads at once, so a lock keeps them apart.

    :param sock: connected; wrapped here, and the handshake is made with the first bytes.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool, host: str | None = None) -> None:
        super().__init__(sock)
        sock.setblocking(False)  # OpenSSL knows no flag for a single call
        self._lock = threading.Lock()
        name = host if not server and context.check_hostname else None
        self._tls = context.wrap_socket(
            sock, server_side=server, do_handshake_on_connect=False, server_hostname=name, suppress_ragged_eofs=True
        )
        self.sock = self._tls

    def receive(self, into: memoryview) -> int:
        """See :class:`Stream`."""
        try:
            with self._lock:
                count = self._tls.recv_into(into)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError):
            return 0
        except (OSError, ValueError) as error:
            raise Broken(_reason(error)) from None
        if not count:
            raise Broken("closed the connection")
        return count

    def send(self, buffers: Sequence[bytes | memoryview], fd: int | None = None) -> int:
        """See :class:`Stream`; file descriptors cannot be sent."""
        sent = 0
        try:
            for buffer in buffers:
                view = memoryview(buffer)
                while view.nbytes:
                    with self._lock:
                        count = self._tls.send(view[: 1 << 16])
                    sent += count
                    view = view[count:]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError):
            pass
        except (OSError, ValueError) as error:
            raise Broken(_reason(error)) from None
        return sent

    @property
    def waits(self) -> bool:
        """See :class:`Stream`."""
        return False

    @property
    def pending(self) -> bool:
        """See :class:`Stream`."""
        with self._lock:
            return self._tls.pending() > 0


_RECEIVE_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0) | socket.MSG_DONTWAIT
_FD_SPACE = socket.CMSG_SPACE(FDS * array.array("i").itemsize)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"failed under TLS ({error.reason or error})"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "closed the connection"
    if isinstance(error, TimeoutError) or getattr(error, "errno", None) in _UNREACHABLE:
        return "is not reachable any more"
    return f"was lost ({getattr(error, 'strerror', None) or error})"


_UNREACHABLE = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT))


def tune(sock: socket.socket) -> None:
    """Small messages leave at once, and a host that is gone is noticed within :data:`DEAD_SECONDS`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEP_IDLE), ("TCP_KEEPINTVL", KEEP_INTERVAL), ("TCP_KEEPCNT", KEEP_COUNT)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


_TCP_INFO = struct.Struct("<BBBBB3x13I")


def host_is_silent(info: bytes) -> bool:
    """Whether the host at the other end owes an answer for long, by the kernel's ``TCP_INFO`` of a connection.

    Seen twice in a row, :data:`LOOK_SECONDS` apart, it means that the host is gone; once may be a probe that was sent just now.

    Keepalive is silent while sent bytes wait to be acknowledged, and ``TCP_USER_TIMEOUT`` (RFC 5482) on Linux also ends
    connections to a host whose process merely does not read for a while. This tells the two apart: a living kernel
    acknowledges retransmissions and window probes, which sets their counters back.

    :param info: what ``getsockopt(IPPROTO_TCP, TCP_INFO)`` gives (struct tcp_info of linux/tcp.h).
    """
    if len(info) < _TCP_INFO.size:
        return False
    fields = _TCP_INFO.unpack_from(info)
    retransmits, probes = fields[2], fields[3]
    unacknowledged, last_heard_ms = fields[5 + 4], fields[5 + 12]
    waiting = (unacknowledged and retransmits >= 3) or probes
    return bool(waiting) and last_heard_ms >= DEAD_SECONDS * 1000
