"""A Docker engine: calls to it, off the event loop, and what happens on it, as a stream.

The SDK blocks, so each call runs in a thread of a small pool, and the stream of events in one of its own. The engine may be
restarted at any time: a call then fails with a sentence, and the stream is opened again until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from flame.errors import MissingExtra, RunnerError

try:
    import docker
    import docker.errors
    import docker.tls
    import requests
    import urllib3
except ImportError as error:
    raise MissingExtra("docker", "docker", "A compute of the kind docker") from error

log = logging.getLogger("flame.runners.docker")

_FAULTS = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
_THREADS = 16
#: Seconds without an event after which the engine is asked whether it is there: a connection over a network can die in silence.
_QUIET = 30.0
#: Seconds between two attempts to reach an engine that does not answer.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class Tls(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """How the engine and the server prove to each other who they are. Paths of files on the server.

    :ivar ca: certificates by which the engine's is checked.
    :ivar cert: the client's certificate.
    :ivar key: its key.
    """

    ca: str
    cert: str
    key: str


class Refused(RunnerError):
    """The engine answers, and says no.

    :ivar code: the HTTP status.
    :ivar reason: the engine's own words.
    """

    def __init__(self, message: str, code: int, reason: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class Engine:
    """One engine.

    :param url: ``unix:///var/run/docker.sock``, ``tcp://HOST:PORT``; empty: what ``DOCKER_HOST`` says, else the usual socket.
    :param tls: for ``tcp``.
    :param timeout: seconds that a call may take.
    """

    def __init__(self, url: str = "", tls: Tls | None = None, *, timeout: float = 60.0) -> None:
        self._url = url
        self._tls = tls
        self._timeout = timeout
        self._client: docker.APIClient | None = None
        self._making = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="docker")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"The Docker engine at {self._url}" if self._url else "The Docker engine"

    @property
    def local(self) -> bool:
        """It is on this machine, as far as its address tells."""
        return (self._url or os.environ.get("DOCKER_HOST") or "unix:").startswith("unix:")

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the SDK's ``APIClient``.

        :raises Refused: the engine says no.
        :raises flame.errors.RunnerError: it does not answer.
        """
        return await self._run(partial(self._call, method, *arguments, **named))

    async def find(self, method: str, *arguments: Any, **named: Any) -> Any:
        """As :meth:`call`; None where the engine says that there is no such thing."""
        try:
            return await self.call(method, *arguments, **named)
        except Refused as refusal:
            if refusal.code == 404:
                return None
            raise

    async def events(
        self, filters: Mapping[str, Any], *, opened: Callable[[], Awaitable[None]], away: Callable[[RunnerError], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What happens on the engine from now on, for ever. While it does not answer, this tries again.

        :param filters: which events are wanted.
        :param opened: awaited each time that the stream has been opened, before the first event: whatever has happened until then
            the caller must look up; whatever happens from then on comes.
        :param away: told the first time that it does not answer.
        """
        pause = _FIRST_PAUSE
        while True:
            since = time.time() - 1.0
            try:
                stream = _Stream(partial(self._call, "events", since=int(since), filters=dict(filters), decode=True))
                with contextlib.closing(stream):
                    await stream.opened
                    await opened()
                    pause = _FIRST_PAUSE
                    async for event in self._each(stream):
                        yield event
                raise RunnerError(f"{self.name} has broken off the connection.")
            except RunnerError as error:
                away(error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        """Let go of it. Calls under way come to their end by themselves."""
        if not self._closed:
            self._closed = True
            self._pool.submit(self._disconnect)
            self._pool.shutdown(wait=False)

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()

    async def _run(self, work: Callable[[], Any]) -> Any:
        if self._closed:
            raise RunnerError(f"{self.name} was let go of: the server ends.")
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(self._connected(), method)(*arguments, **named)
        except docker.errors.APIError as error:
            reason = str(error.explanation or error.response.reason or error).strip()
            raise Refused(f"{self.name} refuses: {reason}", error.response.status_code, reason) from error
        except _FAULTS as error:
            raise RunnerError(f"{self.name} does not answer: {_cause(error)}.") from error

    def _connected(self) -> docker.APIClient:
        """The client; made at the first call, which asks the engine for its version."""
        with self._making:
            if self._client is None:
                address = {"base_url": self._url} if self._url else docker.utils.kwargs_from_env()
                if self._tls is not None:
                    client_cert = (self._tls.cert, self._tls.key)
                    address["tls"] = docker.tls.TLSConfig(client_cert=client_cert, ca_cert=self._tls.ca, verify=True)
                self._client = docker.APIClient(
                    **address, version="auto", timeout=self._timeout, max_pool_size=_THREADS + 1
                )
            return self._client

    async def _each(self, stream: _Stream) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, until it breaks."""
        while True:
            try:
                async with asyncio.timeout(_QUIET):
                    event = await stream.events.get()
            except TimeoutError:
                await self.call("ping")
                continue
            if event is None:
                return
            yield event


class _Stream:
    """A stream of events, opened and read by a thread of its own from the moment it is made; belongs to the running event loop.

    :param open: opens it.
    :ivar opened: done when it is open; or why it cannot be.
    :ivar events: what comes; None when it breaks.
    """

    def __init__(self, open: Callable[[], Any]) -> None:
        self._open = open
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._stream: Any = None
        self._closed = False
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        threading.Thread(target=self._run, name="docker-events", daemon=True).start()

    def close(self) -> None:
        """Break it off, under the feet of the thread that reads it, or is just about to."""
        with self._lock:
            self._closed = True
            if self._stream is not None:
                with contextlib.suppress(AttributeError, *_FAULTS):  # it has broken already, and has no socket any more
                    self._stream.close()
        self.opened.cancel()

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is interested any more
            try:
                stream = self._open()
            except RunnerError as error:
                self._loop.call_soon_threadsafe(self._settle, error)
                return
            with self._lock:
                self._stream = stream
                if self._closed:
                    stream.close()
            try:
                self._loop.call_soon_threadsafe(self._settle, None)
                for event in stream:
                    self._loop.call_soon_threadsafe(self.events.put_nowait, event)
            except _FAULTS as error:
                log.debug("the stream of events broke: %s", error)
            finally:
                stream._response.close()  # the SDK's own close() shuts the connection down, and keeps the socket
            self._loop.call_soon_threadsafe(self.events.put_nowait, None)

    def _settle(self, error: RunnerError | None) -> None:
        if self.opened.done():
            return
        if error is None:
            self.opened.set_result(None)
        else:
            self.opened.set_exception(error)


def _cause(error: BaseException) -> str:
    """The innermost cause of a failed call: the SDK wraps a refused connection four times."""
    seen = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        seen = inner
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    return str(seen).rstrip(".") or type(seen).__name__
