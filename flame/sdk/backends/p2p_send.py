"""Sending one message to some peers, from the thread that has it.

What the kernels take at once is gone after one call each; for the rest this waits for all of the sockets together, so
that a slow peer does not hold up the others. The buffers are referred to, not copied, which is why it waits at all.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Sequence

from flame.sdk.backends.p2p_connection import Connection
from flame.sdk.backends.p2p_stream import IOVECS, Broken


class _Outgoing:
    """A message on its way to one peer."""

    __slots__ = ("buffers", "connection", "fd", "sent", "unsent")

    def __init__(self, connection: Connection, buffers: Sequence[bytes | memoryview], fd: int | None) -> None:
        self.connection = connection
        # Short records that wait to be sent go first; a part of one may be out already.
        self.unsent = connection.take_unsent()
        self.buffers: deque[bytes | memoryview] = deque([self.unsent, *buffers] if self.unsent else buffers)
        self.sent = 0
        self.fd = fd

    def push(self) -> bool:
        """Hand over what the kernel takes now; True when all of it is gone. Raises Broken."""
        buffers = self.buffers
        while buffers:
            some = list(buffers) if len(buffers) <= IOVECS else [buffers[i] for i in range(IOVECS)]
            count = self.connection.stream.send(some, self.fd)
            if not count:
                return False
            self.fd = None
            self.sent += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.popleft())
            if count:
                buffers[0] = memoryview(buffers[0])[count:]
        return True


def send_all(
    connections: Sequence[Connection],
    buffers: Sequence[bytes | memoryview],
    deadline: float | None,
    fd: int | None = None,
) -> dict[str, str]:
    """Send the same buffers over some connections; returns when they are in the kernel, or cannot get there.

    A peer that does not take its message in time is cut off if it took a part of it: the rest could not be told from
    the next message. It comes back by itself, with a new connection.

    :param deadline: by :func:`time.monotonic`; None waits as long as it takes.
    :returns: the ends that were not served, each with the reason.
    """
    failed: dict[str, str] = {}
    locked: dict[int, _Outgoing] = {}
    later: list[Connection] = []

    def start(connection: Connection) -> None:
        outgoing = _Outgoing(connection, buffers, fd)
        if not step(outgoing):
            locked[connection.stream.sock.fileno()] = outgoing

    def step(outgoing: _Outgoing) -> bool:
        """Push; True when this one needs no more."""
        connection = outgoing.connection
        try:
            if connection.broken is not None:
                raise Broken(connection.broken)
            if not outgoing.push():
                return False
        except Broken as error:
            failed[connection.end] = str(error)
            connection.fail(str(error))
        connection.unlock()
        return True

    for connection in connections:
        if connection.lock.acquire(blocking=False):
            start(connection)
        else:
            later.append(connection)
    while locked or later:
        for connection in later[:] if not locked else ():
            # Another thread sends there; nothing else is left to do meanwhile.
            if connection.lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                start(connection)
            else:
                failed[connection.end] = "is still busy with an earlier message"
            later.remove(connection)
        if not locked:
            continue
        left = None if deadline is None else deadline - time.monotonic()
        for number in _wait_writable(locked, left):
            if step(locked[number]):
                del locked[number]
        if deadline is not None and time.monotonic() >= deadline:
            for outgoing in locked.values():
                _give_up(outgoing, failed)
            locked.clear()
    return failed


def _wait_writable(outgoing: dict[int, _Outgoing], seconds: float | None) -> list[int]:
    poller = select.poll()
    for number in outgoing:
        poller.register(number, select.POLLOUT)
    # A connection that is ended from elsewhere is shut down, which wakes this, but not closed: we hold its lock.
    return [number for number, _ in poller.poll(None if seconds is None else max(0.0, seconds * 1000))]


def _give_up(outgoing: _Outgoing, failed: dict[str, str]) -> None:
    connection = outgoing.connection
    failed[connection.end] = "did not take a message in time"
    if not outgoing.sent:
        connection.put_back(outgoing.unsent)
    else:
        connection.fail("did not take a message in time")
    connection.unlock()
