"""A server for as long as it is needed: the one that is configured, the one that runs on this machine, or a private one.

Whoever has none configured gets one without leaving anything behind: a private server lives while somebody is
attached to it. Two who need one in the same data directory at the same time share it, and one who comes while another is
just starting or ending waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator
from pathlib import Path

from flame.client.client import Client
from flame.client.config import Settings, data_dir
from flame.client.follow import Backoff
from flame.client.local import PrivateServer, address, running
from flame.errors import ServerError, ServerUnreachable

_PATIENCE = 30.0  # seconds for another server to finish starting or ending


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
                await stack.enter_async_context(client.attach())
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
        yield client


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
