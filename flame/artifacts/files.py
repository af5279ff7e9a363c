"""Artifacts as files in a folder.

An artifact is written beside its place under a name that no artifact has, forced to the disk, and moved there. What a killed
process has left half-written is locked by nobody any more, and removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from flame.artifacts.base import PIECE, Artifact, Artifacts, check_name
from flame.errors import NotFound, StoreError

T = TypeVar("T")

_PARTIAL = ".partial-"
#: The top-level folders that artifacts are put into. Others in a data directory are not ours, and may be vast.
_FOLDERS = ("artifacts", "bundles", "checkpoints", "logs")


class FileArtifacts(Artifacts):
    """Artifacts in a folder.

    :param root: the folder; made at the first use.
    :param apart: it is not the data directory, but one that outlives this machine, such as a share on the network.
    """

    def __init__(self, root: Path, *, apart: bool = False) -> None:
        self.apart = apart
        self._root = root
        self.url = root.absolute().as_uri()

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> Artifact:
        """See the base class."""
        path = self._path(name)
        partial = await self._disk("written", name, _create, path.parent)
        try:
            if isinstance(data, bytes):
                await self._disk("written", name, partial.write, data)
            else:
                async for piece in data:
                    await self._disk("written", name, partial.write, piece)
            await self._disk("written", name, _put_in_place, partial, path)
        except BaseException:
            # Without a thread: whoever is cancelled must not leave before the file has.
            with contextlib.suppress(OSError):
                partial.close()
            Path(partial.name).unlink(missing_ok=True)
            raise
        found = await self.stat(name)
        assert found is not None
        return found

    async def stat(self, name: str) -> Artifact | None:
        """See the base class."""
        path = self._path(name)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failure("read", name, error) from error
        return Artifact(name, status.st_size, status.st_mtime) if path.is_file() else None

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See the base class."""
        path = self._path(name)
        try:
            file = path.open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound(f"There is no artifact {name!r}.") from None
        except OSError as error:
            raise self._failure("read", name, error) from error
        with file:
            file.seek(start)
            while (size := PIECE if end is None else min(PIECE, end - start)) > 0:
                piece = await self._disk("read", name, file.read, size)
                if not piece:
                    return
                start += len(piece)
                yield piece

    async def find(self, folder: str) -> list[Artifact]:
        """See the base class."""
        return await self._disk("listed", folder, self._find, check_name(folder))

    async def delete(self, name: str) -> bool:
        """See the base class."""
        path = self._path(name)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._failure("removed", name, error) from error
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # if that was the last one in it
        return True

    async def delete_all(self, folder: str) -> None:
        """See the base class."""
        await asyncio.to_thread(shutil.rmtree, self._path(folder), True)

    async def check(self) -> None:
        """See the base class. What killed servers have left half-written goes away."""
        for folder in _FOLDERS:
            await asyncio.to_thread(self.sweep, folder)

    async def close(self) -> None:
        """See the base class."""

    def path(self, name: str) -> Path | None:
        """See the base class."""
        path = self._path(name)
        return path if path.is_file() else None

    async def adopt(self, name: str, source: Path, size: int) -> bool:
        """See the base class: the file gets a second name."""
        return await asyncio.to_thread(_link, source, self._path(name), size)

    def sweep(self, folder: str) -> None:
        """Remove what killed processes have left half-written in a folder and below."""
        for path in self._path(folder).rglob(f"{_PARTIAL}*"):
            with contextlib.suppress(OSError), path.open("rb") as file:  # locked, or gone in between
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _find(self, folder: str) -> list[Artifact]:
        found = []
        for path in (self._root / folder).rglob("*"):
            if path.name.startswith(".") or not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                status = path.stat()
                found.append(Artifact(path.relative_to(self._root).as_posix(), status.st_size, status.st_mtime))
        return sorted(found)

    async def _disk(self, what: str, name: str, work: Callable[..., T], *args: Any) -> T:
        """Something that may take long or fail, as disks do. (What the sender does wrong looks alike, and is not this.)"""
        try:
            return await asyncio.to_thread(work, *args)
        except OSError as error:
            raise self._failure(what, name, error) from error

    def _failure(self, what: str, name: str, error: OSError) -> StoreError:
        path = self._root / name
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                f"The artifact {name!r} cannot be {what}: the disk of {path.parent} is full. Free some space and try again."
            )
        return StoreError(f"The artifact {name!r} cannot be {what} ({path}): {error.strerror or error}.")


def _create(folder: Path) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=folder, prefix=_PARTIAL, delete=False)  # noqa: SIM115 - the caller closes it
    fcntl.flock(file, fcntl.LOCK_EX)  # says: somebody is still writing this
    return file


def _put_in_place(partial: IO[bytes], path: Path) -> None:
    partial.flush()
    os.fsync(partial.fileno())
    os.replace(partial.name, path)
    partial.close()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link(source: Path, target: Path, size: int) -> bool:
    """Give a file a second name, if it is the one that is meant. It appears there as a whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{_PARTIAL}{target.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        os.link(source, beside, follow_symlinks=False)
        found = beside.lstat()  # of our name for it: behind the other one its worker may put a link at any time
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            beside.unlink()
            return False
        os.replace(beside, target)
        beside.unlink(missing_ok=True)  # where both were names of one file already, the replacing does nothing
    except OSError:
        return False
    return True
