"""Sending one message to some peers, from the thread that has it.

What the kernels take at once is gone after one call each; for the rest this waits for all of the sockets together, so
that a slow peer does not hold up the others. The buffers are referred to, not copied, which is why it waits at all.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Iterable, Sequence

from flame.sdk.backends.p2p_connection import Connection
from flame.sdk.backends.p2p_stream import IOVECS, Broken


class _Outgoing:
    """A message on its way to one peer, whose connection's lock is held until it is through."""

    __slots__ = ("buffers", "connection", "fd", "sent", "unsent")

    def __init__(self, connection: Connection, buffers: Sequence[bytes | memoryview], fd: int | None) -> None:
        self.connection = connection
        # Short records that wait to be sent go first; a part of one may be out already.
        self.unsent = connection.take_unsent()
        self.buffers: deque[bytes | memoryview] = deque([self.unsent, *buffers] if self.unsent else buffers)
        self.sent = 0
        self.fd = fd

    def push(self, *, wait: bool = False, deadline: float | None = None) -> bool:
        """Hand over what the kernel takes; True when all of it is gone.

        :param wait: let the kernel wait for room, up to the deadline.
        :raises Broken: the connection is over.
        """
        buffers, stream = self.buffers, self.connection.stream
        if self.connection.broken is not None:
            raise Broken(self.connection.broken)
        while buffers:
            some = list(buffers) if len(buffers) <= IOVECS else [buffers[i] for i in range(IOVECS)]
            if wait:
                count = stream.send_waiting(some, None if deadline is None else deadline - time.monotonic())
            else:
                count = stream.send(some, self.fd)
            if not count:
                return False
            self.fd = None
            self.sent += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.popleft())
            if count:
                buffers[0] = memoryview(buffers[0])[count:]
        return True

    def give_up(self, reason: str) -> None:
        """Not all of it could be sent: who has a part of it could not tell the rest from the next message."""
        if self.sent:
            self.connection.fail(reason)
        else:
            self.connection.put_back(self.unsent)
        self.connection.unlock()


def send_all(
    connections: Sequence[Connection],
    buffers: Sequence[bytes | memoryview],
    deadline: float | None,
    fd: int | None = None,
) -> dict[str, str]:
    """Send the same buffers over some connections; returns when they are in the kernel, or cannot get there.

    A peer that does not take its message in time is cut off if it took a part of it. It comes back by itself, with a new
    connection.

    :param deadline: by :func:`time.monotonic`; None waits as long as it takes.
    :param fd: a file descriptor that goes along.
    :returns: the ends that were not served, each with the reason.
    """
    failed: dict[str, str] = {}
    going: dict[int, _Outgoing] = {}  # by the socket's number

    def start(connection: Connection) -> None:
        number = connection.stream.sock.fileno()
        going[number] = _Outgoing(connection, buffers, fd)
        step(number)

    def step(number: int, *, wait: bool = False) -> None:
        """Push; done with this one when all is sent or it is broken."""
        connection = going[number].connection
        try:
            if not going[number].push(wait=wait, deadline=deadline):
                return
        except Broken as error:
            failed[connection.end] = connection.broken or str(error)
            connection.fail(str(error))
        del going[number]
        connection.unlock()

    later = [connection for connection in connections if not connection.lock.acquire(blocking=False)]
    try:
        for connection in connections:
            if connection not in later:
                start(connection)
        while going or later:
            while later and not going:
                # Another thread sends there, and nothing else is left to do meanwhile.
                connection = later.pop()
                if connection.lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                    start(connection)
                else:
                    failed[connection.end] = "is still busy with an earlier message"
            if len(going) == 1 and all(outgoing.connection.stream.waits for outgoing in going.values()):
                step(next(iter(going)), wait=True)
            elif going:
                for number in _wait_writable(going, deadline):
                    step(number)
            if deadline is not None and time.monotonic() >= deadline:
                for outgoing in going.values():
                    failed[outgoing.connection.end] = LATE
                    outgoing.give_up(LATE)
                going.clear()
    finally:
        for outgoing in going.values():  # interrupted
            outgoing.give_up("was interrupted in the middle of a message")
    return failed


#: What is said of a peer that let the deadline pass.
LATE = "did not take a message in time"


def _wait_writable(going: Iterable[int], deadline: float | None) -> list[int]:
    poller = select.poll()
    for number in going:
        poller.register(number, select.POLLOUT)
    # A connection that is ended from elsewhere is shut down, which wakes this, but not closed: we hold its lock.
    return [number for number, _ in poller.poll(deadline and max(0.0, 1000 * (deadline - time.monotonic())))]
