"""The objects of sessions: what is kept once by its content, for as long as an open session has it.

A session has an object once somebody has brought it to that session: knowing a digest opens nothing. The bytes are an
artifact, one for all sessions that have it; the last of them takes it along when it is closed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flame.artifacts import Artifact, Artifacts
from flame.artifacts.base import addressed
from flame.errors import Conflict, NotFound, SpecError
from flame.store import Store

_COLLECTION = "objects"
_FOLDER = "objects"


class Objects:
    """All objects of a server.

    :param store: who has which.
    :param place: where their bytes are.
    :param limit: the largest, in bytes.
    """

    def __init__(self, store: Store, place: Artifacts, limit: int) -> None:
        self._store = store
        self.place = place
        self._limit = limit
        self._changing = asyncio.Lock()  # who has what, against what is about to be removed

    def folder(self) -> Path | None:
        """The folder in which objects are files under the first two digits of their digest; None where they are no files here."""
        parts = urlsplit(self.place.url)
        return Path(unquote(parts.path), _FOLDER) if parts.scheme == "file" else None

    async def put(self, session: str, digest: str, data: AsyncIterable[bytes]) -> None:
        """A session gets an object.

        :raises flame.errors.SpecError: the bytes have another digest, or are too many.
        """
        name = addressed(_FOLDER, digest)

        async def checked() -> AsyncIterator[bytes]:
            seen, size = hashlib.sha256(), 0
            async for piece in data:
                size += len(piece)
                if size > self._limit:
                    raise SpecError(f"The object is larger than the {self._limit} bytes allowed.")
                seen.update(piece)
                yield piece
            if seen.hexdigest() != digest:
                raise SpecError(f"The bytes are not those of the digest {digest}; theirs is {seen.hexdigest()}.")

        if await self.has(session, digest):
            async for _ in data:
                pass
            return
        # Written even where it is there already: who brings it has shown that they have it.
        await self.place.put(name, checked())
        async with self._changing:
            if await self.place.stat(name) is None:  # taken along by another session a moment ago
                raise Conflict(f"The object {digest[:12]} was removed meanwhile; bring it again.")
            if not await self.has(session, digest):
                body = {"sessionId": session, "digest": digest}
                await self._store.insert(_COLLECTION, _id(session, digest), body)

    async def has(self, session: str, digest: str) -> bool:
        """Whether a session has an object."""
        return await self._store.get(_COLLECTION, _id(session, digest)) is not None

    async def find(self, session: str, digest: str) -> Artifact:
        """An object of a session.

        :raises flame.errors.NotFound: the session has none of this digest.
        """
        if await self.has(session, digest) and (found := await self.place.stat(addressed(_FOLDER, digest))):
            return found
        raise NotFound(f"Session {session} has no object {digest[:80]}.")

    async def drop(self, session: str) -> None:
        """A session is closed: its objects go, but for those that others have."""
        for document in await self._store.find(_COLLECTION, where={"sessionId": session}, limit=1_000_000):
            digest = document.body["digest"]
            async with self._changing:
                await self._store.delete(_COLLECTION, document.id)
                if not await self._store.find(_COLLECTION, where={"digest": digest}, limit=1):
                    await self.place.delete(addressed(_FOLDER, digest))


def _id(session: str, digest: str) -> str:
    return f"{session}\n{digest}"
