"""Binary bundles as files, named by their digest.

Files, and not rows of the database, because a bundle is megabytes and written once: in the database it
would pass through the write-ahead log, hold up every small write behind it, and make each later copy of
the database carry it. A bundle is complete or absent: it is written under a temporary name, forced to the
disk, renamed, and the rename is forced to the disk too. What a killed process has left half-written is removed at the
next start, known by nobody holding its lock any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
from pathlib import Path

from flame.errors import StoreError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class BundleFiles:
    """A folder of bundles, each at ``aa/DIGEST`` where ``aa`` are the digest's first two digits. Its methods block.

    :param root: the folder; made at the first use.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._partial = root / "partial"
        self._remove_abandoned()

    def put(self, data: bytes) -> str:
        """Keep ``data``; gives its SHA-256 in hex. The same bytes are kept once.

        :raises flame.errors.StoreError: the file cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._partial.mkdir(exist_ok=True)
                self._write(path, data)
        except OSError as error:
            raise self._failure("written", path, error) from error
        return digest

    def get(self, digest: str) -> bytes | None:
        """The bytes of a bundle, or None; also None for what cannot be a digest."""
        if not _DIGEST.fullmatch(digest):
            return None
        path = self._path(digest)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure("read", path, error) from error

    def delete(self, digest: str) -> bool:
        """Remove a bundle; False if there was none."""
        if not _DIGEST.fullmatch(digest):
            return False
        path = self._path(digest)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failure("removed", path, error) from error
        return True

    def digests(self) -> list[str]:
        """The digests of all bundles, sorted."""
        return sorted(path.name for path in self._root.glob("??/*") if _DIGEST.fullmatch(path.name))

    def _path(self, digest: str) -> Path:
        return self._root / digest[:2] / digest

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self._partial)
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # says: somebody is still writing this
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove_abandoned(self) -> None:
        for path in self._partial.glob("*"):
            with contextlib.suppress(OSError), path.open("rb") as file:  # locked, or gone in between
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @staticmethod
    def _failure(what: str, path: Path, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(f"The bundle {path} cannot be {what}: the disk is full. Free some space and try again.")
        return StoreError(f"The bundle {path} cannot be {what}: {error.strerror or error}.")
