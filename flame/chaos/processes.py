"""Who is there: the processes of a job's workers on this host, by the mark in their environment that the local runner gives them."""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil

#: The variable by which the local runner knows its workers: ``INSTANCE/JOB/TASK/ATTEMPT``.
_MARK = "FLAME_WORKER"
_LAUNCHER = "flame.sdk.launch"


class Process(NamedTuple):
    """A process of a worker.

    :ivar flamelet: it is the agent, not the code.
    """

    pid: int
    job: str
    task: str
    attempt: int
    flamelet: bool


def workers(job: str) -> list[Process]:
    """The flamelets of a job and what they run, in order of tasks and attempts.

    :param job: its id.
    """
    found = [process for each in psutil.process_iter() if (process := _worker(each, job)) is not None]
    return sorted(found, key=lambda process: (process.task, process.attempt, process.flamelet))


def marked(job: str) -> list[int]:
    """All processes that belong to a job's workers, whatever they are."""
    return [process.pid for process in psutil.process_iter() if _mark(process)[1:2] == [job]]


def _mark(process: psutil.Process) -> list[str]:
    try:
        return process.environ().get(_MARK, "").split("/")
    except psutil.Error:
        return []


def _worker(process: psutil.Process, job: str) -> Process | None:
    mark = _mark(process)
    if len(mark) != 4 or mark[1] != job:
        return None
    try:
        if _LAUNCHER in process.cmdline():
            return Process(process.pid, job, mark[2], int(mark[3]), False)
        leads = os.getsid(process.pid) == process.pid
    except (psutil.Error, OSError):
        return None
    return Process(process.pid, job, mark[2], int(mark[3]), True) if leads else None
