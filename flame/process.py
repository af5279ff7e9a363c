"""The process that ``flame serve`` is, from its first line to its exit status: what it asks of the system, its signals, how long it lives.

The data directory is locked for as long as the process lives, so there is one server to a directory. What is in it outlives
the process, and so do the workers: a server that ends, however it does, is followed by one that takes up where it
was. Only a private server, which somebody has started for the moment, takes its jobs with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flame.errors import Conflict, StoreError, UsageError
from flame.serve import Server, ServeSettings, log, refuse_plain_http, serve

if TYPE_CHECKING:
    from flame.controller.controller import Controller

#: Seconds that a private server waits for the first one to attach.
PRIVATE_PATIENCE = 30.0


def run_server(settings: ServeSettings) -> int:
    """Serve until a signal, or until nobody needs a private server any more.

    :returns: the exit status.
    :raises flame.errors.FlameError: the server cannot start: the directory is taken, the port is taken, the database fails.
    """
    _log_to_stderr(verbose=settings.verbose)
    refuse_plain_http(settings)
    os.umask(0o077)  # whatever this process and its workers write is for their account alone
    data_dir = settings.data_dir.expanduser().absolute()
    if settings.drain and _tell_to_drain(data_dir):
        return 0
    _allow_connections()
    _seek_garbage_seldom()
    with locked(data_dir):
        return asyncio.run(_serve(settings, data_dir))


def _allow_connections() -> None:
    """Each flamelet holds a connection or two; the usual limit of open files is for programs that have a few."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a limit that the system does not grant stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(least, min(most, 65536) if most > 0 else 65536), most))


def _seek_garbage_seldom() -> None:
    """With thousands of connections a look at all objects takes a quarter of a second, in which the server does nothing else.

    What is there from the start is not looked at again, and the rest after three times as many new objects as usual: most garbage
    is freed without. Still fewer looks would let more of it gather between them than the memory of a server may grow (the soak sees it).
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 2)


async def _serve(settings: ServeSettings, data_dir: Path) -> int:
    stopping, draining = asyncio.Event(), asyncio.Event()
    _on_signals(stopping, draining)
    if settings.drain:
        draining.set()
    async with contextlib.AsyncExitStack() as stack:
        # A standby may wait for days, and is told to end meanwhile like any other server.
        entering = asyncio.ensure_future(stack.enter_async_context(serve(settings, data_dir)))
        await _first(asyncio.wait([entering]), stopping.wait())
        if not entering.done():
            while not entering.done():  # a cancellation can get lost in a driver that waits with a timeout of its own
                entering.cancel()
                await asyncio.wait([entering], timeout=1.0)
            return 0
        server = await entering
        if settings.private:
            _say(json.dumps({"url": server.url, "pid": os.getpid()}))
            await _first(stopping.wait(), _unneeded(server))
            jobs = len(server.controller.active())
            if jobs:
                log.info("private server ends: stopping %d jobs", jobs)
            await server.api.sessions.stop_all()
            await server.controller.stop_all()
        else:
            if settings.keep_jobs is not None or settings.keep_size is not None:
                from flame.controller.retention import Retention

                retention = Retention(server.controller, settings.keep_jobs, settings.keep_size)
                server.controller.context.background.spawn(retention.run())
            if settings.keep_jobs is not None:
                server.controller.context.background.spawn(server.api.sessions.register.retire(settings.keep_jobs))
            await _first(stopping.wait(), server.lost(), _drained(server.controller, draining))
            if not stopping.is_set() and not server.controller.drained.is_set():
                raise StoreError("Another server has taken over the database; this one ends. Its workers go on.")
            left = server.controller.used
            log.info("the server ends%s", f"; {left} workers go on, and the next server finds them" if left else "")
    return 0


@contextlib.contextmanager
def locked(data_dir: Path) -> Any:
    """Hold the data directory, as every process does that writes to it.

    :raises flame.errors.Conflict: another server holds it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock: IO[str] = (data_dir / "lock").open("a")
    except OSError as error:
        raise StoreError(f"The data directory {data_dir} cannot be used: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another server uses {data_dir}{_who(data_dir)}. Use that one, or another --data-dir."
            ) from None
        yield


def _who(data_dir: Path) -> str:
    try:
        there = json.loads((data_dir / "server.json").read_text())
        return f": process {there['pid']} at {there['url']}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


async def _drained(controller: Controller, draining: asyncio.Event) -> None:
    """Once that is wanted, start nothing any more; over when nothing runs."""
    await draining.wait()
    controller.drain()
    log.info("no jobs are started any more; the server ends when those that run have ended")
    await controller.drained.wait()


def _tell_to_drain(data_dir: Path) -> bool:
    """Tell the server that uses a data directory to start nothing any more, and wait for its end. False: there is none."""
    try:
        with locked(data_dir):
            return False
    except Conflict:
        pass
    try:
        pid = int(json.loads((data_dir / "server.json").read_text())["pid"])
        os.kill(pid, signal.SIGUSR1)
        log.info("server %d has been told; it ends when the jobs that run have ended", pid)
        with (data_dir / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"The server that uses {data_dir} cannot be told to end: {error}.") from error
    return True


def _on_signals(stopping: asyncio.Event, draining: asyncio.Event) -> None:
    """The first signal ends the server in order, the second at once. SIGUSR1 lets it end once the jobs that run have."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if stopping.is_set():
            log.warning("%s again: the server ends at once", number.name)
            os._exit(128 + number)
        log.info("%s: the server ends", number.name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGUSR1, draining.set)


async def _unneeded(server: Server) -> None:
    """Wait until a private server is of no use any more."""
    try:
        async with asyncio.timeout(PRIVATE_PATIENCE):
            await server.api.attachments.first.wait()
    except TimeoutError:
        log.info("nobody has attached within %g s", PRIVATE_PATIENCE)
    await server.api.attachments.unneeded()


async def _first(*works: Any) -> None:
    """Wait for the first of several."""
    tasks = [asyncio.ensure_future(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _say(line: str) -> None:
    """The one line that a private server prints. Who has started it may have gone."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class _Lines(logging.Formatter):
    """One line an entry: time, level, part, what."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")


def _log_to_stderr(*, verbose: bool) -> None:
    root = logging.getLogger("flame")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("aiohttp").addHandler(handler)
