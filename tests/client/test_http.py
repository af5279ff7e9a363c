"""The HTTP that the client speaks: what it understands, what it repeats, how it fails."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from flame import errors
from flame.client import http
from flame.client.http import Session

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw(*answers: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives each request of each connection the next of these answers; None closes instead."""
    requests: list[bytes] = []
    left = list(answers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while left:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                answer = left.pop(0)
                if answer is None:
                    break
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


async def test_a_call_sends_json_and_decodes_the_answer() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.content_type == "application/json"
        return web.json_response(
            {
                "method": request.method,
                "path": request.raw_path,
                "body": await request.json(),
                "token": request.headers.get("Authorization"),
            }
        )

    async with served(handler) as url, Session(url, "secret") as session:
        answer = await session.call("POST", "/a b", query={"x": "1&2", "none": None}, body={"k": [1]}, into=dict)
    assert answer == {"method": "POST", "path": "/a%20b?x=1%262", "body": {"k": [1]}, "token": "Bearer secret"}


async def test_a_path_before_the_api_is_kept() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(request.path)

    async with served(handler) as url, Session(f"{url}/behind/proxy/") as session:
        assert await session.call("GET", "/v1/jobs", into=str) == "/behind/proxy/v1/jobs"


async def test_connections_are_kept_and_used_again() -> None:
    ports = set()

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return web.Response(text="x" * 100_000)

    async with served(handler) as url, Session(url) as session:
        for _ in range(5):
            assert len(await session.call("GET", "/", into=bytes)) == 100_000
    assert len(ports) == 1


async def test_bodies_in_chunks_and_without_a_length_are_read_whole() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n"
    unbounded = b"HTTP/1.1 200 OK\r\n\r\nabc"
    async with raw(chunked, chunked, unbounded) as (url, _), Session(url) as session:
        assert await session.call("GET", "/", into=bytes) == b"abc0123456789"
        assert await session.call("GET", "/", into=bytes) == b"abc0123456789"
        reading = asyncio.create_task(session.call("GET", "/", into=bytes))
        assert await reading == b"abc"


async def test_lines_come_as_they_are_written_however_they_are_cut() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in (b"on", b"e\n\ntw", b"o\n" + b"x" * 300_000, b"\n"):
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    async with served(handler) as url, Session(url) as session, session.open("GET", "/") as answer:
        assert [line async for line in answer.lines()] == [b"one", b"", b"two", b"x" * 300_000]


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
async def test_bytes_and_files_are_uploaded_whole(size: int, tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.content_length == size
        return web.json_response(len(await request.read()))

    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    async with served(handler) as url, Session(url) as session:
        assert await session.call("PUT", "/", data=b"x" * size, into=int) == size
        with path.open("rb") as file:
            assert await session.call("PUT", "/", data=file, into=int) == size
            assert await session.call("PUT", "/", data=file, into=int) == size


async def test_an_upload_that_is_refused_halfway_gives_the_reason() -> None:
    refusal = b'{"error": {"type": "Conflict", "message": "It is too big."}}'
    head = b"HTTP/1.1 409 Conflict\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(refusal)
    async with raw(head + refusal) as (url, _), Session(url) as session:
        with pytest.raises(errors.Conflict, match="It is too big"):
            await session.call("PUT", "/", data=b"x" * 100_000, into=dict)


@pytest.mark.parametrize(
    ("type", "expected"),
    [
        ("NotFound", errors.NotFound),
        ("Conflict", errors.Conflict),
        ("SpecError", errors.SpecError),
        ("UsageError", errors.UsageError),
        ("Forbidden", errors.Forbidden),
        ("Unauthorized", errors.Unauthorized),
        ("StoreError", errors.StoreError),
        ("SomethingNewer", errors.ServerError),
    ],
)
async def test_an_error_comes_back_as_the_class_it_was(type: str, expected: type[errors.FlameError]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"type": type, "message": "job.yaml: name: this is why."}}, status=expected.status
        )

    async with served(handler) as url, Session(url) as session:
        with pytest.raises(expected, match=r"job\.yaml: name: this is why\.") as caught:
            await session.call("GET", "/", into=dict)
    assert caught.type is expected


async def test_who_is_no_flame_server_is_called_so() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text="<html>", status=200 if request.path == "/ok" else 404)

    async with served(handler) as url, Session(url) as session:
        for path in ("/", "/ok"):
            with pytest.raises(errors.ServerError, match="Flame server"):
                await session.call("GET", path, into=dict)


async def test_a_refused_connection_says_the_address_and_what_to_do(unused_tcp_port: int) -> None:
    async with Session(f"http://127.0.0.1:{unused_tcp_port}") as session:
        with pytest.raises(errors.ServerUnreachable, match=rf":{unused_tcp_port} \(connection refused\).*flame serve"):
            await session.call("GET", "/", into=dict)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200",
        b"garbage\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_is_cut_off_is_an_error_and_never_half_a_result(answer: bytes) -> None:
    async with raw(answer) as (url, _), Session(url) as session:
        with pytest.raises(errors.ServerUnreachable, match="lost"):
            await session.call("GET", "/", into=bytes)


async def test_a_kept_connection_that_was_closed_costs_an_idempotent_request_nothing() -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
    async with raw(ok, None, ok) as (url, requests), Session(url) as session:
        assert await session.call("GET", "/first", into=int) == 1
        assert await session.call("GET", "/second", into=int) == 1
    assert [request.split()[1] for request in requests] == [b"/first", b"/second", b"/second"]


async def test_a_request_with_an_effect_is_never_repeated() -> None:
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"
    async with raw(ok, None, ok) as (url, requests), Session(url) as session:
        assert await session.call("GET", "/first", into=int) == 1
        with pytest.raises(errors.ServerUnreachable):
            await session.call("POST", "/second", into=int)
    assert len(requests) == 2


async def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ANSWER_TIMEOUT", 0.05)

    async def handler(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with served(handler) as url, Session(url) as session:
        with pytest.raises(errors.ServerUnreachable, match="did not answer"):
            await session.call("GET", "/", into=dict)


async def test_a_stream_that_falls_silent_is_given_up() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one\n")
        await asyncio.Event().wait()
        return response

    async with served(handler) as url, Session(url) as session, session.open("GET", "/") as answer:
        lines = answer.lines(idle=0.05)
        assert await anext(lines) == b"one"
        with pytest.raises(errors.ServerUnreachable):
            await anext(lines)


@pytest.mark.parametrize("address", ["", "localhost:10100", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(errors.UsageError, match=r"http://127\.0\.0\.1:10100"):
        Session(address)


def test_a_token_cannot_smuggle_headers() -> None:
    with pytest.raises(errors.UsageError, match="token"):
        Session("http://127.0.0.1:1", "a\r\nX: y")


async def test_a_file_that_is_read_is_not_closed(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(len(await request.read()))

    path = tmp_path / "file"
    path.write_bytes(b"abc")
    async with served(handler) as url, Session(url) as session:
        with path.open("rb") as file:
            await session.call("PUT", "/", data=file, into=int)
            assert isinstance(file, io.BufferedReader)
            assert not file.closed
