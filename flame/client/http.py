"""HTTP to one Flame server: calls that answer with JSON, and streams that stay open.

It knows what is Flame's own: the JSON forms, the errors, the bearer token, and what a silence means; how requests and answers travel
is said in :mod:`flame.client.wire`. An idempotent request is repeated there when a kept connection turned out to be closed before it was
answered; nothing else is repeated. Who may repeat more, does so: see :mod:`flame.client.follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import IO, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from flame import errors
from flame.client import wire
from flame.client.tls import Tls
from flame.errors import ServerError, ServerUnreachable, UsageError

T = TypeVar("T")
Query = Mapping[str, str | int | None]

#: The longest a connection may take to open, in seconds.
CONNECT_TIMEOUT = 10.0
#: The longest a server may take to begin its answer, in seconds. Uploads get more, by their size.
ANSWER_TIMEOUT = 60.0
#: The longest silence within an answer, in seconds; in a stream the server sends an empty line every 10 s.
IDLE_TIMEOUT = 30.0

_SLOWEST_UPLOAD = 100_000  # bytes a second
_ERRORS = {
    cls.__name__: cls
    for cls in (
        errors.UsageError,
        errors.SpecError,
        errors.NotFound,
        errors.Conflict,
        errors.Unauthorized,
        errors.Forbidden,
        errors.TooManyRequests,
        errors.ServerError,
        errors.ServerUnreachable,
        errors.StoreError,
        errors.RunnerError,
    )
}


class Answer:
    """An answer whose body has still to be read. Made by :meth:`Session.open`.

    :ivar status: the HTTP status.
    :ivar headers: the headers, names in lower case.
    """

    def __init__(self, response: wire.Response) -> None:
        self.status = response.status
        self.headers = response.headers
        self._response = response

    async def chunks(self, *, idle: float = IDLE_TIMEOUT) -> AsyncIterator[bytes]:
        """The body as it comes.

        :param idle: the longest silence, in seconds.
        :raises flame.errors.ServerUnreachable: the connection broke, or was silent for too long.
        """
        try:
            while True:
                async with asyncio.timeout(idle):
                    piece = await self._response.piece()
                if not piece:
                    return
                yield piece
        except (TimeoutError, wire.Broken) as error:
            raise ServerUnreachable(
                f"The connection to the server was lost in the middle of an answer ({_why(error)})."
            ) from error

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
    :param tls: whom to trust and what to show, where the address says https; None: what the environment says.
    :raises flame.errors.UsageError: the address is none.
    """

    def __init__(self, server: str, token: str | None = None, tls: Tls | None = None) -> None:
        parts = urlsplit(server)
        try:
            parts.port  # noqa: B018 - a property that raises
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"{server!r} is not a server's address; write it like http://127.0.0.1:10100.")
        self.server = server.rstrip("/")
        self._headers = {"Accept": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {_safe(token)}"
        #: The project in which new things are made; None leaves it to the server.
        self.project: str | None = None
        self._tls = (tls or Tls.read()) if parts.scheme == "https" else None
        self._parts = parts
        self._wire: wire.Wire | None = None

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._wire is not None:
            await self._wire.close()
            self._wire = None

    async def distrust(self) -> None:
        """Close the connections that wait to be used again: the way to the server may have changed, and they lead nowhere."""
        if self._wire is not None:
            await self._wire.close()

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
        headers = {}
        if body is not msgspec.UNSET:
            data, headers["Content-Type"] = msgspec.json.encode(body), "application/json"
        elif data is not None:
            headers["Content-Type"] = "application/octet-stream"
        limit = ANSWER_TIMEOUT
        if data is not None:
            headers["Content-Length"] = str(_length(data))
            limit += _length(data) / _SLOWEST_UPLOAD
        response = await self._request(method, path, query, headers, data, limit)
        try:
            answer = Answer(response)
            if answer.status >= 300:
                raise _refusal(self.server, f"{method} {path}", answer.status, await answer.read())
            yield answer
        finally:
            await response.close()

    async def _request(  # noqa: PLR0917
        self,
        method: str,
        path: str,
        query: Query | None,
        headers: dict[str, str],
        data: bytes | IO[bytes] | None,
        limit: float,
    ) -> wire.Response:
        """Send a request and wait for the head of its answer."""
        given = {name: str(value) for name, value in (query or {}).items() if value is not None}
        target = quote(self._parts.path.rstrip("/") + path, safe="/:@!$&'()*+,;=-._~%") + (
            f"?{urlencode(given)}" if given else ""
        )
        host = self._parts.hostname or ""
        if self._wire is None:
            tls = self._tls.context() if self._tls is not None else None
            port = self._parts.port or (443 if tls else 80)
            self._wire = wire.Wire(wire.Address(host, port, tls), CONNECT_TIMEOUT)
        if data is None or (isinstance(data, bytes) and len(data) <= wire.READ):
            body = wire.Body(data or b"")
        else:
            body = wire.Body(pieces=_Pieces(data))
        try:
            async with asyncio.timeout(limit):
                return await self._wire.request(
                    method, target, {"Host": self._parts.netloc.rpartition("@")[2], **self._headers, **headers}, body
                )
        except wire.Unreachable as error:
            cause = error.__cause__ or error
            if isinstance(cause, ssl.CertificateError):
                raise ServerUnreachable(
                    f"The server at {self.server} is not trusted ({_verdict(cause)}). Name the authority that vouches for it: "
                    "FLAME_CA, or `flame config set ca FILE`."
                ) from error
            raise ServerUnreachable(
                f"No server answers at {self.server} ({_why(cause)}). "
                "Start one with `flame serve`, or name another with --server, FLAME_SERVER or `flame config set server URL`."
            ) from error
        except TimeoutError as error:
            raise ServerUnreachable(f"The server at {self.server} did not answer within {limit:.0f} s.") from error
        except wire.Broken as error:
            raise ServerUnreachable(f"The connection to the server at {self.server} was lost ({error}).") from error


class _Pieces(wire.Pieces):
    """Bytes, or a file, that are sent in pieces."""

    def __init__(self, data: bytes | IO[bytes]) -> None:
        self._data = data

    def __aiter__(self) -> AsyncIterator[bytes | memoryview]:
        """From the beginning."""
        return _pieces(self._data)


async def _pieces(data: bytes | IO[bytes]) -> AsyncIterator[bytes | memoryview]:
    """Bytes in pieces; a file's from its beginning, read off the event loop."""
    if isinstance(data, bytes):
        for start in range(0, len(data), wire.READ):
            yield memoryview(data)[start : start + wire.READ]
        return
    data.seek(0)
    while piece := await asyncio.to_thread(data.read, wire.READ):
        yield piece


def refusal(name: str, message: str) -> errors.FlameError:
    """The error of this name, as the server says it."""
    return _ERRORS.get(name, ServerError)(message)


def _refusal(server: str, what: str, status: int, content: bytes) -> errors.FlameError:
    """The error that an answer stands for. One that has not Flame's form is of a proxy or of a stranger."""
    try:
        form = msgspec.json.decode(content)["error"]
        name, message = str(form["type"]), str(form["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        if status == 404 and what.startswith("HEAD "):  # such an answer has no body
            return errors.NotFound(f"{server} has nothing at {what.removeprefix('HEAD ')}.")
        return ServerError(f"{server} answered {what} with status {status} and no reason: is this a Flame server?")
    return refusal(name, message)


def _length(data: bytes | IO[bytes]) -> int:
    return len(data) if isinstance(data, bytes) else os.fstat(data.fileno()).st_size


def _safe(token: str) -> str:
    if not token.isascii() or not token.isprintable():
        raise UsageError(
            "The token holds characters that no token has; set it again with `flame config set token TOKEN`."
        )
    return token


def _verdict(error: ssl.CertificateError) -> str:
    return str(getattr(error, "verify_message", "") or error).rstrip(".")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__
