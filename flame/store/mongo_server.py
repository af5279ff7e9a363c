"""The connection to a server that speaks MongoDB's protocol: waiting for it, changing one document at a time, errors.

A server that goes away comes back, so every operation waits for it within a limit. A write whose answer was
lost may have taken place or not; it is therefore tried again with a sign (``op``) by which the second try
recognises the work of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from flame.errors import MissingExtra, StoreError, UsageError
from flame.store import mongo_migrations

try:
    from pymongo import AsyncMongoClient, errors
    from pymongo.asynchronous.collection import AsyncCollection
    from pymongo.asynchronous.database import AsyncDatabase
    from pymongo.uri_parser import parse_uri
except ImportError as missing:
    raise MissingExtra("pymongo", "mongodb", "A database on MongoDB") from missing

__all__ = ["Collection", "Fields", "MongoServer", "errors", "sign"]

T = TypeVar("T")
Fields = dict[str, Any]
Collection = AsyncCollection[Fields]

#: Seconds after which what a process has begun and not ended counts as given up; twice as long as a write waits for a server.
ABANDONED = 120.0
_PATIENCE = 60.0
_FIRST_PATIENCE = 10.0


def sign() -> str:
    """A new sign of one write."""
    return secrets.token_hex(8)


class MongoServer:
    """One database on a server. Belongs to the event loop in which it is first used.

    Two ways of compare-and-set serve two kinds of server. MongoDB finds a document by ``_id`` and compares the
    rest in the same atomic step. FerretDB 1 reads the whole collection for any filter that holds more than an
    ``_id``, and what it has found it changes in a second step, which is not atomic. There the comparison is a read of our
    own, and changes of one document take turns: within this process by a lock of its own, and between processes by a claim, a document
    that is named after the change (the document and what is expected of it), because inserting an ``_id`` is
    atomic everywhere. A server that holds the lock of the database (``guard``) is alone, and needs no claims.

    :param url: ``mongodb://[user:password@]host[:port]/[database][?options]``; the database's name is ``flame`` by default.
    :param migrate: bring the database to the newest version when it is opened; not for who waits for its lock.
    :raises flame.errors.UsageError: the URL is malformed.
    """

    def __init__(self, url: str, *, migrate: bool = True) -> None:
        self._migrates = migrate
        try:
            parsed = parse_uri(url, warn=True)
        except (errors.PyMongoError, ValueError) as error:
            raise UsageError(f"The URL of the MongoDB database is malformed: {error}.") from error
        options = parsed["options"]
        self.name = ", ".join(f"{host}:{port}" for host, port in parsed["nodelist"])  # without the password
        self._database = parsed["database"] or "flame"
        self._url = url
        # Ours unless the URL says otherwise: a write is there when it survives the end of the database's process.
        wanted: Fields = {"w": "majority", "journal": True, "maxPoolSize": 32, "socketTimeoutMS": 30_000}
        # What the driver would send again by itself might arrive long after another server has taken over; we try again.
        wanted["retryWrites"] = False
        self._options: Fields = {
            name: value for name, value in wanted.items() if name.lower() not in map(str.lower, options)
        }
        self._client: AsyncMongoClient[Fields] | None = None
        self._opening = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._closed = False
        self.by_id_alone = False
        #: Asked before every try of an operation whether this process may still write; see :mod:`flame.store.lock`.
        self.guard: Callable[[], Awaitable[None]] | None = None
        self._self = sign()

    def turn(self, name: str) -> asyncio.Lock:
        """The lock of that name in this process; it exists while somebody uses it."""
        return self._turns.setdefault(name, asyncio.Lock())

    async def collection(self, name: str) -> Collection:
        """A collection of the database; connects at the first call.

        :raises flame.errors.StoreError: the server cannot be reached, refuses us, or holds what a newer Flame wrote.
        """
        if self._closed:
            raise StoreError("The store is closed.")
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    self._client = await self._open()
        return self._client[self._database][name]

    async def names(self) -> list[str]:
        """The names of the collections that there are, sorted."""
        some = await self.collection("meta")
        return sorted(await self.patiently(lambda _: some.database.list_collection_names()))

    async def patiently(self, operation: Callable[[bool], Awaitable[T]], *, patience: float = _PATIENCE) -> T:
        """Do an operation, again and again while the server is away.

        :param operation: is told whether an earlier try may have taken place without an answer.
        :param patience: seconds after which the server is given up.
        :raises flame.errors.StoreError: the server stayed away, or refuses the operation.
        """
        deadline = time.monotonic() + patience
        again = False
        while True:
            if self.guard is not None:
                await self.guard()
            try:
                return await operation(again)
            except errors.ConnectionFailure as error:
                if time.monotonic() > deadline or self._closed:
                    raise StoreError(
                        f"MongoDB at {self.name} cannot be reached: {_reason(error)}."
                        " Check that it runs and that its address is right."
                    ) from error
            except errors.OperationFailure as error:
                raise StoreError(f"MongoDB at {self.name} refused: {_reason(error)}.") from error
            except (errors.PyMongoError, OverflowError) as error:
                raise StoreError(f"MongoDB at {self.name} failed: {_reason(error)}.") from error
            again = True
            await asyncio.sleep(0.05)  # the driver itself waits for the server; this only keeps a refusal from spinning

    async def create(self, collection: Collection, document: Fields) -> bool:
        """Insert a document that carries a sign in ``op``; False if its ``_id`` is taken."""

        async def insert(again: bool) -> bool:
            try:
                await collection.insert_one(document)
            except errors.DuplicateKeyError:
                if not again:
                    return False
                found = await collection.find_one({"_id": document["_id"]}, {"op": 1})
                return found is not None and found.get("op") == document["op"]
            return True

        return await self.patiently(insert)

    async def get(self, collection: Collection, id: str, *fields: str) -> Fields | None:
        """Some fields of a document, or None."""
        return await self.patiently(lambda _: collection.find_one({"_id": id}, dict.fromkeys(fields, 1)))

    async def swap(
        self,
        collection: Collection,
        id: str,
        expected: Mapping[str, Any],
        update: Fields,
        landed: Callable[[Fields], bool],
    ) -> bool:
        """Change a document if some of its fields have the expected values; False if they have not.

        :param update: update operators, which change one of the expected fields.
        :param landed: says of the document, as it is found after a lost answer, whether the change took place.
        """

        async def attempt(again: bool) -> bool:
            if self.by_id_alone:
                async with self.turn(f"{collection.name}/{id}"), self._claim(collection, id, expected) as ours:
                    found = await collection.find_one({"_id": id}) if ours else None
                    matched = found is not None and all(found.get(name) == expected[name] for name in expected)
                    if matched:
                        await collection.update_one({"_id": id}, update)
            else:
                matched = (await collection.update_one({"_id": id, **expected}, update)).matched_count == 1
            if matched or not again:
                return matched
            found = await collection.find_one({"_id": id})
            return found is not None and landed(found)

        return await self.patiently(attempt)

    @contextlib.asynccontextmanager
    async def _claim(self, collection: Collection, id: str, expected: Mapping[str, Any]) -> AsyncIterator[bool]:
        """Be the only process that makes this change; False if another one is at it. To be called in the document's :meth:`turn`.

        A claim that is our own already is from a try whose answer was lost, or that could not take it back. A process
        that was killed in between leaves its claim behind, which holds for as long as its change could take.
        """
        if self.guard is not None:
            yield True
            return
        claims = collection.database["claims"]
        name = f"{collection.name}/{id}@{sorted(expected.items())}"
        claim = {"_id": name, "op": self._self, "at": time.time()}
        try:
            await claims.insert_one(claim)
        except errors.DuplicateKeyError:
            there = await claims.find_one({"_id": name})
            if there is None or there["op"] != self._self:
                if there is not None and time.time() - there["at"] > ABANDONED:
                    await claims.delete_one({"_id": name})  # for the next try
                yield False
                return
        try:
            yield True
        finally:
            await claims.delete_one({"_id": name})

    async def remove(self, collection: Collection, id: str, **expected: Any) -> bool:
        """Delete a document, if some of its fields have the expected values; False if there was none."""

        async def attempt(again: bool) -> bool:
            return bool((await collection.delete_one({"_id": id, **expected})).deleted_count) or again

        return await self.patiently(attempt)

    async def close(self) -> None:
        """Let go of the server."""
        self._closed = True
        if self._client is not None:
            await self._client.close()

    async def _open(self) -> AsyncMongoClient[Fields]:
        client: AsyncMongoClient[Fields] = AsyncMongoClient(
            self._url, serverSelectionTimeoutMS=2000, connectTimeoutMS=2000, appname="flame", **self._options
        )
        try:
            info = await self.patiently(lambda _: client.server_info(), patience=_FIRST_PATIENCE)
            self.by_id_alone = _by_id_alone(info)
            if self._migrates:
                await self._migrate(client[self._database])
        except BaseException:
            await client.close()
            raise
        return client

    async def _migrate(self, database: AsyncDatabase[Fields]) -> None:
        """Bring the database to the newest version, step by step; each is written down before the next."""
        meta, newest = database["meta"], 1 + len(mongo_migrations.STEPS)
        await self.create(meta, {"_id": "schema", "version": newest, "op": sign()})
        while (version := _version(await self.get(meta, "schema", "version"))) < newest:
            step = mongo_migrations.STEPS[version - 1]
            await self.patiently(lambda _: step(database))  # noqa: B023 - called at once
            op = sign()
            change = {"$set": {"version": version + 1, "op": op}}
            await self.swap(meta, "schema", {"version": version}, change, lambda found: bool(found["op"] == op))  # noqa: B023
        if version > newest:
            raise StoreError(
                f"The database {self._database} on MongoDB at {self.name} was written by a newer Flame (version"
                f" {version}, this Flame knows {newest}). Install that Flame, or choose another database."
            )


def _version(found: Fields | None) -> int:
    return int(found["version"]) if found else 0


def _by_id_alone(server_info: Fields) -> bool:
    return "ferretdbVersion" in server_info


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)
    text = details.get("errmsg") if isinstance(details, Mapping) else None
    return (
        str(text or error).split(", Timeout:", maxsplit=1)[0].split(" (configured", maxsplit=1)[0].rstrip(".")
        or type(error).__name__
    )
