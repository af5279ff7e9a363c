"""The tasks' logs: one file an attempt, kept whole, appended at an offset, followed by push.

The writer says where its bytes belong. When the offset is not the file's size (a call was repeated, or its answer got
lost), nothing is written and the true size is the answer; the writer goes on from there. So a log is neither torn
nor doubled whoever restarts.

Small pieces are written in the event loop, because that takes less time than to hand them to a thread; long reads
are handed over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from flame.artifacts import Artifacts
from flame.errors import NotFound, StoreError

_CHUNK = 256 * 1024
_INLINE = 64 * 1024
_FAR = 4 << 20  # of a log that is elsewhere: few requests, little memory
_ARCHIVE = "logs"

log = logging.getLogger("flame.controller")


class _Open:
    """A log that may still grow: who follows it waits for ``changed``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = asyncio.Event()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Logs:
    """All logs, under one folder: ``FOLDER/JOB/TASK.ATTEMPT.log``.

    :param folder: where logs grow.
    :param place: where they go when their job has ended, if that is not on this machine; a bucket cannot be appended to.
    """

    def __init__(self, folder: Path, place: Artifacts | None = None) -> None:
        self._folder = folder
        self._place = place if place is not None and place.apart else None
        self._open: dict[Path, _Open] = {}

    def path(self, job: str, task: str, attempt: int) -> Path:
        """Where the log of an attempt is, or will be."""
        return self._folder / job / f"{task}.{attempt}.log"

    def open(self, job: str, task: str, attempt: int) -> None:
        """Say that this log may grow: from now on it can be followed."""
        path = self.path(job, task, attempt)
        if path not in self._open:
            self._open[path] = _Open(_size(path))

    def close(self, job: str, task: str, attempt: int) -> None:
        """Say that this log is whole: who follows it comes to its end."""
        log = self._open.pop(self.path(job, task, attempt), None)
        if log is not None:
            log.wake()

    async def append(self, job: str, task: str, attempt: int, offset: int, data: bytes) -> int:
        """Add bytes at ``offset``; gives the size of the log afterwards. A wrong offset adds nothing.

        :raises flame.errors.StoreError: the disk is full, or the folder is not writable.
        """
        path = self.path(job, task, attempt)
        log = self._open.get(path)
        size = log.size if log is not None else _size(path)
        if offset != size or not data:
            return size
        if log is not None:
            log.size = size + len(data)  # at once: a second call that comes meanwhile is measured against it
        try:
            if len(data) <= _INLINE:
                _write(path, size, data)
            else:
                await asyncio.to_thread(_write, path, size, data)
        except OSError as error:
            if log is not None:
                log.size = _size(path)
            raise StoreError(f"The log of task {task} cannot be written to {path}: {error.strerror}.") from error
        if log is not None:
            log.wake()
        return size + len(data)

    async def size(self, job: str, task: str, attempt: int) -> int:
        """How many bytes the log has."""
        path = self.path(job, task, attempt)
        log = self._open.get(path)
        if log is not None:
            return log.size
        size = _size(path)
        if not size and self._place is not None and (found := await self._place.stat(self._archived(path))):
            return found.size
        return size

    def jobs(self) -> list[str]:
        """The jobs that have logs which still are where they grew, and are to go elsewhere."""
        return [path.name for path in self._folder.glob("*")] if self._place is not None else []

    async def archive(self, job: str) -> None:
        """Move the logs of a job that has ended to where artifacts are kept. What fails is done by the next server."""
        if self._place is None:
            return
        try:
            for path in sorted((self._folder / job).glob("*.log")):
                if path not in self._open:
                    await self._place.put(self._archived(path), _file(path))
                    path.unlink()
            (self._folder / job).rmdir()
        except (StoreError, OSError) as error:
            log.warning("the logs of job %s stay in %s for now: %s", job, self._folder / job, error)

    async def read(
        self, job: str, task: str, attempt: int, *, offset: int = 0, follow: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """The log from a byte on; when following, until :meth:`close`. An empty piece says that there is no news yet."""
        path = self.path(job, task, attempt)
        while True:
            log = self._open.get(path)
            changed = log.changed if log is not None else None
            while data := await self._piece(path, offset):
                offset += len(data)
                yield data
            if not follow or changed is None:
                return
            yield b""
            await changed.wait()

    def tail(self, job: str, task: str, attempt: int, lines: int = 20) -> list[str]:
        """The last lines of a log, without their ends; a line is cut at 2000 characters."""
        path = self.path(job, task, attempt)
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _INLINE))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line[:2000] for line in text.splitlines()[-lines:]]

    def release(self) -> None:
        """The server ends: nobody can follow any more."""
        for log in self._open.values():
            log.wake()
        self._open.clear()

    async def remove(self, job: str) -> None:
        """Remove all logs of a job."""
        for path in [path for path in self._open if path.parent.name == job]:
            self._open.pop(path).wake()
        await asyncio.to_thread(shutil.rmtree, self._folder / job, True)
        if self._place is not None:
            await self._place.delete_all(f"{_ARCHIVE}/{job}")

    async def _piece(self, path: Path, offset: int) -> bytes:
        if _size(path) - offset > 0:
            return await asyncio.to_thread(_read, path, offset)
        if self._place is not None and path not in self._open and not path.exists():
            try:
                return b"".join(
                    [piece async for piece in self._place.read(self._archived(path), offset, offset + _FAR)]
                )
            except NotFound:
                return b""
        return b""

    @staticmethod
    def _archived(path: Path) -> str:
        return f"{_ARCHIVE}/{path.parent.name}/{path.name}"


async def _file(path: Path) -> AsyncIterator[bytes]:
    offset = 0
    while piece := await asyncio.to_thread(_read, path, offset):
        offset += len(piece)
        yield piece


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK)
    except FileNotFoundError:
        return b""


def _write(path: Path, offset: int, data: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb", closefd=True) as file:
        file.seek(offset)
        file.write(data)
