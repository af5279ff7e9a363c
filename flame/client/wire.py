"""HTTP/1.1 over asyncio's streams: as much of it as a Flame server speaks, and no more.

A worker holds this in memory for as long as it lives, and each one pays for its import. A whole HTTP library costs every
flamelet 90 ms of a core and 10 MB; this is a few pages, of which nothing is for anybody else's server: no redirects, cookies,
proxies, compression or upgrades. Connections are kept and used again. What cannot be understood is an error, never a guess.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import NamedTuple

#: The most that a connection gives at once, in bytes.
READ = 256 * 1024
#: The longest head of an answer, in bytes.
_LONGEST_HEAD = 64 * 1024
#: What may be sent twice without harm.
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class Unreachable(Exception):
    """No connection could be made; the cause is the ``__cause__``."""


class Broken(Exception):
    """The connection ended in the middle of something, or what came was no HTTP."""


class Address(NamedTuple):
    """Where a server is."""

    host: str
    port: int
    tls: ssl.SSLContext | None


class Pieces:
    """A body that does not lie in memory."""

    def __aiter__(self) -> AsyncIterator[bytes | memoryview]:
        """The body from its beginning."""
        raise NotImplementedError


class Body(NamedTuple):
    """What is sent with a request.

    :ivar data: all of it, where it is at hand.
    :ivar pieces: gives it in pieces, each time from its beginning.
    """

    data: bytes = b""
    pieces: Pieces | None = None


class _Connection:
    """A connection, and whether it has been used before."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.used = False

    @property
    def dead(self) -> bool:
        return self.writer.is_closing() or self.reader.at_eof() or self.reader.exception() is not None

    def close(self) -> None:
        # Nobody waits for what may still be on its way, and TLS's own farewell would.
        self.writer.transport.abort()


class Response:
    """An answer whose body is read by the caller. :meth:`close` is called in any case.

    :ivar status: the HTTP status.
    :ivar headers: the headers, names in lower case.
    """

    def __init__(
        self, wire: Wire, connection: _Connection, sending: asyncio.Task[None] | None, head: bytes, bare: bool
    ):
        self._wire = wire
        self._connection = connection
        self._sending = sending
        self._reader = connection.reader
        self.status, self.headers, persistent = _parse(head)
        self._left = 0  # bytes to come of the body, or of the chunk that is being read
        self._chunked = self._endless = self._between = False
        self._ended = bare or self.status in (204, 304)
        if not self._ended:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                self._chunked = True
            elif (length := self.headers.get("content-length")) is not None:
                if not (length.isascii() and length.isdigit()):
                    raise Broken(f"its length is {length!r}")
                self._left = int(length)
                self._ended = self._left == 0
            else:
                self._endless = True
        self._persistent = persistent and not self._endless

    async def piece(self) -> bytes:
        """What is there of the body; empty at its end.

        :raises Broken: the connection ended before the body did.
        """
        if self._chunked and not self._left and not self._ended:
            await self._next_chunk()
        if self._ended:
            return b""
        data = await _guarded(self._reader.read(READ if self._endless else min(self._left, READ)))
        if self._endless:
            self._ended = not data
            return data
        if not data:
            raise Broken("it was closed")
        self._left -= len(data)
        if not self._left:
            self._between = self._chunked
            self._ended = not self._chunked
        return data

    async def _next_chunk(self) -> None:
        if self._between and await _guarded(self._reader.readexactly(2)) != b"\r\n":
            raise Broken("a chunk is longer than it says")
        line = await _guarded(self._reader.readuntil(b"\r\n"))
        try:
            self._left = int(line.split(b";")[0].strip(), 16)
        except ValueError as error:
            raise Broken("a chunk has no length") from error
        self._between = True
        if not self._left:
            while await _guarded(self._reader.readuntil(b"\r\n")) != b"\r\n":
                pass  # trailers
            self._ended = True

    async def close(self) -> None:
        """Give the connection back if the answer was read to its end, else close it."""
        whole = self._ended and self._persistent
        if self._sending is not None:
            whole = whole and self._sending.done() and not self._sending.cancelled() and not self._sending.exception()
            await _cancelled(self._sending)
        if whole and not self._connection.dead:
            self._wire.keep(self._connection)
        else:
            self._connection.close()


class Wire:
    """The connections to one server.

    :param address: where it is.
    :param connect: the longest that a connection may take to open, in seconds.
    """

    def __init__(self, address: Address, connect: float) -> None:
        self._address = address
        self._connect = connect
        self._idle: list[_Connection] = []

    async def request(self, method: str, target: str, headers: Mapping[str, str], body: Body) -> Response:
        """Send a request, and give its answer as soon as the head is there.

        A kept connection that turns out to be closed before anything was answered is no fault, where asking twice does no
        harm.

        :raises Unreachable: no connection can be made.
        :raises Broken: it was lost.
        """
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        while True:
            connection = self._kept() or await self._open()
            try:
                return await self._exchange(connection, method, head, body)
            except BaseException as error:
                connection.close()
                if not (connection.used and isinstance(error, _Silent) and method in _IDEMPOTENT):
                    raise

    def keep(self, connection: _Connection) -> None:
        """Take back a connection that can be used again."""
        connection.used = True
        self._idle.append(connection)

    async def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # the loop lets go of the sockets in its next turn

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.dead:
                return connection
            connection.close()
        return None

    async def _open(self) -> _Connection:
        host, port, tls = self._address
        try:
            async with asyncio.timeout(self._connect):
                return _Connection(
                    *await asyncio.open_connection(host, port, ssl=tls, limit=_LONGEST_HEAD, happy_eyeballs_delay=0.25)
                )
        except (OSError, TimeoutError, ssl.CertificateError, UnicodeError) as error:
            raise Unreachable from error

    async def _exchange(self, connection: _Connection, method: str, head: bytes, body: Body) -> Response:
        sending = None
        if body.pieces is None:
            connection.writer.write(head + body.data)
        else:
            connection.writer.write(head)
            sending = asyncio.ensure_future(_send(connection.writer, body.pieces))
        try:
            while True:
                answer = await _head(connection.reader)
                response = Response(self, connection, sending, answer, method == "HEAD")
                if response.status >= 200:
                    return response
        except BaseException:
            if sending is not None:
                await _cancelled(sending)
            raise


class _Silent(Broken):
    """Nothing of an answer has come."""


async def _send(writer: asyncio.StreamWriter, pieces: Pieces) -> None:
    """Send a body. Where the connection breaks, the answer that was on its way, if there is one, says why."""
    with contextlib.suppress(OSError):
        async for piece in pieces:
            writer.write(piece)
            await writer.drain()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        raise Broken("it was closed") if error.partial else _Silent("it was closed") from error
    except asyncio.LimitOverrunError as error:
        raise Broken("the answer's head is too long") from error
    except OSError as error:
        raise _Silent(_reason(error)) from error


def _parse(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Status and headers of an answer, and whether the connection stays."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    code = rest.partition(" ")[0]
    if not (version.startswith("HTTP/1.") and len(code) == 3 and code.isascii() and code.isdigit()):
        raise Broken(f"{first[:40]!r} is no HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    connection = headers.get("connection", "").lower()
    return int(code), headers, "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)


async def _guarded(reading: Awaitable[bytes]) -> bytes:
    """What is read; whatever goes wrong with the connection is one kind of error."""
    try:
        return await reading
    except asyncio.IncompleteReadError as error:
        raise Broken("it was closed") from error
    except (OSError, asyncio.LimitOverrunError, ValueError) as error:
        raise Broken(_reason(error)) from error


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if isinstance(number, int) and number > 0 else str(error) or type(error).__name__
