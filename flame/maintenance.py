"""Work on the state while no server does: it is moved from one database to another.

Whoever works on it holds the same locks as a server does, so that none can run meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from flame.controller.identity import kept
from flame.process import locked
from flame.spec.records import Record
from flame.store import DEFAULT_URL, Store, open_store, take_lock
from flame.store.base import Kept, KeptDocument, KeptEvents, KeptRecords
from flame.store.transfer import export_to, import_from

#: Seconds after which a silent server counts as gone; the default of ``flame serve``.
_TAKEOVER = 20.0


class Moved(Record, kw_only=True):
    """What has been moved, and the file."""

    file: str
    documents: int
    events: int
    records: int
    bundles: int


#: Told now and then how many pieces have been moved.
Progress = Callable[[int], None]


async def export_state(data_dir: Path, db: str | None, path: Path, progress: Progress) -> Moved:
    """Write the state to a file.

    :raises flame.errors.Conflict: a server works on it.
    :raises flame.errors.StoreError: the database or the file fails.
    """
    tally = _Tally(progress)
    async with _alone(data_dir, db) as store:
        await export_to(store, path, tally.add)
    return tally.moved(path)


async def import_state(data_dir: Path, db: str | None, path: Path, progress: Progress) -> Moved:
    """Read the state from a file into a database that is empty.

    :raises flame.errors.Conflict: a server works on it, or it is not empty.
    :raises flame.errors.SpecError: the file is no export.
    :raises flame.errors.StoreError: the database fails.
    """
    tally = _Tally(progress)
    async with _alone(data_dir, db) as store:
        await import_from(store, path, tally.add)
    return tally.moved(path)


@contextlib.asynccontextmanager
async def _alone(data_dir: Path, db: str | None) -> AsyncIterator[Store]:
    """The state, with nobody else at work on it."""
    with locked(data_dir):
        database = db or DEFAULT_URL
        async with contextlib.AsyncExitStack() as stack:
            store = open_store(database, data_dir)
            stack.push_async_callback(store.close)
            lock = await take_lock(database, store, place=kept(data_dir, "place"), takeover=_TAKEOVER, wait=False)
            if lock is not None:
                stack.push_async_callback(lock.close)
            yield store


class _Tally:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._count: Counter[str] = Counter()

    def add(self, kept: Kept) -> None:
        if isinstance(kept, KeptDocument):
            self._count["documents"] += 1
        elif isinstance(kept, KeptEvents):
            self._count["events"] += len(kept.events)
        elif isinstance(kept, KeptRecords):
            self._count["records"] += len(kept.records)
        else:
            self._count["bundles"] += 1
        self._progress(self._count.total())

    def moved(self, path: Path) -> Moved:
        count = self._count
        return Moved(
            file=str(path),
            documents=count["documents"],
            events=count["events"],
            records=count["records"],
            bundles=count["bundles"],
        )
