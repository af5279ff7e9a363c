"""Journals of bytes: a document for each record, named by its journal and number.

The writer numbers the records, so nothing is looked up before a write, and a write whose answer was lost is done again: what is
there already is what it has written. All records of a call go to the server in one request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from flame.store.mongo_server import Fields, MongoServer, errors

_DUPLICATE = 11000
_PART = 8 << 20  # MongoDB takes documents of up to 16 MB
_TOGETHER = 1000


class MongoJournals:
    """The journals of a database."""

    def __init__(self, server: MongoServer) -> None:
        self._server = server

    async def record(self, entries: Sequence[tuple[str, int, bytes]]) -> None:
        """See :meth:`flame.store.Store.record`."""
        journals = await self._server.collection("journals")
        documents = [document for entry in entries for document in _documents(*entry)]

        async def insert(again: bool) -> None:
            try:
                await journals.insert_many(documents, ordered=not again)
            except errors.BulkWriteError as error:
                faults = error.details.get("writeErrors", [])
                if not again or any(fault["code"] != _DUPLICATE for fault in faults):
                    raise

        if documents:
            await self._server.patiently(insert)

    async def recall(self, journal: str, after: int, limit: int) -> list[tuple[int, bytes]]:
        """See :meth:`flame.store.Store.recall`."""
        journals = await self._server.collection("journals")
        records: dict[int, bytes] = {}
        last = _name(journal, after, ~0)
        while len(records) <= limit:
            query: Fields = {"_id": {"$gt": last, "$lt": f"{journal}#~"}}
            found = await self._server.patiently(
                lambda _: journals.find(query).sort("_id", 1).limit(limit + 1).to_list()  # noqa: B023 - called at once
            )
            for document in found:
                records[document["n"]] = records.get(document["n"], b"") + document["d"]
            if len(found) <= limit:
                break
            last = found[-1]["_id"]
        # The last one may have further parts, unless there was no more to read.
        return list(records.items())[:limit]

    async def forget(self, journal: str, numbers: Sequence[int] | None) -> None:
        """See :meth:`flame.store.Store.forget`. FerretDB looks records up one by one."""
        journals = await self._server.collection("journals")
        if numbers is None:
            query: Fields = {"_id": {"$gt": f"{journal}#", "$lt": f"{journal}#~"}}
            await self._server.patiently(lambda _: journals.delete_many(query))
            return
        for number in numbers:
            one: Fields = {"_id": {"$gte": _name(journal, number, 0), "$lt": _name(journal, number + 1, 0)}}
            await self._server.patiently(lambda _: journals.delete_many(one))  # noqa: B023 - called at once

    async def names(self) -> list[str]:
        """The names of all journals that have records, sorted."""
        journals = await self._server.collection("journals")
        found = await self._server.patiently(lambda _: journals.find({}, {"_id": 1}).to_list())
        return sorted({document["_id"].rpartition("#")[0] for document in found})

    async def records(self, journal: str) -> AsyncIterator[list[tuple[int, bytes]]]:
        """All records of a journal, in pieces."""
        after = 0
        while records := await self.recall(journal, after, _TOGETHER):
            yield records
            after = records[-1][0]


def _documents(journal: str, number: int, data: bytes) -> list[Fields]:
    starts = range(0, len(data), _PART) if data else [0]
    return [
        {"_id": _name(journal, number, part), "n": number, "d": data[start : start + _PART]}
        for part, start in enumerate(starts)
    ]


def _name(journal: str, number: int, part: int) -> str:
    place = "~" if part == ~0 else f"{part:06}"
    return f"{journal}#{number:016}.{place}"
