"""What every store promises, whichever database is behind it."""

import asyncio
import os
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flame.errors import Conflict, StoreError
from flame.store import Store, open_store


@pytest.fixture(params=["sqlite", "mongodb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mongodb":
        return str(request.getfixturevalue("mongo_url"))
    return f"sqlite:///{tmp_path}/state/flame.db"


@pytest.fixture
async def store(url: str, tmp_path: Path) -> AsyncIterator[Store]:
    store = open_store(url, tmp_path)
    yield store
    await store.close()


async def test_a_document_is_read_back_as_it_was_written(store: Store) -> None:
    body = {"name": "ü ☃", "$odd.key": {"": [1, 2.5, None, True, 2**80]}, "nul": "a\0b"}
    assert await store.insert("jobs", "1", body) == ("1", 1, body)
    assert await store.get("jobs", "1") == ("1", 1, body)
    assert await store.get("jobs", "2") is None
    assert await store.get("tasks", "1") is None


async def test_an_id_is_taken_once_in_a_collection(store: Store) -> None:
    await store.insert("jobs", "1", {"a": 1})
    with pytest.raises(Conflict, match="1 is there already in jobs"):
        await store.insert("jobs", "1", {"a": 2})
    await store.insert("tasks", "1", {})
    assert (await store.get("jobs", "1")) == ("1", 1, {"a": 1})


async def test_a_key_is_taken_once_until_its_document_is_deleted(store: Store) -> None:
    await store.insert("datasets", "1", {}, keys=["name:mnist", "url:a"])
    with pytest.raises(Conflict, match="name mnist is taken in datasets"):
        await store.insert("datasets", "2", {}, keys=["url:b", "name:mnist"])
    assert await store.get("datasets", "2") is None
    await store.insert("designs", "2", {}, keys=["name:mnist"])  # another collection
    await store.insert("datasets", "2", {}, keys=["url:b"])  # the refused insert took no key
    assert await store.delete("datasets", "1")
    await store.insert("datasets", "3", {}, keys=["name:mnist", "name:mnist"])


async def test_of_a_hundred_who_want_a_name_one_gets_it(store: Store) -> None:
    results = await asyncio.gather(
        *(store.insert("designs", str(n), {}, keys=["name:x"]) for n in range(100)), return_exceptions=True
    )
    assert sum(isinstance(result, Conflict) for result in results) == 99
    assert len(await store.find("designs")) == 1


async def test_a_replace_needs_the_version_it_saw(store: Store) -> None:
    await store.insert("jobs", "1", {"state": "ready"})
    assert await store.replace("jobs", "1", {"state": "starting"}, version=1) == ("1", 2, {"state": "starting"})
    assert await store.replace("jobs", "1", {"state": "failed"}, version=1) is None
    assert await store.replace("jobs", "none", {}, version=1) is None
    assert await store.get("jobs", "1") == ("1", 2, {"state": "starting"})


async def test_concurrent_increments_by_compare_and_set_lose_none(store: Store) -> None:
    await store.insert("jobs", "1", {"count": 0})

    async def increment() -> None:
        while True:
            document = await store.get("jobs", "1")
            assert document
            if await store.replace("jobs", "1", {"count": document.body["count"] + 1}, version=document.version):
                return

    await asyncio.gather(*(increment() for _ in range(20)))
    assert await store.get("jobs", "1") == ("1", 21, {"count": 20})


async def test_of_two_servers_that_change_a_document_at_once_one_does(store: Store, url: str, tmp_path: Path) -> None:
    others = [open_store(url, tmp_path) for _ in range(3)]
    await store.insert("jobs", "1", {"n": 0})
    for version in range(1, 30):
        results = await asyncio.gather(
            *(one.replace("jobs", "1", {"n": version}, version=version) for one in (store, *others))
        )
        assert len([result for result in results if result is not None]) == 1
    assert (await store.get("jobs", "1")) == ("1", 30, {"n": 29})
    for other in others:
        await other.close()


async def test_events_that_two_servers_append_at_once_are_numbered_without_gaps(
    store: Store, url: str, tmp_path: Path
) -> None:
    other = open_store(url, tmp_path)
    both = [one.append("s", [("x", {"n": n})]) for n in range(50) for one in (store, other)]
    await asyncio.gather(*both)
    events = await store.read("s")
    assert [event.seq for event in events] == list(range(1, 101))
    assert sorted(event.data["n"] for event in events) == sorted([*range(50), *range(50)])
    await other.close()


async def test_a_deleted_document_is_gone_and_its_id_free(store: Store) -> None:
    await store.insert("jobs", "1", {})
    assert await store.delete("jobs", "1")
    assert not await store.delete("jobs", "1")
    assert await store.replace("jobs", "1", {}, version=1) is None
    assert (await store.insert("jobs", "1", {})).version == 1


async def test_a_collection_is_paged_both_ways_in_the_order_of_ids(store: Store) -> None:
    ids = [f"{n:04x}" for n in range(25)]
    await asyncio.gather(*(store.insert("jobs", name, {"n": name}) for name in reversed(ids)))
    await store.insert("jobs2", "0001", {})
    for descending, order in ((False, ids), (True, ids[::-1])):
        seen: list[str] = []
        while page := await store.find("jobs", after=seen[-1] if seen else None, limit=10, descending=descending):
            assert len(page) <= 10
            seen += [document.id for document in page]
        assert seen == order


async def test_lists_are_filtered_by_fields_of_the_body(store: Store) -> None:
    for n in range(12):
        body = {"jobId": f"j{n % 2}", "state": f"s{n % 3}", "role": f"r{n % 4}", "number": n, "nested": {"role": "r0"}}
        await store.insert("tasks", f"{n:02}", body)
    await store.insert("tasks", "99", {"state": 1})

    async def ids(**arguments: object) -> list[str]:
        return [document.id for document in await store.find("tasks", **arguments)]  # type: ignore[arg-type]

    assert await ids(where={"jobId": "j1"}) == ["01", "03", "05", "07", "09", "11"]
    assert await ids(where={"jobId": "j1", "state": "s0"}) == ["03", "09"]
    assert await ids(where={"role": "r3", "jobId": "j1"}, descending=True, limit=2) == ["11", "07"]
    assert await ids(where={"role": "r3"}, after="03") == ["07", "11"]
    assert await ids(where={"number": "3"}) == []  # fields are compared as strings are
    assert await ids(where={"state": "1"}) == []
    assert await ids(where={"missing": ""}) == []
    with pytest.raises(StoreError):
        await ids(where={"a') OR 1 --": "x"})


async def test_filters_follow_a_replace(store: Store) -> None:
    await store.insert("jobs", "1", {"state": "ready"})
    await store.replace("jobs", "1", {"state": "failed"}, version=1)
    assert await store.find("jobs", where={"state": "ready"}) == []
    assert len(await store.find("jobs", where={"state": "failed"})) == 1


async def test_a_thousand_concurrent_writers_make_a_stream_without_gaps(store: Store) -> None:
    async def write(writer: int) -> list[int]:
        events = await store.append("job/1", [("a", {"writer": writer}), ("b", {"writer": writer})])
        return [event.seq for event in events]

    given = await asyncio.gather(*(write(writer) for writer in range(1000)))
    assert sorted(seq for pair in given for seq in pair) == list(range(1, 2001))
    assert all(second == first + 1 for first, second in given)
    stored = []
    while page := await store.read("job/1", after=len(stored), limit=700):
        stored += page
    assert [event.seq for event in stored] == list(range(1, 2001))
    for writer, (first, second) in enumerate(given):
        assert stored[first - 1].data == stored[second - 1].data == {"writer": writer}
        assert (stored[first - 1].type, stored[second - 1].type) == ("a", "b")


async def test_streams_are_apart_and_resume_from_a_number(store: Store) -> None:
    await store.append("task/1", [("start", {"attempt": n}) for n in range(5)])
    (event,) = await store.append("task/12", [("stop", {})])
    assert event.seq == 1
    assert [event.data["attempt"] for event in await store.read("task/1", after=2)] == [2, 3, 4]
    assert [event.seq for event in await store.read("task/1", after=1, limit=2)] == [2, 3]
    assert await store.read("task/1", after=5) == []
    assert await store.read("none") == []


async def test_appended_events_are_given_as_they_will_be_read(store: Store) -> None:
    given = await store.append("job/1", [("metrics", {"pair": (1, 2), "loss": float("nan")}), ("x", {})])
    assert given == await store.read("job/1")
    assert given[0].data == {"pair": [1, 2], "loss": None}


async def test_a_dropped_stream_is_empty_and_begins_anew(store: Store) -> None:
    await store.append("job/1", [("a", {})] * 3)
    await store.append("job/11", [("a", {})])
    await store.drop("job/1")
    assert await store.read("job/1") == []
    assert len(await store.read("job/11")) == 1
    assert (await store.append("job/1", [("a", {})]))[0].seq == 1


@pytest.mark.parametrize("size", [0, 1, 20_000_000])
async def test_a_bundle_of_any_size_is_kept_by_its_digest(store: Store, size: int) -> None:
    data = os.urandom(size)
    digest = await store.put_bundle(data)
    assert await store.put_bundle(data) == digest
    assert await store.get_bundle(digest) == data
    assert await store.delete_bundle(digest)
    assert not await store.delete_bundle(digest)
    assert await store.get_bundle(digest) is None


async def test_what_is_no_digest_is_no_bundle(store: Store) -> None:
    for name in ("", "../../flame.db", "A" * 64, "0" * 63):
        assert await store.get_bundle(name) is None
        assert not await store.delete_bundle(name)


async def test_a_body_that_is_no_json_is_refused_with_its_place(store: Store) -> None:
    with pytest.raises(StoreError, match="1 of jobs cannot be stored"):
        await store.insert("jobs", "1", {"a": object()})
    with pytest.raises(StoreError, match="job/1"):
        await store.append("job/1", [("a", {"b": {1, object()}})])


async def test_state_is_there_after_closing_and_opening(url: str, tmp_path: Path) -> None:
    store = open_store(url, tmp_path)
    await store.insert("jobs", "1", {"a": 1}, keys=["name:a"])
    await store.append("job/1", [("a", {})])
    digest = await store.put_bundle(b"code")
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.get("jobs", "1")

    store = open_store(url, tmp_path)
    assert await store.get("jobs", "1") == ("1", 1, {"a": 1})
    assert (await store.append("job/1", [("b", {})]))[0].seq == 2
    assert await store.get_bundle(digest) == b"code"
    with pytest.raises(Conflict):
        await store.insert("jobs", "2", {}, keys=["name:a"])
    await store.close()


async def test_journals_keep_bytes_in_the_order_of_their_numbers(store: Store) -> None:
    await store.record([("session/a", 1, b"\0one"), ("session/b", 1, b"other"), ("session/a", 3, b"three")])
    await store.record([("session/a", 20, b"x" * 20_000_000), ("session/a", 21, b"")])
    assert await store.recall("session/b") == [(1, b"other")]
    assert await store.recall("session/a", limit=2) == [(1, b"\0one"), (3, b"three")]
    found = await store.recall("session/a", after=3)
    assert [(number, len(data)) for number, data in found] == [(20, 20_000_000), (21, 0)]
    await store.forget("session/a", [1, 20, 77])
    assert await store.recall("session/a") == [(3, b"three"), (21, b"")]
    await store.forget("session/a")
    assert await store.recall("session/a") == []
    assert await store.recall("session/b") == [(1, b"other")]


async def test_a_journal_is_read_piece_by_piece_without_losing_any(store: Store) -> None:
    await store.record([("j", number, bytes([number])) for number in range(1, 101)])
    read, after = [], 0
    while piece := await store.recall("j", after=after, limit=7):
        read += piece
        after = piece[-1][0]
    assert read == [(number, bytes([number])) for number in range(1, 101)]


async def test_a_cancelled_caller_harms_nobody(store: Store) -> None:
    tasks = [asyncio.ensure_future(store.append("job/1", [("a", {"n": n})])) for n in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks[1::2])
    events = await store.read("job/1")
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert {event.data["n"] for event in events} >= set(range(1, 50, 2))


WRITER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from flame.store import open_store

    async def write(store, writer):
        name = f"w{writer}"
        await store.insert("docs", name, {"n": 0})
        for n in range(1, 1_000_000):
            await store.append("all", [("x", {"writer": writer, "n": n})])
            await store.replace("docs", name, {"n": n}, version=n)
            print(writer, n, flush=True)

    async def main():
        store = open_store(sys.argv[1], Path(sys.argv[2]))
        await asyncio.gather(*(write(store, writer) for writer in range(8)))

    asyncio.run(main())
    """
)


async def test_every_acknowledged_write_survives_kill_9(url: str, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, url, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    acknowledged = dict.fromkeys(range(8), 0)
    lines = [await process.stdout.readline() for _ in range(300)]
    process.kill()
    lines += (await process.stdout.read()).splitlines()
    await process.wait()
    for line in lines:
        if len(words := line.split()) == 2:  # the last line may be cut
            acknowledged[int(words[0])] = max(acknowledged[int(words[0])], int(words[1]))

    store = open_store(url, tmp_path)
    events = await store.read("all", limit=1_000_000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    for writer, count in acknowledged.items():
        numbers = [event.data["n"] for event in events if event.data["writer"] == writer]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= count
        document = await store.get("docs", f"w{writer}")
        assert document is not None
        assert count <= document.body["n"] <= len(numbers)
    await store.append("all", [("after", {})])
    await store.close()
