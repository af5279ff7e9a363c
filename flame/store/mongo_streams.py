"""Event streams as blocks of events, for a server that looks a document up by its ``_id``.

The events of a stream lie in documents ``STREAM#BLOCK`` of up to 64 events each. Block and place of an event follow
from its number, so reading on from a number is a handful of look-ups by ``_id``, with no index and no
counter that could disagree with the events. Appending changes the last block alone, if it holds as many events as expected: that
numbers the events without gaps, whoever else appends. Whatever queues up for a stream while a block is written goes
into the next write together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from flame.errors import Conflict, StoreError
from flame.spec.records import Event
from flame.store.mongo_server import Fields, MongoServer, sign

_BLOCK = 64
_INLINE = 1 << 16  # larger events lie in documents of their own, so that a block stays far below 16 MB
_REMEMBERED = 10_000

Row = Fields  #: ``t``: type, ``at``: time, ``d``: data as JSON, or ``r``: the document that holds them


class _Append:
    """Rows that wait to be written, and the number of the first of them once they are."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.first: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class MongoStreams:
    """The event streams of a database."""

    def __init__(self, server: MongoServer) -> None:
        self._server = server
        self._last: dict[str, int] = {}  # what we believe; every write finds out whether it is true
        self._waiting: dict[str, list[_Append]] = {}
        self._writers: dict[str, asyncio.Task[None]] = {}

    async def append(self, stream: str, entries: Sequence[tuple[str, str]]) -> tuple[int, float]:
        """Add entries ``(type, JSON)``; gives the number of the first one and the time of all."""
        now = time.time()
        rows = [await self._row(stream, now, kind, data) for kind, data in entries]
        if not rows:
            return 1, now
        append = _Append(rows)
        self._waiting.setdefault(stream, []).append(append)
        if stream not in self._writers:
            self._writers[stream] = asyncio.create_task(self._write_waiting(stream))
        return await append.first, now

    async def read(self, stream: str, after: int, limit: int) -> list[Event]:
        """See :meth:`flame.store.Store.read`."""
        rows: list[Row] = []
        block, skip = divmod(max(after, 0), _BLOCK)
        ahead = 1  # most readers want the end of a stream, which is one block
        while len(rows) < limit:
            documents = await asyncio.gather(*(self._block(stream, number) for number in range(block, block + ahead)))
            for document in documents:
                rows += document["e"][skip:]
                skip = 0
            if documents[-1]["n"] < _BLOCK:
                break
            block, ahead = block + ahead, 8
        return [await self._event(number, row) for number, row in enumerate(rows[:limit], max(after, 0) + 1)]

    async def drop(self, stream: str) -> None:
        """See :meth:`flame.store.Store.drop`."""
        blocks = await self._server.collection("events")
        parts = await self._server.collection("parts")
        async with self._server.turn(f"stream/{stream}"):
            self._last.pop(stream, None)
            last = await self._find_last(stream)
            for number in range(last // _BLOCK, -1, -1):  # from the end: what a crash leaves is a stream without gaps
                for row in (await self._block(stream, number))["e"]:
                    if "r" in row:
                        await self._server.remove(parts, row["r"])
                await self._server.remove(blocks, _name(stream, number))

    async def load(self, stream: str, events: Sequence[Event]) -> None:
        """Add events with the numbers and times that they have.

        :raises flame.errors.Conflict: the stream does not end where they begin.
        """
        rows = [await self._row(stream, event.time, event.type, _text(event)) for event in events]
        async with self._server.turn(f"stream/{stream}"):
            self._last.pop(stream, None)
            last = await self._find_last(stream)
            if not events or events[0].seq != last + 1 or await self._write(stream, rows) != last + 1:
                raise Conflict(f"The stream {stream} has other events already.")

    async def names(self) -> list[str]:
        """The names of all streams that have events, sorted."""
        blocks = await self._server.collection("events")
        found = await self._server.patiently(lambda _: blocks.find({}, {"_id": 1}).to_list())
        return sorted({document["_id"].rpartition("#")[0] for document in found})

    async def events(self, stream: str) -> AsyncIterator[list[Event]]:
        """All events of a stream, in pieces."""
        after = 0
        while events := await self.read(stream, after, 1000):
            yield events
            after = events[-1].seq

    async def close(self) -> None:
        """Finish the writes that are under way, unless the server is away."""
        if self._writers:
            await asyncio.wait(self._writers.values(), timeout=5)

    async def _write_waiting(self, stream: str) -> None:
        """Write what waits for a stream, until nothing does."""
        try:
            async with self._server.turn(f"stream/{stream}"):
                while batch := self._waiting.pop(stream, []):
                    try:
                        first = await self._write(stream, [row for append in batch for row in append.rows])
                    except Exception as error:  # whatever it is, nobody may wait for ever
                        for append in batch:
                            if not append.first.done():
                                append.first.set_exception(StoreError(str(error)))
                        continue
                    for append in batch:
                        if not append.first.done():  # else its caller was cancelled
                            append.first.set_result(first)
                        first += len(append.rows)
        finally:
            del self._writers[stream]

    async def _write(self, stream: str, rows: list[Row]) -> int:
        """Append rows, block by block; gives the number of the first."""
        first = None
        while rows:
            last = self._last.get(stream)
            if last is None:
                last = await self._find_last(stream)
            part = rows[: _BLOCK - last % _BLOCK]
            if await self._extend(stream, last, part):
                self._remember(stream, last + len(part))
                first = first or last + 1
                rows = rows[len(part) :]
            else:
                self._last.pop(stream, None)  # another process has written to it
        assert first is not None
        return first

    async def _extend(self, stream: str, last: int, rows: list[Row]) -> bool:
        """Add rows behind number ``last``, all in one block; False if that is not the last number."""
        blocks = await self._server.collection("events")
        number, fill = divmod(last, _BLOCK)
        if fill == 0:
            block = {"_id": _name(stream, number), "n": len(rows), "e": rows, "op": sign()}
            return await self._server.create(blocks, block)
        update = {"$push": {"e": {"$each": rows}}, "$set": {"n": fill + len(rows)}}

        def landed(block: Fields) -> bool:
            return bool(block["e"][fill : fill + len(rows)] == rows)

        return await self._server.swap(blocks, _name(stream, number), {"n": fill}, update, landed)

    async def _find_last(self, stream: str) -> int:
        """The number of a stream's last event, from the blocks: gallop to one that is not full, then halve."""
        full, beyond = -1, 0
        while (fill := (await self._block(stream, beyond, "n"))["n"]) == _BLOCK:
            full, beyond = beyond, beyond * 2 + 1
        while full + 1 < beyond:
            middle = (full + beyond) // 2
            filled = (await self._block(stream, middle, "n"))["n"]
            if filled == _BLOCK:
                full = middle
            else:
                beyond, fill = middle, filled
        return beyond * _BLOCK + int(fill)

    async def _block(self, stream: str, number: int, *fields: str) -> Fields:
        blocks = await self._server.collection("events")
        found = await self._server.get(blocks, _name(stream, number), *fields or ("n", "e"))
        return found or {"n": 0, "e": []}

    async def _row(self, stream: str, at: float, kind: str, data: str) -> Row:
        if len(data) <= _INLINE:
            return {"t": kind, "at": at, "d": data}
        name = f"{stream}#{sign()}"
        if not await self._server.create(await self._server.collection("parts"), {"_id": name, "d": data, "op": name}):
            raise StoreError(f"An event of {stream} could not be written: its place {name} is taken.")
        return {"t": kind, "at": at, "r": name}

    async def _event(self, number: int, row: Row) -> Event:
        data = row.get("d")
        if data is None:
            part = await self._server.get(await self._server.collection("parts"), row["r"], "d")
            data = part["d"] if part else "{}"  # the stream is being dropped
        return Event(seq=number, time=row["at"], type=row["t"], data=msgspec.json.decode(data))

    def _remember(self, stream: str, last: int) -> None:
        self._last[stream] = last
        if len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]


def _name(stream: str, block: int) -> str:
    return f"{stream}#{block:08}"


def _text(event: Event) -> str:
    text: Any = msgspec.json.encode(event.data)
    return str(text, "utf-8")
