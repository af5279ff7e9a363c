"""Records in the store: a collection whose documents are of one type.

This server is the only one that writes to its store (the data directory is locked), so a record that it holds is
the newest there is. The store compares versions all the same, and a difference is an error that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from flame.errors import StoreError
from flame.spec.records import Record
from flame.store import Document, Store

R = TypeVar("R", bound=Record)


@dataclass(slots=True)
class Saved(Generic[R]):
    """A record as it is in the store."""

    id: str
    version: int
    record: R


class Shelf(Generic[R]):
    """One collection.

    :param store: where it is.
    :param name: the collection's name.
    :param type: what its documents are.
    """

    def __init__(self, store: Store, name: str, type: type[R]) -> None:
        self._store = store
        self._name = name
        self._type = type

    async def insert(self, id: str, record: R, *, keys: Sequence[str] = ()) -> Saved[R]:
        """Add a record.

        :raises flame.errors.Conflict: the id or one of the keys is taken.
        """
        document = await self._store.insert(self._name, id, msgspec.to_builtins(record), keys=keys)
        return Saved(id, document.version, record)

    async def get(self, id: str) -> Saved[R] | None:
        """The record, or None."""
        document = await self._store.get(self._name, id)
        return None if document is None else self._read(document)

    async def put(self, saved: Saved[R], record: R) -> None:
        """Change a record; ``saved`` is brought up to date once the store has it.

        :raises flame.errors.StoreError: somebody else changed it.
        """
        document = await self._store.replace(self._name, saved.id, msgspec.to_builtins(record), version=saved.version)
        if document is None:
            raise StoreError(
                f"{self._name}/{saved.id} was changed or removed by somebody else: is another server using this store?"
            )
        saved.version, saved.record = document.version, record

    async def delete(self, id: str) -> bool:
        """Remove a record; False if there was none."""
        return await self._store.delete(self._name, id)

    async def find(
        self,
        where: dict[str, str] | None = None,
        *,
        after: str | None = None,
        limit: int = 1000,
        descending: bool = False,
    ) -> list[Saved[R]]:
        """Records in order of their ids; ``where`` is equality on top-level fields, by their stored names."""
        found = await self._store.find(self._name, where=where, after=after, limit=limit, descending=descending)
        return [self._read(document) for document in found]

    async def all(self, where: dict[str, str] | None = None) -> list[Saved[R]]:
        """Every record for which ``where`` holds."""
        found: list[Saved[R]] = []
        while True:
            page = await self.find(where, after=found[-1].id if found else None)
            found += page
            if len(page) < 1000:
                return found

    def _read(self, document: Document) -> Saved[R]:
        try:
            return Saved(document.id, document.version, msgspec.convert(document.body, self._type))
        except msgspec.ValidationError as error:
            raise StoreError(f"{self._name}/{document.id} in the store is damaged: {error}.") from error
