"""What is kept of jobs that have ended, and for how long: they go with all that belongs to them, the oldest first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flame.controller.artifacts import FOLDER as ARTIFACTS
from flame.controller.checkpoints import FOLDER as CHECKPOINTS
from flame.errors import Conflict, FlameError, NotFound
from flame.spec.records import JobState

if TYPE_CHECKING:
    from flame.controller.controller import Controller

log = logging.getLogger("flame.controller")

#: Seconds between two looks.
PAUSE = 600.0


class Ended(NamedTuple):
    """A job that has ended. ``at``: when; ``size``: of its logs, artifacts and checkpoints, in bytes."""

    id: str
    at: float
    size: int


def choose(jobs: Sequence[Ended], now: float, seconds: float | None, size: int | None) -> list[str]:
    """Which jobs to remove.

    :param seconds: how long one is kept; None: for ever.
    :param size: how many bytes all of them may have; None: any number.
    """
    old = [job for job in jobs if seconds is not None and now - job.at > seconds]
    left = sorted((job for job in jobs if job not in old), key=lambda job: job.at)
    excess = sum(job.size for job in left) - size if size is not None else 0
    for job in left:
        if excess <= 0:
            break
        if job.size:
            old.append(job)
            excess -= job.size
    return [job.id for job in old]


class Retention:
    """Removes what is not kept, from time to time.

    :param controller: whose jobs.
    :param seconds: see :func:`choose`.
    :param size: see :func:`choose`.
    """

    def __init__(self, controller: Controller, seconds: float | None, size: int | None) -> None:
        self._controller = controller
        self._seconds = seconds
        self._size = size

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            try:
                await self.sweep()
            except FlameError as error:
                log.error("jobs that have ended cannot be cleaned up: %s", error)
            await asyncio.sleep(PAUSE)

    async def sweep(self, now: float | None = None) -> list[str]:
        """Look once.

        :param now: the time of day; None: this moment's.
        :returns: the jobs that were removed.
        """
        ended = await self._ended()
        removed = []
        for job in choose(ended, time.time() if now is None else now, self._seconds, self._size):
            try:
                await self._controller.delete_job(job)
            except (Conflict, NotFound):
                continue  # somebody is at it
            log.info("job %s is no longer kept", job)
            removed.append(job)
        return removed

    async def _ended(self) -> list[Ended]:
        context = self._controller.context
        found = []
        for state in (JobState.COMPLETED, JobState.FAILED, JobState.TERMINATED):
            for saved in await context.jobs.all({"state": state.value}):
                size = await self._measure(saved.id) if self._size is not None else 0
                found.append(Ended(saved.id, saved.record.ended_at or saved.record.created_at, size))
        return found

    async def _measure(self, job: str) -> int:
        place = self._controller.context.artifacts.place
        size = 0
        for folder in (ARTIFACTS, CHECKPOINTS, "logs"):
            size += sum(one.size for one in await place.find(f"{folder}/{job}"))
        if place.apart:
            size += await asyncio.to_thread(_size_of, self._controller.context.options.data_dir / "logs" / job)
        return size


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
