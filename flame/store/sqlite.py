"""The embedded store: one SQLite file, no server, nothing to set up.

The file is in WAL mode with ``synchronous=NORMAL``. A committed write is in the operating system's hands, so it
survives ``kill -9`` of this process. A power cut may take the last transactions with it but never
damages the file, since SQLite still orders its writes at checkpoints. ``FULL`` would wait for the disk at every
commit, which costs a hundred times more than all the rest, to save seconds of events about workers that died
in the same power cut.

One thread writes, all that is queued in one transaction (see :mod:`flame.store.lane`); others read, each on a connection
of its own, and never wait for the writer.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flame.errors import Conflict, StoreError
from flame.spec.records import Event
from flame.store.base import Document, Kept, KeptBundle, KeptDocument, KeptEvents, KeptRecords, Store
from flame.store.bundles import BundleFiles
from flame.store.connection import connect, explain
from flame.store.lane import Call, Lane
from flame.store.migrations import MIGRATIONS, migrate
from flame.store.text import check_field, to_text

#: Fields of a body that are kept in columns of their own, with an index, because lists are filtered by them.
_COLUMNS = {"jobId": "job_id", "state": "state"}
_ADD = "INSERT INTO events (stream, seq, time, type, data) VALUES (?, ?, ?, ?, ?)"
_READERS = 2


class SqliteStore(Store):
    """State in a SQLite file, bundles as files beside it.

    :param path: the database; made, with its folder, where it is not there.
    :param bundles: the folder of the bundles.
    :raises flame.errors.StoreError: it cannot be opened, is not Flame's, or a newer Flame wrote it.
    """

    def __init__(self, path: Path, *, bundles: Path) -> None:
        self._path = path
        connections: list[sqlite3.Connection] = []
        try:
            connections.append(connect(path))
            migrate(connections[0], MIGRATIONS, path)
            for _ in range(_READERS):
                connections.append(connect(path))
                connections[-1].execute("PRAGMA query_only = 1")
        except (sqlite3.Error, OSError, StoreError) as error:
            for connection in connections:
                connection.close()
            raise explain(error, path) from error
        self._bundles = BundleFiles(bundles)
        self._write = Lane("store-writer", connections[:1], self._commit, batch=1000)
        self._query = Lane("store-reader", connections[1:], self._answer, batch=16)

    async def insert(self, collection: str, id: str, body: dict[str, Any], *, keys: Sequence[str] = ()) -> Document:
        """See the base class. A refused insert changes nothing and disturbs nobody in its batch."""
        document = Document(id, 1, body)
        await self._insert(KeptDocument(collection, document, keys))
        return document

    async def get(self, collection: str, id: str) -> Document | None:
        """See the base class. Sees every write that has returned, from whichever coroutine."""

        def operation(db: sqlite3.Connection) -> Document | None:
            sql = "SELECT id, version, body FROM documents WHERE collection = ? AND id = ?"
            row = db.execute(sql, (collection, id)).fetchone()
            return _document(row) if row else None

        return await self._query(operation)

    async def replace(self, collection: str, id: str, body: dict[str, Any], *, version: int) -> Document | None:
        """See the base class. The version is compared in the statement that changes the row."""
        row = (*_row(collection, id, body), collection, id, version)

        def operation(db: sqlite3.Connection) -> bool:
            sql = (
                "UPDATE documents SET version = version + 1, body = ?, job_id = ?, state = ?"
                " WHERE collection = ? AND id = ? AND version = ?"
            )
            return db.execute(sql, row).rowcount == 1

        return Document(id, version + 1, body) if await self._write(operation) else None

    async def delete(self, collection: str, id: str) -> bool:
        """See the base class."""

        def operation(db: sqlite3.Connection) -> bool:
            db.execute("DELETE FROM keys WHERE collection = ? AND id = ?", (collection, id))
            return db.execute("DELETE FROM documents WHERE collection = ? AND id = ?", (collection, id)).rowcount == 1

        return await self._write(operation)

    async def find(
        self,
        collection: str,
        *,
        where: dict[str, str] | None = None,
        after: str | None = None,
        limit: int = 1000,
        descending: bool = False,
    ) -> list[Document]:
        """See the base class. ``jobId`` and ``state`` have indexes; other fields are looked for row by row."""
        conditions, values = ["collection = ?"], [collection]
        for field, value in (where or {}).items():
            column = _COLUMNS.get(field, f"json_extract(body, '$.{check_field(field)}')")
            conditions.append(f"{column} = ?")
            values.append(value)
        if after is not None:
            conditions.append("id < ?" if descending else "id > ?")
            values.append(after)
        sql = (
            f"SELECT id, version, body FROM documents WHERE {' AND '.join(conditions)}"  # noqa: S608 - names checked above
            f" ORDER BY id {'DESC' if descending else 'ASC'} LIMIT ?"
        )
        return await self._query(lambda db: [_document(row) for row in db.execute(sql, (*values, limit))])

    async def append(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        """See the base class. Numbered in the write transaction, so in the order of the commits."""
        rows = [(kind, to_text(f"An event of {stream}", data)) for kind, data in entries]

        def operation(db: sqlite3.Connection) -> tuple[int, float]:
            now, last = time.time(), _last(db, stream)
            db.executemany(_ADD, [(stream, last + count, now, *row) for count, row in enumerate(rows, 1)])
            return last, now

        last, now = await self._write(operation)
        # Decoded from what was stored: whoever is handed these sees exactly what a later read would show.
        return [
            Event(seq=last + count, time=now, type=kind, data=msgspec.json.decode(data))
            for count, (kind, data) in enumerate(rows, 1)
        ]

    async def read(self, stream: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        """See the base class."""

        def operation(db: sqlite3.Connection) -> list[Event]:
            sql = "SELECT seq, time, type, data FROM events WHERE stream = ? AND seq > ? ORDER BY seq LIMIT ?"
            return [
                Event(seq=seq, time=at, type=kind, data=msgspec.json.decode(data))
                for seq, at, kind, data in db.execute(sql, (stream, after, limit))
            ]

        return await self._query(operation)

    async def drop(self, stream: str) -> None:
        """See the base class. A later append to the stream begins at 1 again."""
        await self._write(lambda db: db.execute("DELETE FROM events WHERE stream = ?", (stream,)).rowcount)

    async def record(self, entries: Sequence[tuple[str, int, bytes]]) -> None:
        """See the base class. One transaction, together with whatever else is queued."""
        await self._write(lambda db: _record(db, entries))

    async def recall(self, journal: str, *, after: int = 0, limit: int = 1000) -> list[tuple[int, bytes]]:
        """See the base class."""
        sql = "SELECT number, data FROM journals WHERE journal = ? AND number > ? ORDER BY number LIMIT ?"
        return await self._query(lambda db: db.execute(sql, (journal, after, limit)).fetchall())

    async def forget(self, journal: str, numbers: Sequence[int] | None = None) -> None:
        """See the base class."""

        def operation(db: sqlite3.Connection) -> None:
            if numbers is None:
                db.execute("DELETE FROM journals WHERE journal = ?", (journal,))
            else:
                rows = [(journal, number) for number in numbers]
                db.executemany("DELETE FROM journals WHERE journal = ? AND number = ?", rows)

        await self._write(operation)

    async def put_bundle(self, data: bytes) -> str:
        """See the base class."""
        return await asyncio.to_thread(self._bundles.put, data)

    async def get_bundle(self, digest: str) -> bytes | None:
        """See the base class."""
        return await asyncio.to_thread(self._bundles.get, digest)

    async def delete_bundle(self, digest: str) -> bool:
        """See the base class."""
        return await asyncio.to_thread(self._bundles.delete, digest)

    async def dump(self) -> AsyncIterator[Kept]:
        """See the base class."""
        for name in await self._all("SELECT collection, id FROM documents ORDER BY collection, id"):
            keys = await self._all("SELECT key FROM keys WHERE collection = ? AND id = ? ORDER BY key", *name)
            if document := await self.get(*name):
                yield KeptDocument(name[0], document, [key for (key,) in keys])
        for (stream,) in await self._all("SELECT DISTINCT stream FROM events ORDER BY stream"):
            after = 0
            while events := await self.read(stream, after=after):
                yield KeptEvents(stream, events)
                after = events[-1].seq
        for (journal,) in await self._all("SELECT DISTINCT journal FROM journals ORDER BY journal"):
            after = 0
            while records := await self.recall(journal, after=after, limit=100):
                yield KeptRecords(journal, records)
                after = records[-1][0]
        for digest in await asyncio.to_thread(self._bundles.digests):
            data = await self.get_bundle(digest)
            if data is not None:
                yield KeptBundle(data)

    async def load(self, kept: Kept) -> None:
        """See the base class."""
        if isinstance(kept, KeptDocument):
            await self._insert(kept)
        elif isinstance(kept, KeptEvents):
            await self._write(lambda db: _load_events(db, kept))
        elif isinstance(kept, KeptRecords):
            await self.record([(kept.journal, *record) for record in kept.records])
        else:
            await self.put_bundle(kept.data)

    async def close(self) -> None:
        """See the base class. What was queued is still served; later calls raise."""
        await asyncio.to_thread(self._query.close)
        await asyncio.to_thread(self._write.close)  # last: the last connection to go folds the log into the file

    async def _insert(self, kept: KeptDocument) -> None:
        collection, document, keys = kept
        row = (collection, *document[:2], *_row(collection, document.id, document.body))

        def operation(db: sqlite3.Connection) -> None:
            # Everything that may be refused is asked before the first change, so a refusal leaves nothing behind.
            for key in keys:
                owner = db.execute("SELECT id FROM keys WHERE collection = ? AND key = ?", (collection, key)).fetchone()
                if owner:
                    raise Conflict(f"{key.replace(':', ' ', 1)} is taken in {collection}: by {owner[0]}.")
            done = db.execute(
                "INSERT INTO documents (collection, id, version, body, job_id, state) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                row,
            )
            if not done.rowcount:
                raise Conflict(f"{document.id} is there already in {collection}.")
            if keys:
                rows = [(collection, key, document.id) for key in dict.fromkeys(keys)]
                db.executemany("INSERT INTO keys (collection, key, id) VALUES (?, ?, ?)", rows)

        await self._write(operation)

    async def _all(self, sql: str, *values: str) -> list[tuple[str, ...]]:
        return await self._query(lambda db: db.execute(sql, values).fetchall())

    def _commit(self, db: sqlite3.Connection, calls: Sequence[Call]) -> None:
        """Serve a batch as one transaction. Where one operation spoils it, each is tried alone: only that one fails."""
        try:
            db.execute("BEGIN IMMEDIATE")
            for call in calls:
                try:
                    call.result = call.operation(db)
                except Conflict as error:
                    call.error = error
            db.execute("COMMIT")
        except Exception as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if len(calls) == 1 or isinstance(error, sqlite3.OperationalError):  # the database's fault, not a call's
                for call in calls:
                    call.error = explain(error, self._path)
            else:
                for call in calls:
                    call.error = None
                    self._commit(db, [call])

    def _answer(self, db: sqlite3.Connection, calls: Sequence[Call]) -> None:
        for call in calls:
            try:
                call.result = call.operation(db)
            except Exception as error:
                call.error = explain(error, self._path)


def _row(collection: str, id: str, body: dict[str, Any]) -> tuple[str, str | None, str | None]:
    job, state = (value if isinstance(value := body.get(field), str) else None for field in _COLUMNS)
    return to_text(f"{id} of {collection}", body), job, state


def _last(db: sqlite3.Connection, stream: str) -> int:
    last: int | None = db.execute("SELECT max(seq) FROM events WHERE stream = ?", (stream,)).fetchone()[0]
    return last or 0


def _record(db: sqlite3.Connection, entries: Sequence[tuple[str, int, bytes]]) -> None:
    db.executemany("INSERT INTO journals (journal, number, data) VALUES (?, ?, ?)", entries)


def _load_events(db: sqlite3.Connection, kept: KeptEvents) -> None:
    if [event.seq for event in kept.events] != list(
        range(begin := _last(db, kept.stream) + 1, begin + len(kept.events))
    ):
        raise Conflict(f"The stream {kept.stream} has other events already.")
    rows = [(event.seq, event.time, event.type, to_text("An event", event.data)) for event in kept.events]
    db.executemany(_ADD, [(kept.stream, *row) for row in rows])


def _document(row: tuple[str, int, str]) -> Document:
    return Document(row[0], row[1], msgspec.json.decode(row[2]))
