"""Code bundles by their digest: with the artifacts where these are apart, else with the state.

The state's own place is the default, because it moves with the state: beside an embedded database, or in a database on the network, where
another server finds them. What was kept there before a bucket was chosen is still found.
"""

from __future__ import annotations

from flame.artifacts import Artifacts
from flame.artifacts.base import addressed
from flame.errors import NotFound, SpecError
from flame.store import Store

FOLDER = "bundles"


class Bundles:
    """All code bundles.

    :param store: the state.
    :param place: where artifacts are kept.
    """

    def __init__(self, store: Store, place: Artifacts) -> None:
        self._store = store
        self._place = place if place.apart else None

    async def put(self, data: bytes) -> str:
        """Keep a bundle; gives its SHA-256 in hex. The same bytes are kept once."""
        if self._place is None:
            return await self._store.put_bundle(data)
        return await self._place.keep(FOLDER, data)

    async def get(self, digest: str) -> bytes | None:
        """A bundle's bytes, or None."""
        if self._place is not None:
            try:
                return await self._place.get(addressed(FOLDER, digest))
            except (NotFound, SpecError):
                pass
        return await self._store.get_bundle(digest)

    async def delete(self, digest: str) -> None:
        """Remove a bundle, wherever it is."""
        if self._place is not None:
            await self._place.delete(addressed(FOLDER, digest))
        await self._store.delete_bundle(digest)
