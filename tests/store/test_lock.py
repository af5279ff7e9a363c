"""One server at a time: whoever holds the lock writes, whoever lost it does not, however it was held up."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flame.errors import Conflict, StoreError
from flame.store import Store, open_store
from flame.store.lock import ServerLock

T = 1.5  # seconds of a takeover

LONG = 10.0  # for what must not wait for it: a busy machine is not taken for waiting

Make = Callable[..., ServerLock]


class Line(Store):
    """A connection to a database that can be cut."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cut = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("insert", "get", "replace", "delete", "find"):
            if name in object.__getattribute__(self, "__dict__"):
                return object.__getattribute__(self, name)
            store, cut = object.__getattribute__(self, "store"), object.__getattribute__(self, "cut")

            async def call(*args: Any, **kwargs: Any) -> Any:
                if cut:
                    raise StoreError("The database cannot be reached.")
                return await getattr(store, name)(*args, **kwargs)

            return call
        if name == "close":
            return object.__getattribute__(self, "store").close
        return object.__getattribute__(self, name)


Line.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


@pytest.fixture(params=["sqlite", "mongodb"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mongodb":
        return str(request.getfixturevalue("mongo_url"))
    return f"sqlite:///{tmp_path}/flame.db"


@pytest.fixture
async def make(database: str, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[ServerLock] = []

    def one(place: str, takeover: float = T) -> ServerLock:
        made.append(ServerLock(Line(open_store(database, tmp_path)), place, takeover))
        return made[-1]

    yield one
    for lock in made:
        with contextlib.suppress(Exception):
            await lock.close()


def silence(lock: ServerLock) -> None:
    """What a kill does: no beat any more, and nothing is said."""
    lock._closing.set()


def cut(lock: ServerLock, cut: bool = True) -> None:
    lock._store.cut = cut  # type: ignore[attr-defined]


async def refused(call: Awaitable[None], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        await call


async def cancelled(task: asyncio.Task[None]) -> None:
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.5)


async def test_a_second_server_is_refused_within_a_moment_and_told_of_the_first(make: Make) -> None:
    await make("a", LONG).take(wait=False)
    begin = time.monotonic()
    await refused(make("b", LONG).take(wait=False), Conflict, r"Another server works on this database: process \d+ on")
    assert time.monotonic() - begin < 0.5 * LONG


async def test_a_server_that_has_ended_is_followed_at_once(make: Make) -> None:
    first, standby = make("a", LONG), make("b", LONG)
    await first.take(wait=False)
    waiting = asyncio.create_task(standby.take(wait=True))
    await asyncio.sleep(0.1 * LONG)
    assert not waiting.done()
    await first.close()
    begin = time.monotonic()
    await waiting
    assert time.monotonic() - begin < 0.5 * LONG


async def test_the_same_data_directory_goes_on_at_once_after_a_kill(make: Make) -> None:
    first = make("a", LONG)
    await first.take(wait=False)
    silence(first)
    begin = time.monotonic()
    await make("a", LONG).take(wait=False)
    assert time.monotonic() - begin < 0.5 * LONG
    first._until = 0.0
    await refused(first.hold(), StoreError, "has lost its database")


@pytest.mark.parametrize("wait", [True, False])
async def test_a_silent_server_is_followed_after_a_while(make: Make, wait: bool) -> None:
    first, second = make("a"), make("b")
    await first.take(wait=False)
    silence(first)
    begin = time.monotonic()
    await second.take(wait=wait)
    assert time.monotonic() - begin > 0.9 * T
    await second.hold()


async def test_who_was_held_up_finds_out_before_it_writes_again(make: Make) -> None:
    first, second = make("a"), make("b")
    await first.take(wait=False)
    silence(first)  # stopped, with no chance to hear of anything
    await second.take(wait=True)
    assert not first.lost.is_set()
    await refused(first.hold(), StoreError, r"lost its database to process \d+ on")
    assert first.lost.is_set()
    await refused(first.hold(), StoreError, "lost its database")


async def test_who_is_cut_off_stops_before_the_other_begins(make: Make) -> None:
    first, second = make("a"), make("b")
    await first.take(wait=False)
    taking = asyncio.create_task(second.take(wait=True))
    cut(first)
    held = time.monotonic()
    while not taking.done():
        with contextlib.suppress(StoreError):
            await first.hold()
            held = time.monotonic()
        await asyncio.sleep(0.01)
    assert time.monotonic() - held > 0.2 * T, "time for a write that was begun"
    cut(first, False)
    async with asyncio.timeout(20 * T):
        await first.lost.wait()


async def test_of_many_standbys_one_takes_over_and_the_others_wait(make: Make) -> None:
    locks = [make(str(number)) for number in range(5)]
    await locks[0].take(wait=False)
    waiting = [asyncio.create_task(lock.take(wait=True)) for lock in locks[1:]]
    silence(locks[0])
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    await asyncio.sleep(T)
    assert sum(task.done() for task in waiting) == 1
    for task in pending:
        await cancelled(task)


async def test_a_renewal_keeps_the_lock_over_many_terms(make: Make) -> None:
    lock = make("a")
    await lock.take(wait=False)
    watcher = asyncio.create_task(make("b").take(wait=True))
    for _ in itertools.repeat(None, 30):
        await asyncio.sleep(0.1 * T)
        await lock.hold()
    assert not watcher.done()
    await cancelled(watcher)


async def test_a_renewal_of_which_the_answer_was_lost_is_no_other_server(make: Make) -> None:
    """A database that stood still for a moment has taken what its client gave up."""
    lock = make("a")
    await lock.take(wait=False)
    line = lock._store
    replace, lost = line.replace, []

    async def answer_lost(*args: Any, **kwargs: Any) -> Any:
        done = await replace(*args, **kwargs)
        if not lost:
            lost.append(done)
            raise StoreError("The database does not answer.")
        return done

    line.replace = answer_lost  # type: ignore[method-assign]
    lock._until = 0.0
    with pytest.raises(StoreError, match="does not answer"):
        await lock._renew()
    assert lost
    await lock.hold()
    assert not lock.lost.is_set()
    with pytest.raises(Conflict):
        await make("b").take(wait=False)


async def test_a_standby_outlasts_a_database_that_is_away(make: Make) -> None:
    first, standby = make("a"), make("b")
    await first.take(wait=False)
    waiting = asyncio.create_task(standby.take(wait=True))
    await asyncio.sleep(0.3 * T)
    cut(standby)
    await asyncio.sleep(0.3 * T)
    assert not waiting.done()
    cut(standby, False)
    await first.close()
    async with asyncio.timeout(20 * T):
        await waiting
