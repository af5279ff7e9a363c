"""Move the state from one database to another, directly or through a file.

The file is a zip archive that other programs can read: ``flame.json`` says the format's version, ``documents.ndjson``,
``events.ndjson`` and ``journals.ndjson`` hold a document, an event or a record (its bytes in Base64) a line, ``bundles/``
the bundles by their digest. Nothing of it
belongs to one kind of database. The server must not run meanwhile: the state is read piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from flame.errors import Conflict, SpecError, StoreError
from flame.spec.records import Event, Record
from flame.store.base import Document, Kept, KeptBundle, KeptDocument, KeptEvents, KeptRecords, Store

_FORMAT = 1
_TOGETHER = 500
_FILES: dict[type, str] = {
    KeptDocument: "documents.ndjson",
    KeptEvents: "events.ndjson",
    KeptRecords: "journals.ndjson",
}


class _Header(Record, kw_only=True):
    format: int


class _DocumentLine(Record, kw_only=True):
    collection: str
    id: str
    version: int
    body: dict[str, Any]
    keys: list[str]


class _EventLine(Record, kw_only=True):
    stream: str
    seq: int
    time: float
    type: str
    data: dict[str, Any]


class _RecordLine(Record, kw_only=True):
    journal: str
    number: int
    data: bytes


#: Told of each piece once it has been moved: for who shows how far it is.
Told = Callable[[Kept], None]


def _nobody(kept: Kept) -> None:
    pass


async def copy(source: Store, target: Store, told: Told = _nobody) -> int:
    """Copy everything of one store into another, which must be empty.

    :param told: told of each piece.
    :returns: how many documents, pieces of streams and bundles that were.
    :raises flame.errors.Conflict: the target holds something already.
    """
    return await _fill(target, source.dump(), told)


async def export_to(store: Store, path: Path, told: Told = _nobody) -> int:
    """Write everything of a store to a file. The file is complete or absent: it appears under its name at the end.

    It is readable by its owner alone, because the state holds hashes of tokens and what workers' keys are made of.

    :param told: told of each piece.
    :returns: how many documents, pieces of streams and bundles that were.
    :raises flame.errors.StoreError: the store cannot be read, or the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        count = await _write(store, part, told)
        await asyncio.to_thread(_put_in_place, part, path)
    except OSError as error:
        raise StoreError(f"The export {path} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
    return count


async def import_from(store: Store, path: Path, told: Told = _nobody) -> int:
    """Read a file that :func:`export_to` wrote into a store, which must be empty.

    :param told: told of each piece.
    :returns: how many documents, pieces of streams and bundles that were.
    :raises flame.errors.Conflict: the store holds something already.
    :raises flame.errors.SpecError: the file is no export, or is damaged.
    """
    return await _fill(store, _read(path), told)


async def _fill(target: Store, everything: AsyncIterator[Kept], told: Told) -> int:
    async for _ in target.dump():
        raise Conflict("The database to fill is not empty. Choose a new one, also after an import that broke off.")
    count = 0
    async for kept in everything:
        await target.load(kept)
        told(kept)
        count += 1
    return count


async def _write(store: Store, part: Path, told: Told) -> int:
    count = 0
    encode = msgspec.json.encode
    section: IO[bytes] | None = None
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as archive, contextlib.ExitStack() as stack:
        archive.writestr("flame.json", encode(_Header(format=_FORMAT)))
        opened = ""
        async for kept in store.dump():
            count += 1
            told(kept)
            if isinstance(kept, KeptBundle):
                stack.close()
                digest = hashlib.sha256(kept.data).hexdigest()
                await asyncio.to_thread(archive.writestr, f"bundles/{digest}", kept.data)
                continue
            name = _FILES[type(kept)]
            if section is None or name != opened:  # a dump gives one kind after the other
                stack.close()
                section, opened = stack.enter_context(archive.open(name, "w", force_zip64=True)), name
            lines = b"".join(encode(line) + b"\n" for line in _lines(kept))
            await asyncio.to_thread(section.write, lines)
    return count


def _lines(kept: KeptDocument | KeptEvents | KeptRecords) -> Iterator[_DocumentLine | _EventLine | _RecordLine]:
    if isinstance(kept, KeptDocument):
        name, version, body = kept.document
        yield _DocumentLine(collection=kept.collection, id=name, version=version, body=body, keys=list(kept.keys))
    elif isinstance(kept, KeptRecords):
        for number, data in kept.records:
            yield _RecordLine(journal=kept.journal, number=number, data=data)
    else:
        for event in kept.events:
            yield _EventLine(stream=kept.stream, seq=event.seq, time=event.time, type=event.type, data=event.data)


def _put_in_place(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


async def _read(path: Path) -> AsyncIterator[Kept]:
    try:
        with zipfile.ZipFile(path) as archive:
            header = msgspec.json.decode(archive.read("flame.json"), type=_Header)
            if header.format != _FORMAT:
                raise SpecError(f"This is an export of format {header.format}; this Flame reads {_FORMAT}.", str(path))
            for kept in _sections(archive):
                yield kept
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, msgspec.MsgspecError) as error:
        raise SpecError(f"This is no export of Flame's, or it is damaged: {error}.", str(path)) from error


def _sections(archive: zipfile.ZipFile) -> Iterator[Kept]:
    names = archive.namelist()
    if "documents.ndjson" in names:
        with archive.open("documents.ndjson") as lines:
            for text in lines:
                line = msgspec.json.decode(text, type=_DocumentLine)
                yield KeptDocument(line.collection, Document(line.id, line.version, line.body), line.keys)
    if "events.ndjson" in names:
        with archive.open("events.ndjson") as lines:
            yield from _event_pieces(lines)
    if "journals.ndjson" in names:
        with archive.open("journals.ndjson") as lines:
            for text in lines:
                record = msgspec.json.decode(text, type=_RecordLine)
                yield KeptRecords(record.journal, [(record.number, record.data)])
    for name in names:
        if name.startswith("bundles/"):
            data = archive.read(name)
            if hashlib.sha256(data).hexdigest() != name.removeprefix("bundles/"):
                raise ValueError(f"{name} has other bytes than its name says")
            yield KeptBundle(data)


def _event_pieces(lines: IO[bytes]) -> Iterator[KeptEvents]:
    stream, events = "", list[Event]()
    for text in lines:
        line = msgspec.json.decode(text, type=_EventLine)
        if events and (line.stream != stream or len(events) == _TOGETHER):
            yield KeptEvents(stream, events)
            events = []
        stream = line.stream
        events.append(Event(seq=line.seq, time=line.time, type=line.type, data=line.data))
    if events:
        yield KeptEvents(stream, events)
