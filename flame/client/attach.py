"""A server for as long as it is needed: the one that is configured, the one that runs on this machine, or a private one.

Whoever has none configured gets one without leaving anything behind: a private server lives while somebody is
attached to it, and is started again by who has started it when it is killed meanwhile. Two who need one in the same data directory at the same time share it, and one who comes while another is
just starting or ending waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from flame.client.client import Client
from flame.client.config import Settings, data_dir
from flame.client.follow import Backoff
from flame.client.local import PrivateServer, address, running
from flame.errors import ServerError, ServerUnreachable

log = logging.getLogger("flame.client")

_PATIENCE = 30.0  # seconds for another server to finish starting or ending
_STARTS = 5  # tries to start a private server that is killed while it starts


@contextlib.asynccontextmanager
async def serving(settings: Settings, private: PrivateServer | None = None) -> AsyncIterator[Client]:
    """A client of the server that is configured, or else of one on this machine.

    :param private: one that was started already, because none is configured.
    :raises flame.errors.ServerUnreachable: there is none and none could be started.
    """
    if settings.server is not None:
        async with Client(settings.server, settings.token) as client:
            yield client
    else:
        async with attached(data_dir(), private) as client:
            yield client


@contextlib.asynccontextmanager
async def attached(
    folder: Path, private: PrivateServer | None = None, *, token: str | None = None
) -> AsyncIterator[Client]:
    """A client of a server in a data directory, which lives for at least as long as the context does.

    :param private: one that was started already; None takes the one that runs there, or starts one.
    :param token: the token; None takes the configured one.
    :raises flame.errors.ServerUnreachable: there is none and none could be started.
    """
    backoff = Backoff(patience=_PATIENCE)
    async with contextlib.AsyncExitStack() as stack:
        while True:
            try:
                client = Client(await _url(folder, private), token)
                await stack.enter_async_context(client)
                over = await stack.enter_async_context(client.attach())
                break
            except (ServerError, ServerUnreachable) as error:
                if _locked(folder):  # another one is about to start, or to end
                    await backoff.failed(error)
                    private = None
                elif private is None:
                    private = PrivateServer(folder)
                else:
                    raise
            except BaseException:
                if private is not None:
                    private.end()
                raise
        if private is not None:
            private.chosen = True
            stack.callback(private.leave)
            keeper = asyncio.create_task(_keep(client, private, over))
            stack.push_async_callback(_cancel, keeper)
        yield client


async def _keep(client: Client, private: PrivateServer, over: Callable[[], Awaitable[None]]) -> None:
    """Start a private server again whenever it is killed: its jobs and sessions go on where they were."""
    port = urlsplit(client.server).port or 0
    async with contextlib.AsyncExitStack() as stack:
        while True:
            await over()
            for _ in range(_STARTS):
                if await _ended(private) >= 0:  # somebody wanted it to end, or it cannot start
                    break
                log.warning("the private server was killed; it is started again")
                await stack.aclose()
                try:
                    private.start_again(port)
                    await _url(private.folder, private)
                    over = await stack.enter_async_context(client.attach())
                except (ServerError, ServerUnreachable) as error:
                    log.error("the private server does not start again: %s", error)
                else:
                    break
            if private.process.poll() is not None:
                private.lost = True
                return


async def _ended(private: PrivateServer) -> int:
    """Wait until its process is over; gives the exit status, negative for a signal."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        status = private.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
            loop.call_soon_threadsafe(_settle, over, status)

    threading.Thread(target=wait, daemon=True).start()  # of the default executor, which is waited for, it would keep us
    return await over


def _settle(future: asyncio.Future[int], status: int) -> None:
    if not future.done():
        future.set_result(status)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _url(folder: Path, private: PrivateServer | None) -> str:
    """The address of a server: of the private one once it listens, else of the one that runs in the folder."""
    if private is None:
        url = running(folder)
        if url is None:
            raise ServerUnreachable(f"No server runs in {folder}.")
        return url
    assert private.process.stdout is not None
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), private.process.stdout)
    try:
        return address(await reader.readline())[0]
    except ValueError as error:
        await asyncio.to_thread(private.process.wait)
        raise ServerUnreachable(private.complaint()) from error
    finally:
        transport.close()


def _locked(folder: Path) -> bool:
    """True if a server holds the data directory, whether it can be talked to or not."""
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
