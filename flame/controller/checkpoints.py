"""What tasks have reached: files in the data directory, ``checkpoints/JOB/TASK/ROUND``, the newest few of each task.

A worker that takes another one's place is given them, and a job can be set back to one of them. Only the newest attempt of
a task may write, so a worker that was given up and is still there changes nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import NamedTuple

from flame.artifacts.base import Artifact, Artifacts
from flame.errors import NotFound, SpecError

#: Under which name they are kept.
FOLDER = "checkpoints"
#: Rounds are written with so many digits, so that their order is that of their names.
_DIGITS = 10


class Checkpoint(NamedTuple):
    """One of them. ``time``: when it was kept."""

    task: str
    round: int
    size: int
    time: float


class Checkpoints:
    """The checkpoints of all jobs.

    :param artifacts: where they are kept.
    :param data_dir: the data directory; local workers' directories are in it, and with them files that need not be sent.
    :param limit: the largest one, in bytes.
    """

    def __init__(self, artifacts: Artifacts, data_dir: Path, limit: int) -> None:
        self._artifacts = artifacts
        self._data_dir = data_dir
        self._limit = limit

    async def put(self, job: str, task: str, number: int, pieces: AsyncIterator[bytes], keep: int) -> None:
        """Keep what a task has reached, and no more of it than the ``keep`` newest.

        :raises flame.errors.SpecError: it is too large.
        :raises flame.errors.StoreError: the disk is full, or the folder is not writable.
        """

        async def limited() -> AsyncIterator[bytes]:
            size = 0
            async for piece in pieces:
                size += len(piece)
                if size > self._limit:
                    raise SpecError(f"The checkpoint of round {number} is larger than the {self._limit} bytes allowed.")
                yield piece

        await self._artifacts.put(_name(job, task, number), limited())
        await self._prune(job, task, keep)

    async def adopt(self, job: str, task: str, number: int, keep: int, *, attempt: int, file: str, size: int) -> bool:
        """Keep a file that lies in the directory of a local worker, without copying it.

        :param file: its name; the folder is known here.
        :returns: False where there is no such file, and it must be sent.
        """
        if "/" in file or file.startswith("."):
            return False
        source = self._data_dir / "workers" / f"{task}.{attempt}" / "artifacts" / file
        if not await self._artifacts.adopt(_name(job, task, number), source, size):
            return False
        await self._prune(job, task, keep)
        return True

    async def find(self, job: str, task: str | None = None) -> list[Checkpoint]:
        """Those of a job, or of one task, the oldest round first."""
        found = await self._artifacts.find(f"{FOLDER}/{job}" + (f"/{task}" if task else ""))
        return sorted((_read(one) for one in found), key=lambda one: (one.round, one.task))

    def read(self, job: str, task: str, number: int) -> AsyncIterator[bytes]:
        """The bytes of one.

        :raises flame.errors.NotFound: there is none of this round.
        """
        return self._artifacts.read(_name(job, task, number))

    async def size(self, job: str, task: str, number: int) -> int:
        """How many bytes one has.

        :raises flame.errors.NotFound: there is none of this round.
        """
        known = await self._artifacts.stat(_name(job, task, number))
        if known is None:
            raise NotFound(f"There is no checkpoint of round {number} of task {task}.")
        return known.size

    async def forget(self, job: str, after: int) -> None:
        """Remove those of rounds after one."""
        for one in await self.find(job):
            if one.round > after:
                await self._artifacts.delete(_name(job, one.task, one.round))

    async def inherit(self, job: str, heirs: dict[str, str], other: str, upto: int) -> None:
        """Give those of another job's tasks to this one's.

        :param heirs: the other job's task for each of this one's.
        :param upto: only of rounds up to this one.
        """
        for task, source in heirs.items():
            for one in await self.find(other, source):
                if one.round <= upto:
                    await self._artifacts.put(_name(job, task, one.round), self.read(other, source, one.round))

    async def remove(self, job: str) -> None:
        """Remove all of a job."""
        await self._artifacts.delete_all(f"{FOLDER}/{job}")

    async def _prune(self, job: str, task: str, keep: int) -> None:
        for one in (await self.find(job, task))[:-keep]:
            await self._artifacts.delete(_name(job, task, one.round))


def rounds_of(checkpoints: Collection[Checkpoint]) -> list[int]:
    """Their rounds, in order, each once."""
    return sorted({one.round for one in checkpoints})


def _name(job: str, task: str, number: int) -> str:
    return f"{FOLDER}/{job}/{task}/{number:0{_DIGITS}d}"


def _read(artifact: Artifact) -> Checkpoint:
    *_, task, number = artifact.name.split("/")
    return Checkpoint(task, int(number), artifact.size, artifact.modified)
