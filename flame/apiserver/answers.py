"""How answers and streams are written."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from flame.artifacts import Artifact, Artifacts
from flame.controller.standing import Stay
from flame.errors import FlameError, TooManyRequests
from flame.spec.records import Event, Record

log = logging.getLogger("flame.apiserver")

T = TypeVar("T")

#: Every so many seconds a stream says that it lives.
KEEP_ALIVE = 10.0
#: Seconds that the last words of a stream get to be written, and the bytes before them that its caller may have left unread.
PARTING = 1.0
WAITING = 1 << 16

_encode = msgspec.json.Encoder().encode


class ErrorBody(Record, kw_only=True):
    """What went wrong: the class in ``flame.errors``, and one or two sentences."""

    type: str
    message: str


class ErrorAnswer(Record, kw_only=True):
    """The body of every answer that is no success."""

    error: ErrorBody


def answer(value: Any, status: int = 200) -> web.Response:
    """A value as JSON; None as an empty answer."""
    if value is None:
        return web.Response(status=204)
    return web.Response(body=_encode(value), status=status, content_type="application/json")


def refusal(error: FlameError, status: int | None = None) -> web.Response:
    """An error as an answer."""
    body = ErrorAnswer(error=ErrorBody(type=type(error).__name__, message=error.message))
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(error.retry_after)
    return web.Response(
        body=_encode(body), status=status or error.status, content_type="application/json", headers=headers
    )


async def events(
    request: web.Request, stay: Stay, batches: AsyncGenerator[Sequence[Event], None]
) -> web.StreamResponse:
    """Events as lines of JSON; an empty line every so often says that the connection lives.

    One whose right has ended gets an event without a number as its last line: ``refused``, ``{type, message}``.
    """

    def last(error: FlameError) -> bytes:
        data = {"type": type(error).__name__, "message": error.message}
        return lines([Event(seq=0, time=time.time(), type="refused", data=data)])

    def lines(batch: Sequence[Event]) -> bytes:
        return b"".join(_encode(event) + b"\n" for event in batch)

    headers = {"Content-Type": "application/x-ndjson"}
    return await _stream(request, stay, batches, lines, alive=b"\n", last=last, headers=headers)


async def text(
    request: web.Request, stay: Stay, pieces: AsyncGenerator[bytes, None], headers: dict[str, str]
) -> web.StreamResponse:
    """Text as it comes. One whose right has ended breaks off, as a word about that would be taken for a part of the text."""
    headers = {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff", **headers}
    return await _stream(request, stay, pieces, bytes, alive=b"", last=None, headers=headers)


async def artifact(request: web.Request, place: Artifacts, found: Artifact) -> web.StreamResponse:
    """An artifact, or the range of it that is asked for. A file is sent by the kernel, an object of a bucket is passed through."""
    headers = {"Content-Type": "application/octet-stream"}
    if path := place.path(found.name):
        return web.FileResponse(path, headers=headers)
    try:
        asked = request.http_range
    except ValueError:
        asked = slice(0, None, 1)  # a range that is malformed is none
    start, end, _ = asked.indices(found.size)
    partial = asked.start is not None or asked.stop is not None
    if partial and start >= end:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{found.size}"})
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
    response = web.StreamResponse(status=206 if partial else 200, headers={"Accept-Ranges": "bytes", **headers})
    response.content_length = end - start
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    pieces = aiter(place.read(found.name, start, end))
    piece = await anext(pieces, b"")  # what goes wrong so far is still answered in words
    await response.prepare(request)
    with _breaking_off(request):
        while piece:
            await response.write(piece)
            piece = await anext(pieces, b"")
        await response.write_eof()
    return response


@contextmanager
def _breaking_off(request: web.Request) -> Iterator[None]:
    """What goes wrong while an answer is written ends the connection: words about it would be taken for a part of the answer."""
    try:
        yield
    except ConnectionError:
        pass  # the caller has gone
    except Exception:
        log.exception("the answer to %s %s broke off", request.method, request.path)
        if request.transport is not None:
            request.transport.abort()


@contextmanager
def lasting(request: web.Request, stay: Stay) -> Iterator[None]:
    """What takes long to be written, for as long as the caller's right lasts."""
    try:
        with stay, _breaking_off(request):
            yield
    except FlameError:
        if request.transport is not None:
            request.transport.abort()


async def _stream(
    request: web.Request,
    stay: Stay,
    source: AsyncGenerator[T, None],
    write: Callable[[T], bytes],
    *,
    alive: bytes,
    last: Callable[[FlameError], bytes] | None,
    headers: dict[str, str],
) -> web.StreamResponse:
    """Write what comes, until the source ends, the caller goes, or the caller's right has ended."""
    response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
    async with aclosing(source):
        await response.prepare(request)
        # The source is never interrupted, which would end it: a task waits for its next piece, and this for the task.
        following = asyncio.ensure_future(_next(source))
        try:
            with stay, _breaking_off(request):
                while True:
                    done, _ = await asyncio.wait([following], timeout=KEEP_ALIVE)
                    if not done:
                        if alive:
                            await response.write(alive)
                        continue
                    piece = following.result()
                    if piece is None:
                        break
                    following = asyncio.ensure_future(_next(source))
                    if data := write(piece):
                        await response.write(data)
                await response.write_eof()
        except FlameError as error:  # of the stay: what goes wrong with the source breaks the answer off
            await _dismiss(request, response, last(error) if last is not None else None)
        finally:
            following.cancel()
            await asyncio.wait([following])
    return response


async def _dismiss(request: web.Request, response: web.StreamResponse, last: bytes | None) -> None:
    """End a stream, with its last words if it may have any. Who does not read gets none, nor what waits to be sent."""
    transport = request.transport
    if transport is None:
        return
    try:
        if last is not None and transport.get_write_buffer_size() < WAITING:
            async with asyncio.timeout(PARTING):
                await response.write(last)
                await response.write_eof()
            return
    except (ConnectionError, TimeoutError):
        pass
    transport.abort()


async def _next(source: AsyncGenerator[T, None]) -> T | None:
    return await anext(source, None)
