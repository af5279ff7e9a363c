"""A connection for messages in asyncio: of a client, and on the server's side those of clients and executors.

What is sent within one turn of the event loop leaves in one write. Who sends faster than the other side reads is told by
:attr:`Link.full`, and when that is over by ``on_room``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from flame.errors import CodecError
from flame.sessions.sockets import alive
from flame.sessions.wire import Frames, frame

log = logging.getLogger("flame.sessions")

#: Bytes that may wait for the other side before the link counts as full.
HIGH_WATER = 4 << 20


class Link(asyncio.Protocol):
    """One connection.

    :param on_message: gets each message.
    :param on_lost: called once when the connection is over.
    :ivar full: more waits to be sent than should.
    :ivar lost: the connection is over.
    """

    def __init__(self, on_message: Callable[[list[Any]], None], on_lost: Callable[[], None]) -> None:
        self.on_message = on_message
        self.on_lost = on_lost
        self.on_room: Callable[[], None] = _nothing
        self.full = False
        self.lost = False
        self._frames = Frames()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.BaseProtocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != 1:  # no AF_UNIX
            alive(connection)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`. A message that cannot be dealt with ends the connection."""
        try:
            for message in self._frames.feed(data):
                self.on_message(message)
        except CodecError as error:
            log.warning("a connection is closed: %s", error)
            self.close()
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # its fields are not as they should be
            log.warning("a connection is closed, its messages make no sense: %r", error, exc_info=error)
            self.close()

    def send(self, *message: Any) -> None:
        """Send a message, together with all others of this turn of the loop. Nothing happens on a lost link."""
        if self.lost:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame(*message))

    def close(self) -> None:
        """End the connection, after what was sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        """See :class:`asyncio.BaseProtocol`."""
        self.full = True

    def resume_writing(self) -> None:
        """See :class:`asyncio.BaseProtocol`."""
        self.full = False
        self.on_room()

    def pause_reading(self) -> None:
        """Take nothing in any more, until :meth:`resume_reading`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take in what comes."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.BaseProtocol`."""
        if not self.lost:
            self.lost = True
            self._out.clear()
            self.on_lost()

    def _flush(self) -> None:
        if self._out and self._transport is not None and not self.lost:
            out, self._out = self._out, []
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))


def _nothing() -> None:
    """What a link does where nobody cares."""
