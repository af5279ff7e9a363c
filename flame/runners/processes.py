"""Processes of workers: which there are, how one is watched without polling, and how all of a worker's are ended.

A worker's processes are known by two things that a server needs to write down nowhere. One is a mark in
the environment, which every descendant inherits, whatever session or group it makes for itself; this is how a restarted
server finds its workers. The other is the session that the worker's first process, the *leader*,
made for itself; it also holds descendants that have overwritten their environment (as programs do that
set their title).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil

from flame.errors import RunnerError
from flame.runners.base import FLAMELET, WorkerExit

MARK = "FLAME_WORKER"
#: Beside the mark: the module that the worker's first process runs.
MODULE = "FLAME_WORKER_MODULE"

# Linux only. A descriptor that stands for a process: it becomes readable when the process ends, also
# for one that is not our child, and no later process that is given the same number is mistaken for it.
_pidfd_open: Callable[[int], int] | None = os.pidfd_open if sys.platform == "linux" else None


class Found(NamedTuple):
    """A process that runs now. ``mark`` is None for one that carries none, or whose environment cannot be read."""

    process: psutil.Process
    session: int
    mark: str | None
    module: str | None = None

    @property
    def leads(self) -> bool:
        """True for the process that made the session it is in."""
        return self.process.pid == self.session


def scan() -> list[Found]:
    """All processes but zombies, which nothing more can be done to. Blocks for about 30 microseconds a process."""
    found = []
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            environment = process.environ()
            mark, module = environment.get(MARK), environment.get(MODULE, FLAMELET)
        except psutil.AccessDenied:
            mark = module = None
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):  # NoSuchProcess: zombies, too
            continue
        found.append(Found(process, session, mark, module))
    return found


def is_alive(process: psutil.Process) -> bool:
    """False for a process that is gone, for a zombie, and where its number is another's now."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


class ProcessTable:
    """Answers what processes there are, off the event loop. Those who ask at the same time share one scan."""

    def __init__(self) -> None:
        self._running: asyncio.Task[list[Found]] | None = None
        self._next: asyncio.Task[list[Found]] | None = None

    async def snapshot(self) -> list[Found]:
        """The processes at an instant after this call began."""
        if self._next is None:  # a scan that runs already may have passed by what this caller asks about
            self._next = asyncio.create_task(self._scan(after=self._running))
        return await asyncio.shield(self._next)

    async def _scan(self, after: asyncio.Task[list[Found]] | None) -> list[Found]:
        if after is not None:
            await asyncio.wait([after])
        self._running, self._next = self._next, None
        return await asyncio.to_thread(scan)

    async def sweep(self, mark: str, session: int | None = None, *, patience: float = 30.0) -> None:
        """Kill every process that carries a mark or is in a session, until none is left.

        :param session: as :attr:`Leader.session` gives it.
        :param patience: seconds after which processes that do not die (in the kernel) or that go on multiplying are an error.
        :raises flame.errors.RunnerError: something is left.
        """
        deadline = time.monotonic() + patience
        while left := [found for found in await self.snapshot() if found.mark == mark or found.session == session]:
            for found in left:
                with contextlib.suppress(psutil.Error):
                    found.process.kill()  # psutil compares the time of creation: never a later process
            # One that is going down has no environment any more, so the next look would pass it by.
            pause = 0.001
            while any(is_alive(found.process) for found in left) and time.monotonic() < deadline:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.1)
            if time.monotonic() > deadline:
                pids = ", ".join(str(found.process.pid) for found in left)
                raise RunnerError(f"A worker's processes do not end although they were killed, at last {pids}.")


class Leader:
    """The first process of a worker. Watched from the moment this is made; belongs to the running event loop.

    :param pid: a process that made a session of its own.
    :raises ProcessLookupError: it is gone.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)
        self._child = self._process.ppid() == os.getpid()
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._code: int | None = None
        self._fd: int | None = None
        if _pidfd_open is not None:
            self._fd = _pidfd_open(pid)
            self._loop.add_reader(self._fd, self._end)
        else:
            threading.Thread(target=self._wait, daemon=True).start()

    async def ended(self) -> None:
        """Wait until it has ended. A child is then still there as a zombie, so that its number is not given away."""
        await asyncio.shield(self._ended)

    @property
    def session(self) -> int | None:
        """The number of its session; None if it has ended and its number was given to another process since."""
        reused = psutil.pid_exists(self.pid) and not self._process.is_running()
        return None if reused else self.pid

    def terminate(self) -> None:
        """Ask its process group to end, if it has not ended itself."""
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)

    def reap(self) -> WorkerExit:
        """How it ended. A process that was started by an earlier server tells nobody."""
        if self._child and self._fd is not None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        self.release()
        if self._code is None:
            return WorkerExit(None, None)
        if self._code < 0:
            return WorkerExit(None, signal.Signals(-self._code).name)
        return WorkerExit(self._code, None)

    def release(self) -> None:
        """Stop watching."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _end(self) -> None:
        assert self._fd is not None
        self._loop.remove_reader(self._fd)
        self._ended.set_result(None)

    def _wait(self) -> None:
        code = self._process.wait()

        def end() -> None:
            self._code = code
            if not self._ended.done():
                self._ended.set_result(None)

        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is interested any more
            self._loop.call_soon_threadsafe(end)


def leaders(found: Sequence[Found], instance: str) -> dict[str, psutil.Process]:
    """The first processes of the workers of an instance, by mark. What only descends from a worker is not among them.

    :param instance: the server's id, the beginning of its marks.
    """
    chosen: dict[str, psutil.Process] = {}
    for entry in found:
        if entry.mark is None or not entry.leads or not entry.mark.startswith(f"{instance}/"):
            continue
        with contextlib.suppress(psutil.Error):
            if entry.module not in entry.process.cmdline():
                continue
            rival = chosen.get(entry.mark)
            if rival is None or entry.process.create_time() < rival.create_time():
                chosen[entry.mark] = entry.process
    return chosen
