"""The store on MongoDB: a standalone server, a replica set, or FerretDB.

Everything is addressed by ``_id`` and changed one document at a time, with no transaction, change stream or
server-side script, so the smallest server will do. A document's body is kept as JSON text: a user's keys may hold
dots and dollar signs, and numbers any number of digits, which BSON would not take. Beside it stand its top-level strings in ``is``, by
which lists are filtered (those of up to 1000 characters).

A unique key is a document of its own, inserted before the document that it belongs to. A process that is killed between the two
leaves a key without an owner; such a key can be taken over once it is older than any insert can last.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec

from flame.errors import Conflict, StoreError
from flame.spec.records import Event
from flame.store.base import Document, Kept, KeptBundle, KeptDocument, KeptEvents, KeptRecords, Store
from flame.store.lock import TERMS
from flame.store.mongo_journals import MongoJournals
from flame.store.mongo_server import Collection, Fields, MongoServer, sign
from flame.store.mongo_streams import MongoStreams
from flame.store.text import check_field, is_field, to_text

_INDEXED = ("jobId", "state")
_DOCS = "docs."
_LARGEST = 15_000_000  # MongoDB takes documents of up to 16 MB
_LONGEST_FILTER = 1000  # characters
_CHUNK = 4 << 20
_ABANDONED = 120.0  # seconds; twice as long as an insert waits for a server that is away


class MongoStore(Store):
    """State in a MongoDB database.

    :param url: see :class:`flame.store.mongo_server.MongoServer`.
    :param migrate: likewise.
    :raises flame.errors.UsageError: the URL is malformed. Whether the server is there is found out at the first use.
    """

    def __init__(self, url: str, *, migrate: bool = True) -> None:
        self._server = MongoServer(url, migrate=migrate)
        self._streams = MongoStreams(self._server)
        self._journals = MongoJournals(self._server)
        self._indexed: set[str] = set()

    def guard(self, check: Callable[[], Awaitable[None]]) -> None:
        """Ask ``check`` before every operation, at each try, whether this process may still write."""
        self._server.guard = check

    async def insert(self, collection: str, id: str, body: dict[str, Any], *, keys: Sequence[str] = ()) -> Document:
        """See the base class."""
        document = Document(id, 1, body)
        await self._insert(KeptDocument(collection, document, list(dict.fromkeys(keys))))
        return document

    async def get(self, collection: str, id: str) -> Document | None:
        """See the base class."""
        found = await self._server.get(await self._documents(collection), id, "v", "body")
        return _document(found) if found else None

    async def replace(self, collection: str, id: str, body: dict[str, Any], *, version: int) -> Document | None:
        """See the base class. For FerretDB see :class:`flame.store.mongo_server.MongoServer`."""
        documents = await self._documents(collection)
        op = sign()
        change = {"v": version + 1, "op": op, **_fields(collection, id, body)}

        def landed(found: Fields) -> bool:
            return bool(found["op"] == op)

        if await self._server.swap(documents, id, {"v": version}, {"$set": change}, landed):
            return Document(id, version + 1, body)
        return None

    async def delete(self, collection: str, id: str) -> bool:
        """See the base class."""
        documents = await self._documents(collection)
        found = await self._server.get(documents, id, "keys")
        if found is None or not await self._server.remove(documents, id):
            return False
        for key in found["keys"]:
            await self._server.remove(await self._server.collection("keys"), f"{collection}/{key}", owner=id)
        return True

    async def find(
        self,
        collection: str,
        *,
        where: dict[str, str] | None = None,
        after: str | None = None,
        limit: int = 1000,
        descending: bool = False,
    ) -> list[Document]:
        """See the base class. ``jobId`` and ``state`` have indexes; FerretDB reads the whole collection all the same."""
        query: Fields = {}
        for field, value in (where or {}).items():
            if not _is_short(value):
                raise StoreError(f"Lists cannot be filtered by a {field} of more than {_LONGEST_FILTER} characters.")
            query[f"is.{check_field(field)}"] = value
        if after is not None:
            query["_id"] = {"$lt" if descending else "$gt": after}
        if limit <= 0:
            return []
        documents = await self._documents(collection)
        found = await self._server.patiently(
            lambda _: (
                documents.find(query, {"v": 1, "body": 1}).sort("_id", -1 if descending else 1).limit(limit).to_list()
            )
        )
        return [_document(fields) for fields in found]

    async def append(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        """See the base class."""
        rows = [(kind, _json(f"An event of {stream}", data)) for kind, data in entries]
        first, now = await self._streams.append(stream, rows)
        return [
            Event(seq=number, time=now, type=kind, data=msgspec.json.decode(data))
            for number, (kind, data) in enumerate(rows, first)
        ]

    async def read(self, stream: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """See the base class."""
        return await self._streams.read(stream, after, limit)

    async def drop(self, stream: str) -> None:
        """See the base class. A later append to the stream begins at 1 again."""
        await self._streams.drop(stream)

    async def record(self, entries: Sequence[tuple[str, int, bytes]]) -> None:
        """See the base class."""
        await self._journals.record(entries)

    async def recall(self, journal: str, *, after: int = 0, limit: int = 1000) -> list[tuple[int, bytes]]:
        """See the base class."""
        return await self._journals.recall(journal, after, limit)

    async def forget(self, journal: str, numbers: Sequence[int] | None = None) -> None:
        """See the base class."""
        await self._journals.forget(journal, numbers)

    async def put_bundle(self, data: bytes) -> str:
        """See the base class. The chunks are written before the document that says how many there are."""
        digest = (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
        heads, chunks = await self._server.collection("bundles"), await self._server.collection("chunks")
        if await self._server.get(heads, digest) is None:
            starts = range(0, len(data), _CHUNK)
            for number, start in enumerate(starts):  # one that is there already has the same bytes
                chunk = {"_id": f"{digest}#{number}", "data": data[start : start + _CHUNK], "op": sign()}
                await self._server.create(chunks, chunk)
            await self._server.create(heads, {"_id": digest, "chunks": len(starts), "op": sign()})
        return digest

    async def get_bundle(self, digest: str) -> bytes | None:
        """See the base class."""
        head = await self._server.get(await self._server.collection("bundles"), digest)
        if head is None:
            return None
        chunks = await self._server.collection("chunks")
        pieces: list[bytes] = []
        for number in range(head["chunks"]):
            piece = await self._server.get(chunks, f"{digest}#{number}", "data")
            if piece is None:
                return None  # it is being deleted
            pieces.append(piece["data"])
        return b"".join(pieces)

    async def delete_bundle(self, digest: str) -> bool:
        """See the base class."""
        heads, chunks = await self._server.collection("bundles"), await self._server.collection("chunks")
        head = await self._server.get(heads, digest)
        if head is None or not await self._server.remove(heads, digest):
            return False
        for number in range(head["chunks"]):
            await self._server.remove(chunks, f"{digest}#{number}")
        return True

    async def dump(self) -> AsyncIterator[Kept]:
        """See the base class."""
        for name in await self._server.names():
            if not name.startswith(_DOCS) or name == f"{_DOCS}{TERMS}":  # who serves is no state to take elsewhere
                continue
            documents, after = await self._server.collection(name), ""
            while found := await self._server.patiently(lambda _: _page(documents, after)):  # noqa: B023 - called at once
                for fields in found:
                    yield KeptDocument(name.removeprefix(_DOCS), _document(fields), sorted(fields["keys"]))
                after = found[-1]["_id"]
        for stream in await self._streams.names():
            async for events in self._streams.events(stream):
                yield KeptEvents(stream, events)
        for journal in await self._journals.names():
            async for records in self._journals.records(journal):
                yield KeptRecords(journal, records)
        heads = await self._server.collection("bundles")
        for head in await self._server.patiently(lambda _: heads.find({}, {"_id": 1}).sort("_id", 1).to_list()):
            data = await self.get_bundle(head["_id"])
            if data is not None:
                yield KeptBundle(data)

    async def load(self, kept: Kept) -> None:
        """See the base class."""
        if isinstance(kept, KeptDocument):
            await self._insert(kept)
        elif isinstance(kept, KeptEvents):
            await self._streams.load(kept.stream, kept.events)
        elif isinstance(kept, KeptRecords):
            await self._journals.record([(kept.journal, *record) for record in kept.records])
        else:
            await self.put_bundle(kept.data)

    async def close(self) -> None:
        """See the base class."""
        await self._streams.close()
        await self._server.close()

    async def _insert(self, kept: KeptDocument) -> None:
        collection, document, keys = kept
        name = document.id
        begin = time.monotonic()
        op = sign()
        fields = {
            "_id": name,
            "v": document.version,
            "op": op,
            "keys": list(keys),
            **_fields(collection, name, document.body),
        }
        documents = await self._documents(collection)
        claimed: list[str] = []
        try:
            for key in keys:
                await self._claim(collection, key, name, op)
                claimed.append(key)
            if not await self._server.create(documents, fields):
                raise Conflict(f"{name} is there already in {collection}.")
            if time.monotonic() - begin > _ABANDONED / 2:  # so long that our claims may have been taken for abandoned
                for key in keys:
                    await self._hold(collection, key, documents, name, op)
        except (Conflict, StoreError):
            for key in claimed:
                await self._server.remove(await self._server.collection("keys"), f"{collection}/{key}", op=op)
            raise

    async def _claim(self, collection: str, key: str, id: str, op: str) -> None:
        """Make a unique key ours, or say whose it is."""
        keys = await self._server.collection("keys")
        name = f"{collection}/{key}"
        mine = {"owner": id, "op": op, "at": time.time()}
        if await self._server.create(keys, {"_id": name, **mine}):
            return
        found = await self._server.get(keys, name)
        if found is not None and time.time() - found["at"] > _ABANDONED:
            owner = await self._server.get(await self._documents(collection), found["owner"], "keys")
            if owner is None or key not in owner["keys"]:
                expected = {"op": found["op"]}
                if await self._server.swap(
                    keys, name, expected, {"$set": mine}, lambda fields: bool(fields["op"] == op)
                ):
                    return
        by = f": by {found['owner']}" if found else ""
        raise Conflict(f"{key.replace(':', ' ', 1)} is taken in {collection}{by}.")

    async def _hold(self, collection: str, key: str, documents: Collection, id: str, op: str) -> None:
        found = await self._server.get(await self._server.collection("keys"), f"{collection}/{key}", "op")
        if found is None or found["op"] != op:
            await self._server.remove(documents, id)
            raise Conflict(f"{key.replace(':', ' ', 1)} was taken in {collection} while the database was away.")

    async def _documents(self, collection: str) -> Collection:
        documents = await self._server.collection(f"{_DOCS}{collection}")
        if collection not in self._indexed:
            if not self._server.by_id_alone:  # FerretDB would keep the indexes and not use them
                for field in _INDEXED:
                    await self._server.patiently(lambda _: documents.create_index([(f"is.{field}", 1), ("_id", 1)]))  # noqa: B023 - called at once
            self._indexed.add(collection)
        return documents


async def _page(documents: Collection, after: str) -> list[Fields]:
    return await documents.find({"_id": {"$gt": after}}).sort("_id", 1).limit(1000).to_list()


def _json(what: str, body: dict[str, Any]) -> str:
    text = to_text(what, body)
    if len(text) > _LARGEST / 4 and (size := len(text.encode())) > _LARGEST:  # up to four bytes a character
        raise StoreError(f"{what} cannot be stored: it has {size:,} bytes, and MongoDB takes {_LARGEST:,}.")
    return text


def _fields(collection: str, id: str, body: dict[str, Any]) -> Fields:
    strings = {name: value for name, value in body.items() if is_field(name) and _is_short(value)}
    return {"is": strings, "body": _json(f"{id} of {collection}", body)}


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_FILTER


def _document(fields: Fields) -> Document:
    return Document(fields["_id"], fields["v"], msgspec.json.decode(fields["body"]))
