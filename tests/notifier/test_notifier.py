"""Publishing and following, on a real store."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame.errors import StoreError
from flame.notifier import Notifier
from flame.spec.records import Event
from flame.store import Store, open_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = open_store("sqlite:///flame.db", tmp_path)
    yield store
    await store.close()


async def collect(notifier: Notifier, stream: str, count: int, after: int = 0) -> list[int]:
    if not count:
        return []
    last = after + count
    return [event.seq async for event in notifier.follow(stream, after, lambda event: event.seq == last)]


async def started(task: "asyncio.Task[Any]", notifier: Notifier, stream: str) -> None:
    """Wait until a follower has nothing more to read and sleeps."""
    while not any(follower.wake for follower in notifier._streams.get(stream, ())):
        await asyncio.sleep(0)
        assert not task.done()


async def test_a_published_event_is_stored_before_it_is_told(store: Store) -> None:
    notifier = Notifier(store)

    async def follow() -> bool:
        async for event in notifier.follow("job/1"):
            return await store.read("job/1") == [event]
        raise AssertionError

    follower = asyncio.create_task(follow())
    await started(follower, notifier, "job/1")
    event = await notifier.publish("job/1", "job", {"state": "running"})
    assert (event.seq, event.type, event.data) == (1, "job", {"state": "running"})
    assert await follower


async def test_a_follower_begins_with_what_is_stored_and_goes_on_with_what_comes(store: Store) -> None:
    notifier = Notifier(store)
    await notifier.publish_many("s", [("x", {"n": n}) for n in range(1200)])
    follower = asyncio.create_task(collect(notifier, "s", 1205, after=3))
    await started(follower, notifier, "s")
    for _ in range(4):
        await notifier.publish_many("s", [("x", {})] * 2)
    assert await follower == list(range(4, 1209))


async def test_nothing_to_publish_is_nothing(store: Store) -> None:
    assert await Notifier(store).publish_many("s", []) == []
    assert await store.read("s") == []


async def test_events_that_are_there_together_are_given_together(store: Store) -> None:
    notifier = Notifier(store)
    await notifier.publish_many("s", [("x", {})] * 5)
    async with aclosing(notifier.batches("s", after=1)) as batches:
        assert [event.seq for event in await anext(batches)] == [2, 3, 4, 5]
        following = asyncio.ensure_future(anext(batches))
        await started(following, notifier, "s")  # type: ignore[arg-type]
        await notifier.publish_many("s", [("x", {})] * 3)
        assert [event.seq for event in await following] == [6, 7, 8]


async def test_until_ends_a_follower_behind_the_event_it_names(store: Store) -> None:
    notifier = Notifier(store)
    await notifier.publish_many("s", [("x", {}), ("end", {}), ("x", {})])
    assert [event.type async for event in notifier.follow("s", until=lambda event: event.type == "end")] == ["x", "end"]


async def test_a_slow_follower_costs_little_memory_and_misses_nothing(store: Store) -> None:
    notifier = Notifier(store, backlog=10)
    async with aclosing(notifier.follow("s")) as events:
        await notifier.publish("s", "x", {})
        seen = [(await anext(events)).seq]
        for _ in range(30):
            await notifier.publish_many("s", [("x", {})] * 7)
            (follower,) = notifier._streams["s"]
            assert len(follower.handed) <= 10
        seen += [(await anext(events)).seq for _ in range(210)]
        assert seen == list(range(1, 212))


async def test_a_follower_that_leaves_is_forgotten(store: Store) -> None:
    notifier = Notifier(store)
    await notifier.publish("s", "x", {})
    async with aclosing(notifier.follow("s")) as events:
        await anext(events)
        assert notifier._streams
    assert not notifier._streams

    waiting = asyncio.create_task(collect(notifier, "s", 2))
    await started(waiting, notifier, "s")
    waiting.cancel()
    await asyncio.wait([waiting])
    assert not notifier._streams


async def test_closing_ends_all_followers_and_later_ones_at_once(store: Store) -> None:
    notifier = Notifier(store)
    tasks = [asyncio.create_task(collect(notifier, f"s{n}", 1)) for n in range(10)]
    for n, task in enumerate(tasks):
        await started(task, notifier, f"s{n}")
    notifier.close()
    assert await asyncio.gather(*tasks) == [[]] * 10
    assert await collect(notifier, "s1", 1) == []
    assert (await notifier.publish("s1", "x", {})).seq == 1


async def test_dropping_a_stream_ends_those_who_follow_it(store: Store) -> None:
    notifier = Notifier(store)
    await notifier.publish("s", "x", {})
    follower = asyncio.create_task(collect(notifier, "s", 2))
    await started(follower, notifier, "s")
    await notifier.drop("s")
    assert await follower == [1]
    assert await store.read("s") == []


async def test_a_publisher_that_is_cancelled_leaves_no_follower_asleep(store: Store) -> None:
    notifier = Notifier(store)
    follower = asyncio.create_task(collect(notifier, "s", 1))
    await started(follower, notifier, "s")
    publisher = asyncio.create_task(notifier.publish("s", "x", {}))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    publisher.cancel()
    assert await follower == [1]


async def test_an_event_that_was_not_stored_is_told_to_nobody(store: Store) -> None:
    notifier = Notifier(store)
    follower = asyncio.create_task(collect(notifier, "s", 1))
    await started(follower, notifier, "s")
    with pytest.raises(StoreError):
        await notifier.publish("s", "x", {"bad": object()})
    assert not follower.done()
    await notifier.publish("s", "x", {})
    assert await follower == [1]


async def test_ten_thousand_idle_followers_hear_of_their_event_alone(store: Store) -> None:
    notifier = Notifier(store)
    woken: list[int] = []

    async def follow(n: int) -> None:
        woken.extend([n async for _ in notifier.follow(f"task/{n}", until=lambda _: True)])

    tasks = [asyncio.create_task(follow(n)) for n in range(10_000)]
    for n, task in enumerate(tasks):
        await started(task, notifier, f"task/{n}")
    await notifier.publish("task/4321", "start", {})
    await tasks[4321]
    assert woken == [4321]
    notifier.close()
    await asyncio.gather(*tasks)
    assert woken == [4321]


class LateStore:
    """A store whose answers are held back until a test lets them go, in any order."""

    def __init__(self, store: Store, delays: Sequence[int]) -> None:
        self._store = store
        self._delays = list(delays)

    async def _late(self) -> None:
        for _ in range(self._delays.pop() if self._delays else 0):
            await asyncio.sleep(0)

    async def append(self, stream: str, entries: Sequence[tuple[str, dict[str, Any]]]) -> list[Event]:
        events = await self._store.append(stream, entries)
        await self._late()
        return events

    async def read(self, stream: str, *, after: int = 0, limit: int = 1000) -> list[Event]:
        await self._late()
        events = await self._store.read(stream, after=after, limit=limit)
        await self._late()
        return events


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    together=st.integers(1, 6),
    delays=st.lists(st.integers(0, 12), max_size=60),
    followers=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=5),
    backlog=st.integers(0, 8),
)
def test_in_whatever_order_things_happen_a_follower_sees_each_event_once_and_in_order(
    batches: list[int], together: int, delays: list[int], followers: list[tuple[int, int, int]], backlog: int
) -> None:
    async def publish(notifier: Notifier) -> None:
        for first in range(0, len(batches), together):
            await asyncio.gather(
                *(notifier.publish_many("s", [("x", {})] * size) for size in batches[first : first + together])
            )

    async def follow(notifier: Notifier, after: int, start: int, pace: int) -> list[int]:
        for _ in range(start):
            await asyncio.sleep(0)
        seen = []
        if after < sum(batches):
            async for event in notifier.follow("s", after, lambda event: event.seq == sum(batches)):
                seen.append(event.seq)
                for _ in range(pace):
                    await asyncio.sleep(0)
        return seen

    async def main(folder: Path) -> None:
        store = open_store("sqlite:///flame.db", folder)
        notifier = Notifier(LateStore(store, delays), backlog=backlog, page=3)  # type: ignore[arg-type]
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            tasks = [group.create_task(follow(notifier, *arguments)) for arguments in followers]
            group.create_task(publish(notifier))
        for task, (after, _, _) in zip(tasks, followers, strict=True):
            assert task.result() == list(range(after + 1, sum(batches) + 1))
        await store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
