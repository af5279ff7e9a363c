"""What tasks hand in, such as ``model.safetensors``: artifacts of a job, wherever the server keeps its artifacts."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator

from flame.artifacts import Artifact, Artifacts
from flame.errors import NotFound, SpecError

FOLDER = "artifacts"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


class JobArtifacts:
    """All artifacts of all jobs, named ``artifacts/JOB/NAME``.

    :param place: where they are kept.
    :param limit: the largest artifact, in bytes.
    """

    def __init__(self, place: Artifacts, limit: int) -> None:
        self.place = place
        self._limit = limit

    def name(self, job: str, name: str) -> str:
        """The whole name of a job's artifact.

        :raises flame.errors.SpecError: the name is not a plain file name.
        """
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"{name[:200]!r} cannot be an artifact's name; use letters, digits, dots, dashes and underscores."
            )
        return f"{FOLDER}/{job}/{name}"

    async def find(self, job: str, name: str) -> Artifact:
        """What is known of an artifact.

        :raises flame.errors.NotFound: the job has none of this name.
        """
        found = await self.place.stat(self.name(job, name))
        if found is None:
            names = [one.name.rpartition("/")[2] for one in await self.place.find(f"{FOLDER}/{job}")]
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise NotFound(f"Job {job} has no artifact {name!r}; {has}.")
        return found

    async def put(self, job: str, name: str, data: AsyncIterable[bytes]) -> str:
        """Keep an artifact; an earlier one of that name is replaced once this one is whole. Gives the path or URL where it is.

        :raises flame.errors.SpecError: it is larger than the limit.
        :raises flame.errors.StoreError: the disk is full, or the place is not writable.
        """

        async def measured() -> AsyncIterator[bytes]:
            size = 0
            async for piece in data:
                size += len(piece)
                if size > self._limit:
                    raise SpecError(f"The artifact {name!r} is larger than the {self._limit} bytes allowed.")
                yield piece

        whole = self.name(job, name)
        await self.place.put(whole, measured())
        return str(self.place.path(whole) or f"{self.place.url}/{whole}")

    async def remove(self, job: str) -> None:
        """Remove all artifacts of a job."""
        await self.place.delete_all(f"{FOLDER}/{job}")
