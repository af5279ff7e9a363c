"""The interface of artifacts: bytes under a name, written as a whole, read in pieces.

An artifact is complete or absent, whoever is killed while it is written, and one that is read while it is replaced is
the old one or the new one. Names are paths with slashes, such as ``artifacts/JOB/model.safetensors``; what is addressed by
its content lies under its digest (:meth:`Artifacts.keep`).
"""

from __future__ import annotations

import abc
import hashlib
import re
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import NamedTuple

from flame.errors import SpecError, UsageError

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@=-]{0,254}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

#: How many bytes a piece that is read has, about.
PIECE = 1 << 20


class Artifact(NamedTuple):
    """What is known of an artifact without reading it.

    :ivar name: its name.
    :ivar size: in bytes.
    :ivar modified: when it was written, in seconds since 1970.
    """

    name: str
    size: int
    modified: float


class Artifacts(abc.ABC):
    """Artifacts by name. All methods raise :class:`flame.errors.StoreError` when the place fails.

    :ivar url: where they are: of the folder or the bucket, without credentials.
    :ivar apart: they are on no disk of this machine, so that others can take over from it.
    """

    url: str
    apart: bool = False

    @abc.abstractmethod
    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> Artifact:
        """Keep an artifact; an earlier one of that name is replaced once this one is whole.

        An error that ``data`` raises is passed on, and then nothing was changed.
        """

    @abc.abstractmethod
    async def stat(self, name: str) -> Artifact | None:
        """What is known of an artifact, or None if it is absent."""

    @abc.abstractmethod
    def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of an artifact from ``start`` to before ``end``, in pieces; beyond its end there are none.

        :raises flame.errors.NotFound: it is absent.
        """

    @abc.abstractmethod
    async def find(self, folder: str) -> list[Artifact]:
        """All artifacts in a folder and those below it, in the order of their names."""

    @abc.abstractmethod
    async def delete(self, name: str) -> bool:
        """Remove an artifact; False if there was none."""

    @abc.abstractmethod
    async def delete_all(self, folder: str) -> None:
        """Remove all artifacts in a folder and those below it."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of the place."""

    async def check(self) -> None:
        """Find out whether the place can be used, before anything depends on it."""

    def path(self, name: str) -> Path | None:
        """The file that holds the artifact, where it is one and there: for who can send or map it without a copy."""
        return None

    async def adopt(self, name: str, source: Path, size: int) -> bool:
        """Keep a file of this machine without copying it, where the place can. Whoever has it must not change it any more.

        :returns: False where it cannot, or there is no file of this size; then it is to be put.
        """
        return False

    async def get(self, name: str) -> bytes:
        """The whole of a small artifact.

        :raises flame.errors.NotFound: it is absent.
        """
        return b"".join([piece async for piece in self.read(name)])

    async def keep(self, folder: str, data: bytes) -> str:
        """Keep bytes by their content in a folder; gives their SHA-256 in hex. The same bytes are kept once."""
        digest = hashlib.sha256(data).hexdigest()
        name = addressed(folder, digest)
        if await self.stat(name) is None:
            await self.put(name, data)
        return digest


def addressed(folder: str, digest: str) -> str:
    """The name of what is kept in a folder by its content.

    :raises flame.errors.SpecError: that is no digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise SpecError(f"{digest[:80]!r} is no SHA-256 in hex.")
    return f"{folder}/{digest[:2]}/{digest}"


def check_name(name: str) -> str:
    """The name, if it is one: it can lead nowhere else, in a file system or in a URL.

    :raises flame.errors.UsageError: it is none.
    """
    if len(name) > 900 or not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise UsageError(
            f"{name[:200]!r} cannot be an artifact's name; use letters, digits, dots, dashes and underscores."
        )
    return name
