"""What tasks hand in, such as ``model.safetensors``: files in the data directory, one folder a job.

An artifact is written beside its place and moved there when it is whole, so nobody ever reads half of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterable, Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from flame.errors import NotFound, SpecError, StoreError

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


class Artifacts:
    """All artifacts, under one folder: ``FOLDER/JOB/NAME``.

    :param limit: the largest artifact, in bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def path(self, job: str, name: str) -> Path:
        """Where an artifact is, or will be.

        :raises flame.errors.SpecError: the name is not a plain file name.
        """
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"{name[:200]!r} cannot be an artifact's name; use letters, digits, dots, dashes and underscores."
            )
        return self._folder / job / name

    def find(self, job: str, name: str) -> Path:
        """Where an artifact is.

        :raises flame.errors.NotFound: the job has none of this name.
        """
        path = self.path(job, name)
        if not path.is_file():
            names = sorted(entry.name for entry in path.parent.glob("*") if not entry.name.startswith("."))
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise NotFound(f"Job {job} has no artifact {name!r}; {has}.")
        return path

    async def put(self, job: str, name: str, data: AsyncIterable[bytes]) -> Path:
        """Keep an artifact; an earlier one of that name is replaced once this one is whole.

        :raises flame.errors.SpecError: it is larger than the limit.
        :raises flame.errors.StoreError: the disk is full, or the folder is not writable.
        """
        path = self.path(job, name)
        partial = await self._disk(path, _create, path.parent)
        size = 0
        try:
            async for piece in data:
                size += len(piece)
                if size > self._limit:
                    raise SpecError(f"The artifact {name!r} is larger than the {self._limit} bytes allowed.")
                await self._disk(path, partial.write, piece)
            await self._disk(path, partial.close)
            await self._disk(path, os.replace, partial.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.close()
            Path(partial.name).unlink(missing_ok=True)
            raise
        return path

    @staticmethod
    async def _disk(path: Path, work: Callable[..., T], *args: Any) -> T:
        """Something that may take long or fail, as disks do. (What the sender does wrong looks alike, and is not this.)"""
        try:
            return await asyncio.to_thread(work, *args)
        except OSError as error:
            raise StoreError(f"The artifact {path.name!r} cannot be written to {path}: {error.strerror}.") from error

    async def remove(self, job: str) -> None:
        """Remove all artifacts of a job."""
        await asyncio.to_thread(shutil.rmtree, self._folder / job, True)


def _create(folder: Path) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False)
