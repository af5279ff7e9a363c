"""Who is there: the processes of a job's workers on this host, by the mark in their environment that the local runner gives them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from flame.chaos import acts
from flame.chaos.target import Target

#: The variable by which the local runner knows its workers: ``INSTANCE/JOB/TASK/ATTEMPT``.
_MARK = "FLAME_WORKER"
_LAUNCHER = "flame.sdk.launch"
#: The variable that a server of a trial has, and everybody whom it starts.
FOLDER = "FLAME_CHAOS"
_LOOK = 0.02  # seconds between two looks


@dataclass(frozen=True)
class Process(Target):
    """A process of a worker on this host."""

    pid: int

    @property
    def place(self) -> str:
        """See the base class."""
        return str(self.pid)

    async def kill(self) -> None:
        """See the base class."""
        acts.kill(self.pid)

    async def freeze(self) -> None:
        """See the base class."""
        acts.freeze(self.pid)

    async def thaw(self) -> None:
        """See the base class."""
        acts.thaw(self.pid)

    async def cut(self) -> int:
        """See the base class."""
        return acts.cut(self.pid)


def workers(job: str) -> list[Process]:
    """The flamelets of a job and what they run.

    :param job: its id.
    """
    return [process for each in psutil.process_iter() if (process := _worker(each, job)) is not None]


def marked(job: str) -> list[int]:
    """All processes that belong to a job's workers, whatever they are."""
    return [process.pid for process in psutil.process_iter() if _mark(process)[1:2] == [job]]


def of_folder(folder: Path) -> list[int]:
    """All processes that were started for trials with a folder: servers, workers, and what they have started in turn.

    :param folder: their ``FLAME_CHAOS``.
    """
    return [process.pid for process in psutil.process_iter() if _variable(process, FOLDER) == str(folder)]


async def end_all(folder: Path) -> None:
    """Kill all that was started for trials with a folder, and return when none of it is left.

    :param folder: their ``FLAME_CHAOS``.
    """
    while there := await asyncio.to_thread(of_folder, folder):
        for pid in there:
            acts.kill(pid)
        await asyncio.sleep(_LOOK)  # nobody tells of the end of a process that is not one's child


def _mark(process: psutil.Process) -> list[str]:
    return _variable(process, _MARK).split("/")


def _variable(process: psutil.Process, name: str) -> str:
    """A variable of a process; empty for one that has none, is about to end, or is somebody else's."""
    try:
        return process.environ().get(name, "")
    except psutil.Error:
        return ""


def _worker(process: psutil.Process, job: str) -> Process | None:
    mark = _mark(process)
    if len(mark) != 4 or mark[1] != job:
        return None
    try:
        if _LAUNCHER in process.cmdline():
            return Process(mark[2], int(mark[3]), False, process.pid)
        leads = os.getsid(process.pid) == process.pid
    except (psutil.Error, OSError):
        return None
    return Process(mark[2], int(mark[3]), True, process.pid) if leads else None
