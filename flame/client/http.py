"""HTTP/1.1 to one Flame server: calls that answer with JSON, and streams that stay open.

Why not an HTTP library: every worker runs a flamelet, and every command of the CLI waits for its imports. aiohttp
costs each of them 90 ms of processor time and 12 MB of memory; this module costs next to nothing, since
asyncio is there anyway. It speaks what the Flame server and the proxies before it speak: content lengths and chunks,
kept connections, TLS. It follows no redirects and keeps no cookies.

Nothing is repeated here but a request whose kept connection turned out to be closed before it was
answered, and only if the method is idempotent (RFC 9110, 9.2.2). Who may repeat more, does so: see :mod:`flame.client.follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import IO, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from flame import errors
from flame.errors import ServerError, ServerUnreachable, UsageError

T = TypeVar("T")
Query = Mapping[str, str | int | None]

#: The longest a connection may take to open, in seconds.
CONNECT_TIMEOUT = 10.0
#: The longest a server may take to begin its answer, in seconds. Uploads get more, by their size.
ANSWER_TIMEOUT = 60.0
#: The longest silence within an answer, in seconds; in a stream the server sends an empty line every 10 s.
IDLE_TIMEOUT = 30.0

_READ = 256 * 1024
_SLOWEST_UPLOAD = 100_000  # bytes a second
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_ERRORS = {
    cls.__name__: cls
    for cls in (
        errors.UsageError,
        errors.NotFound,
        errors.Conflict,
        errors.Unauthorized,
        errors.Forbidden,
        errors.ServerError,
        errors.StoreError,
        errors.RunnerError,
    )
}


class _Lost(Exception):
    """The connection broke. ``answered`` says whether any byte of an answer had come."""

    def __init__(self, cause: BaseException, *, answered: bool) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.answered = answered


class _Connection:
    """A connection that is kept between requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.used = False

    @property
    def usable(self) -> bool:
        return not (self.reader.at_eof() or self.writer.is_closing())

    def close(self) -> None:
        self.writer.close()


class Answer:
    """An answer whose body has still to be read. Made by :meth:`Session.open`.

    :ivar status: the HTTP status.
    :ivar headers: the headers, names in lower case.
    """

    def __init__(self, connection: _Connection, status: int, headers: dict[str, str], *, bodiless: bool) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        self._left = 0 if bodiless else int(length) if length is not None and length.isdigit() else None
        self._whole = bodiless or self._left == 0
        self._keep = headers.get("connection", "").lower() != "close"

    @property
    def reusable(self) -> bool:
        """True once the body was read to its end and the server keeps the connection."""
        return self._whole and self._keep

    async def chunks(self, *, idle: float = IDLE_TIMEOUT) -> AsyncIterator[bytes]:
        """The body as it comes.

        :param idle: the longest silence, in seconds.
        :raises flame.errors.ServerUnreachable: the connection broke, or was silent for too long.
        """
        try:
            while not self._whole:
                async with asyncio.timeout(idle):
                    piece = await self._piece()
                if piece:
                    yield piece
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            raise ServerUnreachable(
                f"The connection to the server was lost in the middle of an answer ({_why(error)})."
            ) from error

    async def _piece(self) -> bytes:
        """The next bytes of the body; empty at its end."""
        reader = self._connection.reader
        if self._chunked and not self._left:
            size = int((await reader.readuntil(b"\n")).partition(b";")[0], 16)
            if size == 0:
                while (await reader.readuntil(b"\n")).strip():
                    pass  # trailers
                self._whole = True
                return b""
            self._left = size
        piece = await reader.read(_READ if self._left is None else min(_READ, self._left))
        if self._left is None:  # neither length nor chunks: the body ends with the connection
            self._whole, self._keep = not piece, False
            return piece
        if not piece:
            raise EOFError("the server closed it")
        self._left -= len(piece)
        if not self._left:
            if self._chunked:
                await reader.readuntil(b"\n")
            else:
                self._whole = True
        return piece

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.chunks()])

    async def lines(self, *, idle: float = IDLE_TIMEOUT) -> AsyncIterator[bytes]:
        """The body line by line, without the line ends; empty lines (signs of life) too."""
        rest = b""
        async for piece in self.chunks(idle=idle):
            *lines, rest = (rest + piece).split(b"\n") if rest else piece.split(b"\n")
            for line in lines:
                yield line


class Session:
    """Requests to one server with one token. An async context manager.

    :param server: the address, such as ``http://127.0.0.1:10100``.
    :param token: sent as bearer token; None sends none.
    :raises flame.errors.UsageError: the address is none.
    """

    def __init__(self, server: str, token: str | None = None) -> None:
        parts = urlsplit(server)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{server!r} is not a server's address; write it like http://127.0.0.1:10100.")
        self.server = server.rstrip("/")
        self._tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: application/json\r\n"
        if token:
            self._head += f"Authorization: Bearer {_safe(token)}\r\n"
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        self._busy.clear()

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = msgspec.UNSET,
        data: bytes | IO[bytes] | None = None,
        into: type[T] | None = None,
    ) -> T:
        """Send a request and read its answer.

        :param body: sent as JSON.
        :param data: bytes, or a file open for reading, sent as they are (instead of ``body``).
        :param into: the type of the answer; ``bytes`` gives it undecoded, None passes it over.
        :raises flame.errors.FlameError: what the server refused it with, or ServerUnreachable.
        """
        async with self.open(method, path, query=query, body=body, data=data) as answer:
            content = await answer.read()
        if into is None or into is bytes:
            return content  # type: ignore[return-value]
        try:
            return msgspec.json.decode(content, type=into)
        except msgspec.MsgspecError as error:
            raise ServerError(
                f"{self.server} answered {method} {path} with something unknown ({error}): is this a Flame server of another version?"
            ) from error

    @contextlib.asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = msgspec.UNSET,
        data: bytes | IO[bytes] | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request and give the answer as soon as its head is there; its body is read by the caller.

        :raises flame.errors.FlameError: as for :meth:`call`.
        """
        kind = "application/octet-stream"
        if body is not msgspec.UNSET:
            data, kind = msgspec.json.encode(body), "application/json"
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = self._prefix + quote(path, safe="/:@!$&'()*+,;=-._~") + (f"?{urlencode(given)}" if given else "")
        head = f"{method} {target} HTTP/1.1\r\n{self._head}"
        if data is not None or method in ("POST", "PUT"):
            head += f"Content-Type: {kind}\r\nContent-Length: {_length(data)}\r\n"
        connection, answer = await self._exchange(method, f"{head}\r\n".encode("latin-1"), data)
        try:
            if answer.status >= 300:
                raise _refusal(self.server, f"{method} {path}", answer.status, await answer.read())
            yield answer
        finally:
            self._busy.discard(connection)
            if answer.reusable and connection.usable:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.close()

    async def _exchange(self, method: str, head: bytes, data: bytes | IO[bytes] | None) -> tuple[_Connection, Answer]:
        """Send a request over a kept or a new connection and read the head of its answer."""
        limit = ANSWER_TIMEOUT + _length(data) / _SLOWEST_UPLOAD
        while True:
            connection = await self._connection()
            self._busy.add(connection)
            try:
                async with asyncio.timeout(limit):
                    return connection, await _request(connection, method, head, data)
            except TimeoutError as error:
                self._drop(connection)
                raise ServerUnreachable(f"The server at {self.server} did not answer within {limit:.0f} s.") from error
            except _Lost as lost:
                self._drop(connection)
                if connection.used and not lost.answered and method in _IDEMPOTENT:
                    continue
                raise ServerUnreachable(f"The connection to the server at {self.server} was lost ({lost}).") from lost
            except BaseException:
                self._drop(connection)
                raise

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        tls = None
        if self._tls:
            import ssl

            tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=tls, limit=_READ))
        except (OSError, TimeoutError) as error:
            raise ServerUnreachable(
                f"No server answers at {self.server} ({_why(error)}). "
                "Start one with `flame serve`, or name another with --server, FLAME_SERVER or `flame config set server URL`."
            ) from error

    def _drop(self, connection: _Connection) -> None:
        self._busy.discard(connection)
        connection.close()


async def _request(connection: _Connection, method: str, head: bytes, data: bytes | IO[bytes] | None) -> Answer:
    """Write a request and read the head of its answer."""
    reader, writer = connection.reader, connection.writer
    broken: OSError | None = None
    try:
        if isinstance(data, bytes):
            writer.write(head + data if len(data) < _READ else head)
            if len(data) >= _READ:
                writer.write(data)
            await writer.drain()
        else:
            writer.write(head)
            if data is not None:
                data.seek(0)
                await asyncio.get_running_loop().sendfile(writer.transport, data)
    except OSError as error:
        broken = error  # a server that refuses an upload may answer and close before it was read whole
    answered = False
    try:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            answered = True
            status = int(lines[0].split(" ", 2)[1])
            if status >= 200:
                break
    except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
        cause = broken or error
        raise _Lost(cause if str(cause) else EOFError("it was closed"), answered=answered) from error
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if broken:
        headers["connection"] = "close"
    return Answer(connection, status, headers, bodiless=method == "HEAD" or status in (204, 304))


def _refusal(server: str, what: str, status: int, content: bytes) -> errors.FlameError:
    """The error that an answer stands for. One that has not Flame's form is of a proxy or of a stranger."""
    try:
        form = msgspec.json.decode(content)["error"]
        name, message = str(form["type"]), str(form["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return ServerError(f"{server} answered {what} with status {status} and no reason: is this a Flame server?")
    if name == "SpecError":
        return errors.SpecError(message)
    return _ERRORS.get(name, ServerError)(message)


def _length(data: bytes | IO[bytes] | None) -> int:
    if data is None or isinstance(data, bytes):
        return len(data or b"")
    return os.fstat(data.fileno()).st_size


def _safe(token: str) -> str:
    if not token.isascii() or not token.isprintable():
        raise UsageError(
            "The token holds characters that no token has; set it again with `flame config set token TOKEN`."
        )
    return token


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "it took too long"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
