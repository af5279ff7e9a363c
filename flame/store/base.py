"""The interface of the state: JSON documents by id, durable event streams, journals of bytes, binary bundles.

It is kept so small that an embedded database and a document server both serve it well: a document is
addressed by ``(collection, id)`` and changed one at a time by compare-and-set of its version. There are
no joins and no transactions over several documents; whoever needs two changes orders them so that a
crash in between leaves something that a restart can finish.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from flame.spec.records import Event


class Document(NamedTuple):
    """A stored document. ``version`` begins at 1 and grows by one with each change."""

    id: str
    version: int
    body: dict[str, Any]


class KeptDocument(NamedTuple):
    """A document as :meth:`Store.dump` gives it, with its collection and its unique keys."""

    collection: str
    document: Document
    keys: Sequence[str]


class KeptEvents(NamedTuple):
    """Events of one stream that follow on each other, as :meth:`Store.dump` gives them."""

    stream: str
    events: Sequence[Event]


class KeptBundle(NamedTuple):
    """A bundle as :meth:`Store.dump` gives it."""

    data: bytes


class KeptRecords(NamedTuple):
    """Records of one journal with their numbers, in order, as :meth:`Store.dump` gives them."""

    journal: str
    records: Sequence[tuple[int, bytes]]


Kept = KeptDocument | KeptEvents | KeptBundle | KeptRecords


class Store(abc.ABC):
    """State. All methods raise :class:`flame.errors.StoreError` when the database fails.

    A write has reached the database (it survives ``kill -9`` of this process) when the call returns.
    """

    @abc.abstractmethod
    async def insert(self, collection: str, id: str, body: dict[str, Any], *, keys: Sequence[str] = ()) -> Document:
        """Add a document.

        :param keys: further unique keys of this document within the collection, such as ``name:mnist``.
        :raises flame.errors.Conflict: the id or one of the keys is taken.
        """

    @abc.abstractmethod
    async def get(self, collection: str, id: str) -> Document | None:
        """The document, or None."""

    @abc.abstractmethod
    async def replace(self, collection: str, id: str, body: dict[str, Any], *, version: int) -> Document | None:
        """Change a document if its version is still ``version``; None if it is not, or if it is gone."""

    @abc.abstractmethod
    async def delete(self, collection: str, id: str) -> bool:
        """Remove a document and its keys; False if there was none."""

    @abc.abstractmethod
    async def find(
        self,
        collection: str,
        *,
        where: dict[str, str] | None = None,
        after: str | None = None,
        limit: int = 1000,
        descending: bool = False,
    ) -> list[Document]:
        """Documents in order of their ids.

        :param where: equality on top-level string fields of the body, such as ``{"jobId": "..."}``.
        :param after: begin behind this id (before it, when ``descending``).
        """

    @abc.abstractmethod
    async def append(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        """Add events ``(type, data)`` at the end of a stream, in order and without gaps, and give them with their numbers."""

    @abc.abstractmethod
    async def read(self, stream: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """The events of a stream with ``seq > after``, in order."""

    @abc.abstractmethod
    async def drop(self, stream: str) -> None:
        """Remove a stream and its events."""

    @abc.abstractmethod
    async def record(self, entries: Sequence[tuple[str, int, bytes]]) -> None:
        """Write records ``(journal, number, bytes)``, of several journals if need be, all in one go.

        A journal is for what is written very often, by one writer who numbers it himself (upwards; gaps are allowed): a
        record costs a row and nothing is looked up. Those that a crash cuts off are the last ones of the call. A number
        that is taken already is an error of the caller's, and whether its record is replaced is not said.
        """

    @abc.abstractmethod
    async def recall(self, journal: str, *, after: int = 0, limit: int = 1000) -> list[tuple[int, bytes]]:
        """The records of a journal with a number above ``after``, in order."""

    @abc.abstractmethod
    async def forget(self, journal: str, numbers: Sequence[int] | None = None) -> None:
        """Remove records of a journal by their numbers; None: all. What is not there is no error."""

    @abc.abstractmethod
    async def put_bundle(self, data: bytes) -> str:
        """Keep a binary bundle; gives its SHA-256 in hex, which is its address. The same bytes are kept once."""

    @abc.abstractmethod
    async def get_bundle(self, digest: str) -> bytes | None:
        """A bundle's bytes, or None."""

    @abc.abstractmethod
    async def delete_bundle(self, digest: str) -> bool:
        """Remove a bundle; False if there was none."""

    @abc.abstractmethod
    def dump(self) -> AsyncIterator[Kept]:
        """Everything that is kept: documents, events (each stream's in order), journals, bundles. For a store that nobody changes meanwhile."""

    @abc.abstractmethod
    async def load(self, kept: Kept) -> None:
        """Keep something that another store's :meth:`dump` gave, with its version, or its numbers and times.

        :raises flame.errors.Conflict: a document or an event is in its place already.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Finish what is under way and close the database."""
