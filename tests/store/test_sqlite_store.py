"""What is particular to SQLite: its file, its versions, its failures, and the group commit."""

import asyncio
import ctypes
import fcntl
import os
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flame.errors import Conflict, StoreError, UsageError
from flame.store import open_store
from flame.store.migrations import MIGRATIONS, migrate
from flame.store.sqlite import SqliteStore

URL = "sqlite:///flame.db"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = open_store(URL, tmp_path)
    assert isinstance(store, SqliteStore)
    yield store
    await store.close()


@pytest.fixture
def raw(tmp_path: Path, store: SqliteStore) -> sqlite3.Connection:
    """Another process's connection, so to speak, to the database of ``store``."""
    return sqlite3.connect(tmp_path / "flame.db", isolation_level=None)


async def test_a_relative_path_lies_in_the_data_directory_and_an_absolute_one_does_not(tmp_path: Path) -> None:
    for url, path in ((URL, "data/flame.db"), (f"sqlite:///{tmp_path}/other/x.db", "other/x.db")):
        await open_store(url, tmp_path / "data").close()
        assert (tmp_path / path).exists()


@pytest.mark.parametrize("url", ["flame.db", "sqlite://", "sqlite:///", "sqlite://flame.db", "oracle://x/y"])
def test_what_is_no_url_of_a_store_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="sqlite:///"):
        open_store(url, tmp_path)


async def test_nobody_else_may_read_the_database(tmp_path: Path, store: SqliteStore) -> None:
    await store.insert("jobs", "1", {})
    files = list(tmp_path.glob("flame.db*"))
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


async def test_a_refused_operation_leaves_its_batch_mates_alone(store: SqliteStore) -> None:
    await store.insert("jobs", "taken", {})
    results = await asyncio.gather(
        store.insert("jobs", "a", {}),
        store.insert("jobs", "taken", {}),
        store.insert("jobs", "b", {}, keys=["k"]),
        store.insert("jobs", "c", {}, keys=["other", "k"]),
        store.append("s", [("x", {})]),
        return_exceptions=True,
    )
    assert [isinstance(result, Conflict) for result in results] == [False, True, False, True, False]
    assert [document.id for document in await store.find("jobs")] == ["a", "b", "taken"]


async def test_an_operation_that_the_database_cannot_take_fails_alone(store: SqliteStore) -> None:
    results = await asyncio.gather(
        store.append("s", [("x", {"n": 1})]),
        store.replace("jobs", "a", {}, version=2**70),  # no integer of SQLite's
        store.append("s", [("x", {"n": 2})]),
        return_exceptions=True,
    )
    assert [isinstance(result, StoreError) for result in results] == [False, True, False]
    assert [(event.seq, event.data["n"]) for event in await store.read("s")] == [(1, 1), (2, 2)]


async def test_what_queues_up_is_written_in_one_transaction(store: SqliteStore) -> None:
    statements: list[str] = []
    queued = threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        db.set_trace_callback(statements.append)
        queued.wait()

    holding = asyncio.ensure_future(store._write(hold))
    writes = [asyncio.ensure_future(store.append("s", [("x", {})])) for _ in range(900)]
    await asyncio.sleep(0)
    queued.set()
    await asyncio.gather(holding, *writes)
    await store._write(lambda db: db.set_trace_callback(None))
    assert statements.count("COMMIT") <= 2  # of the one that held the writer up, and of all that queued up meanwhile


async def test_a_new_database_is_at_the_newest_version_and_opening_it_again_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        store = open_store(URL, tmp_path)
        await store.append("s", [("x", {})])
        await store.close()
    with sqlite3.connect(tmp_path / "flame.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert db.execute("SELECT count(*) FROM events").fetchone() == (2,)
    db.close()


def test_migrations_are_taken_once_each_and_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    steps = [["CREATE TABLE a (x)"], ["INSERT INTO a VALUES (1)"], ["INSERT INTO a VALUES (2)", "no SQL"]]
    db = sqlite3.connect(path, isolation_level=None)
    migrate(db, steps[:1], path)
    migrate(db, steps[:2], path)
    migrate(db, steps[:2], path)
    with pytest.raises(sqlite3.OperationalError):
        migrate(db, steps, path)
    assert db.execute("SELECT x FROM a").fetchall() == [(1,)]
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    migrate(db, [*steps[:2], ["INSERT INTO a VALUES (3)"]], path)
    assert db.execute("SELECT x FROM a").fetchall() == [(1,), (3,)]
    db.close()


async def test_servers_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    stores = await asyncio.gather(*(asyncio.to_thread(open_store, URL, tmp_path) for _ in range(8)))
    await asyncio.gather(*(store.append("s", [("x", {})]) for store in stores for _ in range(20)))
    assert [event.seq for event in await stores[0].read("s")] == list(range(1, 161))
    for store in stores:
        await store.close()


async def test_a_newer_database_is_refused_with_a_sentence(tmp_path: Path) -> None:
    await open_store(URL, tmp_path).close()
    with sqlite3.connect(tmp_path / "flame.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match=r"flame\.db was written by a newer Flame \(version 99"):
        open_store(URL, tmp_path)


def test_a_database_of_another_program_is_not_touched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "flame.db") as db:
        db.execute("CREATE TABLE recipes (x)")
    with pytest.raises(StoreError, match="belongs to another program"):
        open_store(URL, tmp_path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]
    db.close()


def test_a_file_that_is_no_database_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "flame.db").write_bytes(b"to whom it may concern: " * 100)
    with pytest.raises(StoreError, match=r"flame\.db failed: it is no SQLite database"):
        open_store(URL, tmp_path)


def test_a_place_that_cannot_be_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/flame\.db"):
        open_store("sqlite:///file/flame.db", tmp_path)
    (tmp_path / "flame.db").mkdir()
    with pytest.raises(StoreError, match=r"flame\.db"):
        open_store(URL, tmp_path)


async def test_a_damaged_database_says_so(tmp_path: Path) -> None:
    store = open_store(URL, tmp_path)
    await store.append("s", [("x", {"long": "x" * 100})] * 1000)
    await store.close()
    content = bytearray((tmp_path / "flame.db").read_bytes())
    content[8192:] = os.urandom(len(content) - 8192)
    (tmp_path / "flame.db").write_bytes(content)
    store = open_store(URL, tmp_path)
    with pytest.raises(StoreError, match="it is damaged"):
        await store.read("s")
    await store.close()


async def test_a_database_held_by_another_process_says_so_and_is_used_again_after(
    store: SqliteStore, raw: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flame.store.connection._BUSY_SECONDS", 0.05)
    second = open_store(URL, tmp_path)
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another process is using it"):
        await second.append("s", [("x", {})])
    assert await second.read("s") == []  # readers do not wait
    raw.execute("ROLLBACK")
    assert (await second.append("s", [("x", {})]))[0].seq == 1
    await second.close()


async def test_a_full_disk_says_so_and_work_goes_on_after(store: SqliteStore) -> None:
    def limit(pages: int) -> object:
        return store._write(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())

    await limit(1)  # SQLite raises it to the pages that there are
    with pytest.raises(StoreError, match="the disk is full"):
        await store.append("s", [("x", {"long": "x" * 100_000})])
    results = await asyncio.gather(
        *(store.append("s", [("x", {"long": "x" * 100_000})]) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, StoreError) for result in results)
    await limit(2**30)
    assert (await store.append("s", [("x", {})]))[0].seq == 1


async def test_a_read_only_database_says_so(tmp_path: Path, store: SqliteStore) -> None:
    await store._write(lambda db: db.execute("PRAGMA query_only = 1"))
    with pytest.raises(StoreError, match="read-only"):
        await store.append("s", [("x", {})])


async def test_memory_does_not_grow_with_what_was_written_and_read(store: SqliteStore) -> None:
    library = getattr(sys.modules["_sqlite3"], "__file__", None)
    if library is None:
        pytest.skip("this Python has SQLite built in, and its count of bytes cannot be asked")
    used = ctypes.CDLL(library).sqlite3_memory_used
    used.restype = ctypes.c_int64
    before = used()
    for part in range(8):  # a megabyte each
        name = f"job/{part}"
        await store.append(name, [("metrics", {"text": "x" * 1000})] * 1000)
        both = await asyncio.gather(store.read(name), store.read(name))  # by each of the readers
        assert [len(events) for events in both] == [1000, 1000]
    assert used() - before < 2 << 20


async def test_lists_of_a_jobs_tasks_use_an_index(store: SqliteStore, raw: sqlite3.Connection) -> None:
    await store.insert("tasks", "1", {"jobId": "j", "state": "ready"})
    for column in ("job_id", "state"):
        sql = f"EXPLAIN QUERY PLAN SELECT * FROM documents WHERE collection = ? AND {column} = ? AND id > ? ORDER BY id"
        plan = " ".join(row[3] for row in raw.execute(sql, ("tasks", "j", "")))
        assert f"INDEX documents_by_{column.removesuffix('_id')}" in plan
        assert "TEMP B-TREE" not in plan


async def test_half_written_bundles_of_a_killed_process_are_removed_and_those_in_work_are_not(tmp_path: Path) -> None:
    partial = tmp_path / "bundles" / "partial"
    partial.mkdir(parents=True)
    (partial / "abandoned").write_bytes(b"half")
    with (partial / "in-work").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        await open_store(URL, tmp_path).close()
        assert [path.name for path in partial.iterdir()] == ["in-work"]


async def test_a_bundle_that_cannot_be_written_says_so(tmp_path: Path, store: SqliteStore) -> None:
    (tmp_path / "bundles").write_text("in the way")
    with pytest.raises(StoreError, match="bundle"):
        await store.put_bundle(b"x")


async def test_closing_writes_what_is_queued(tmp_path: Path) -> None:
    store = open_store(URL, tmp_path)
    writes = [asyncio.ensure_future(store.append("s", [("x", {})])) for _ in range(100)]
    await asyncio.sleep(0)
    await store.close()
    assert sorted(events[0].seq for events in await asyncio.gather(*writes)) == list(range(1, 101))
    assert not (tmp_path / "flame.db-wal").exists()
    await store.close()


def test_a_store_serves_more_than_one_event_loop(tmp_path: Path) -> None:
    store = open_store(URL, tmp_path)
    asyncio.run(_append(store))
    asyncio.run(_append(store))
    assert [event.seq for event in asyncio.run(_append(store))] == [3]
    asyncio.run(store.close())


async def _append(store: SqliteStore) -> list:
    return await store.append("s", [("x", {})])
