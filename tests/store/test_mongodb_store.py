"""What is particular to MongoDB: its server that comes and goes, blocks of events, keys without owners."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flame.errors import Conflict, MissingExtra, StoreError, UsageError
from flame.store import open_store
from flame.store.mongodb import MongoStore

pytestmark = pytest.mark.usefixtures("sockets_may_stay")


@pytest.fixture
async def store(mongo_url: str) -> AsyncIterator[MongoStore]:
    store = MongoStore(mongo_url)
    yield store
    await store.close()


async def raw(store: MongoStore, collection: str) -> Any:
    """A collection as the driver gives it, behind the store's back."""
    return await store._server.collection(collection)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 1000])
async def test_a_stream_of_any_length_is_read_from_any_number(store: MongoStore, size: int) -> None:
    await store.append("s", [("x", {"n": n}) for n in range(1, size + 1)])
    for after in {0, 1, 62, 63, 64, 65, 127, 128, size - 1, size, size + 70}:
        for limit in (1, 64, 2000):
            events = await store.read("s", after=after, limit=limit)
            expected = list(range(after + 1, min(size, after + limit) + 1))
            assert [event.seq for event in events] == expected
            assert [event.data["n"] for event in events] == expected


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 400, 705])
async def test_a_restarted_server_goes_on_numbering_where_the_stream_ends(
    store: MongoStore, mongo_url: str, size: int
) -> None:
    if size:
        await store.append("s", [("x", {})] * size)
    again = MongoStore(mongo_url)
    assert (await again.append("s", [("x", {})]))[0].seq == size + 1
    assert (await store.append("s", [("x", {})]))[0].seq == size + 2  # the first one had not heard of that
    assert [event.seq for event in await store.read("s", limit=5000)] == list(range(1, size + 3))
    await again.close()


async def test_what_a_real_mongodb_is_asked_for_means_the_same(
    store: MongoStore, mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FerretDB understands these commands too; only it is slow with them, and not atomic, so nothing is concurrent here.
    monkeypatch.setattr("flame.store.mongo_server._by_id_alone", lambda info: False)
    await store.insert("jobs", "1", {"n": 0, "state": "ready"}, keys=["name:x"])
    assert await store.replace("jobs", "1", {"n": 1}, version=1) == ("1", 2, {"n": 1})
    assert await store.replace("jobs", "1", {"n": 9}, version=1) is None
    assert await store.get("jobs", "1") == ("1", 2, {"n": 1})
    other = MongoStore(mongo_url)
    for count in range(1, 140):
        (event,) = await (store if count % 3 else other).append("s", [("x", {"n": count})])
        assert event.seq == count
    assert [event.data["n"] for event in await store.read("s")] == list(range(1, 140))
    assert await store.delete("jobs", "1")
    await other.insert("jobs", "2", {}, keys=["name:x"])
    names = [index["name"] async for index in await (await raw(store, "docs.jobs")).list_indexes()]
    assert names == ["_id_", "is.jobId_1__id_1", "is.state_1__id_1"]
    await other.close()


async def test_a_large_event_lies_outside_its_block_and_goes_with_its_stream(store: MongoStore) -> None:
    data = {"text": "x" * 1_000_000}
    await store.append("s", [("small", {}), ("large", data), ("small", {})])
    assert [len(event.data) for event in await store.read("s")] == [0, 1, 0]
    assert (await store.read("s", after=1, limit=1))[0].data == data
    parts, blocks = await raw(store, "parts"), await raw(store, "events")
    assert await parts.count_documents({}) == 1
    await store.drop("s")
    assert await parts.count_documents({}) == await blocks.count_documents({}) == 0


async def test_what_is_too_large_for_the_server_is_refused_with_its_size(store: MongoStore) -> None:
    with pytest.raises(StoreError, match=r"1 of jobs cannot be stored: it has 16,000,011 bytes"):
        await store.insert("jobs", "1", {"text": "x" * 16_000_000})
    await store.insert("jobs", "1", {"text": "x" * 14_000_000})
    with pytest.raises(StoreError, match="more than 1000 characters"):
        await store.find("jobs", where={"text": "x" * 14_000_000})


async def test_a_key_whose_owner_was_never_written_can_be_taken_over_later(
    store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = await raw(store, "keys")
    await keys.insert_one({"_id": "designs/name:x", "owner": "killed", "op": "1", "at": time.time()})
    with pytest.raises(Conflict):  # its owner may be about to be written
        await store.insert("designs", "1", {}, keys=["name:x"])
    monkeypatch.setattr("flame.store.mongodb._ABANDONED", 0.0)
    await store.insert("designs", "1", {}, keys=["name:x"])
    with pytest.raises(Conflict, match="by 1"):  # this owner is there
        await store.insert("designs", "2", {}, keys=["name:x"])


async def test_a_key_that_a_killed_delete_left_behind_can_be_taken_over(
    store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.insert("designs", "1", {}, keys=["name:x"])
    await (await raw(store, "docs.designs")).delete_one({"_id": "1"})
    await store.insert("designs", "1", {}, keys=["name:y"])  # the same id, but not the owner of that key
    monkeypatch.setattr("flame.store.mongodb._ABANDONED", 0.0)
    await store.insert("designs", "2", {}, keys=["name:x"])


async def test_a_refused_insert_gives_back_the_keys_it_had_taken(store: MongoStore) -> None:
    await store.insert("designs", "1", {}, keys=["b"])
    for identity, keys in (("2", ["a", "b"]), ("1", ["a"])):
        with pytest.raises(Conflict):
            await store.insert("designs", identity, {}, keys=keys)
    assert [key["_id"] async for key in (await raw(store, "keys")).find()] == ["designs/b"]


async def test_a_database_of_a_newer_flame_is_refused(store: MongoStore, mongo_url: str) -> None:
    await store.insert("jobs", "1", {})
    await (await raw(store, "meta")).update_one({"_id": "schema"}, {"$set": {"version": 99}})
    newer = MongoStore(mongo_url)
    with pytest.raises(StoreError, match=r"written by a newer Flame \(version 99"):
        await newer.get("jobs", "1")
    await newer.close()


async def test_migrations_are_taken_in_order_and_once_though_servers_start_at_once(
    store: MongoStore, mongo_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.insert("jobs", "1", {"n": 1})  # written by the version before
    taken: list[str] = []

    async def first(database: Any) -> None:
        taken.append("first")
        await database["docs.jobs"].update_one({"_id": "1"}, {"$set": {"body": '{"n": 2}'}})

    async def second(database: Any) -> None:
        assert (await database["meta"].find_one({"_id": "schema"}))["version"] >= 2, "each step is written down"
        taken.append("second")
        await database["docs.jobs"].update_one({"_id": "1"}, {"$set": {"body": '{"n": 3}'}})

    monkeypatch.setattr("flame.store.mongo_migrations.STEPS", (first, second))
    servers = [MongoStore(mongo_url) for _ in range(3)]
    found = await asyncio.gather(*(server.get("jobs", "1") for server in servers))
    assert {document.body["n"] for document in found if document} == {3}
    assert sorted(set(taken)) == ["first", "second"]
    before = list(taken)
    again = MongoStore(mongo_url)
    await again.get("jobs", "1")
    assert taken == before
    for server in (*servers, again):
        await server.close()


async def test_a_server_that_is_not_there_is_an_error_without_the_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flame.store.mongo_server._FIRST_PATIENCE", 0.1)
    store = open_store("mongodb://flame:geheim@127.0.0.1:9/state", tmp_path)
    with pytest.raises(StoreError, match=r"MongoDB at 127\.0\.0\.1:9 cannot be reached") as caught:
        await store.get("jobs", "1")
    assert "geheim" not in str(caught.value)
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get("jobs", "1")


@pytest.mark.parametrize("url", ["mongodb://", "mongodb://h:port/x", "mongodb://h/?w", "mongodb://u:p%zz@h/"])
def test_a_malformed_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError):
        open_store(url, tmp_path)


async def test_writes_wait_for_a_server_that_was_killed_and_none_is_lost_or_doubled(private_mongo: Any) -> None:
    url = urlsplit(private_mongo.url)._replace(path=f"/flame-test-restart-{time.time_ns()}").geturl()
    store = MongoStore(url)
    await store.insert("jobs", "1", {"n": 0})
    stop = asyncio.Event()

    async def append() -> int:
        count = 0
        while not stop.is_set():
            count += 1
            (event,) = await store.append("s", [("x", {"n": count})])
            assert event.seq == count
        return count

    async def replace() -> int:
        version = 1
        while not stop.is_set():
            assert await store.replace("jobs", "1", {"n": version}, version=version)
            version += 1
        return version

    async def insert() -> int:
        count = 0
        while not stop.is_set():
            await store.insert("many", f"{count:06}", {}, keys=[f"name:{count}"])
            count += 1
        return count

    writers = [asyncio.create_task(writer()) for writer in (append, replace, insert)]
    for _ in range(3):
        before = len(await store.read("s", limit=100_000))
        while len(await store.read("s", limit=100_000)) < before + 20:  # noqa: ASYNC110 - the writers set no event
            await asyncio.sleep(0.01)
        await private_mongo.kill()
        await private_mongo.start()
    stop.set()
    appended, version, inserted = await asyncio.gather(*writers)
    assert [event.data["n"] for event in await store.read("s", limit=100_000)] == list(range(1, appended + 1))
    assert (await store.get("jobs", "1")) == ("1", version, {"n": version - 1})
    assert len(await store.find("many", limit=100_000)) == inserted
    client = (await raw(store, "meta")).database.client
    await client.drop_database((await raw(store, "meta")).database.name)
    await store.close()


def test_without_the_driver_the_extra_that_brings_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("flame.store.mongo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymongo", None)
    with pytest.raises(MissingExtra, match=r"pip install 'flame\[mongodb\]'"):
        open_store("mongodb://localhost/flame", tmp_path)


async def test_a_claim_of_which_the_answer_was_lost_stops_nobody_but_others(store: MongoStore, mongo_url: str) -> None:
    document = await store.insert("jobs", "j", {"n": 1})
    if not store._server.by_id_alone:
        pytest.skip("a real MongoDB needs no claims")
    name = (await store._documents("jobs")).name
    left = {"_id": f"{name}/j@[('v', 1)]", "op": store._server._self, "at": time.time()}
    await (await raw(store, "claims")).insert_one(left)
    other = MongoStore(mongo_url)
    assert await other.replace("jobs", "j", {"n": 2}, version=document.version) is None
    assert await store.replace("jobs", "j", {"n": 3}, version=document.version) is not None
    assert await (await raw(store, "claims")).find_one({"_id": left["_id"]}) is None
    await other.close()
