"""Actors, and the face for code without async, which is a concurrent.futures.Executor."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flame.sessions
from flame.errors import ActorLost, TaskFailed, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


async def test_an_actors_calls_happen_in_order_in_one_process(served: Any) -> None:
    async with flame.sessions.actor(sessionkit.Counter, start=10, connection=served.connection) as counter:
        calls = [counter.add(1) for _ in range(200)]
        assert [await call for call in calls] == list(range(11, 211))
        assert await counter.pid() == await counter.pid()
        with pytest.raises(TaskFailed, match="ValueError: no"):
            await counter.fail()
        assert await counter.add(k=5) == 215
        with pytest.raises(AttributeError, match="no method 'nothing'"):
            counter.nothing()
        with pytest.raises(AttributeError):
            counter._private()


async def test_a_lost_actor_says_so_and_does_not_answer_from_an_empty_memory(served: Any) -> None:
    async with flame.sessions.actor(sessionkit.Counter, connection=served.connection) as counter:
        pid = await counter.pid()
        assert await counter.add(3) == 3
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorLost, match="its state with it"):
            await counter.add()
        with pytest.raises(ActorLost):
            await counter.add()


async def test_an_actor_that_may_begins_anew(served: Any) -> None:
    async with flame.sessions.actor(sessionkit.Counter, 100, connection=served.connection, restart=True) as counter:
        pid = await counter.pid()
        assert await counter.add(3) == 103
        os.kill(pid, signal.SIGKILL)
        assert await counter.add(1) == 101
        assert await counter.pid() != pid


async def test_two_actors_of_one_class_know_nothing_of_each_other(served: Any) -> None:
    make = lambda start: flame.sessions.actor(sessionkit.Counter, start, connection=served.connection)  # noqa: E731
    async with make(0) as one, make(50) as other:
        assert await asyncio.gather(one.add(), other.add()) == [1, 51]


def test_only_classes_make_actors() -> None:
    with pytest.raises(UsageError, match="made of a class"):
        flame.sessions.actor(sessionkit.square)


async def test_a_script_without_async_has_a_session(served: Any) -> None:
    def script() -> None:
        with flame.sessions.sync.open(sessionkit.square, server=served.url, max_instances=2) as session:
            assert session.invoke(12) == 144
            assert list(session.map(range(100))) == [n * n for n in range(100)]
            futures = session.submit_many(range(20))
            done = concurrent.futures.wait(futures, timeout=60)
            assert not done.not_done
            assert sorted(future.result() for future in futures) == [n * n for n in range(20)]
            assert (session.counts.total, session.counts.succeed) == (121, 121)
            np.testing.assert_array_equal(session.invoke(session.put(np.arange(5))), np.arange(5) ** 2)
            with session.actor(sessionkit.Counter, start=1) as counter:
                assert counter.add(2) == 3
        with pytest.raises(RuntimeError, match="after shutdown"):
            session.submit(1)

    await asyncio.to_thread(script)


async def test_without_an_application_it_is_a_pool_for_any_function(served: Any) -> None:
    def script() -> None:
        with flame.sessions.sync.open(server=served.url, max_instances=2) as pool:
            assert isinstance(pool, concurrent.futures.Executor)
            assert pool.submit(sessionkit.power, 3, exponent=3).result() == 27
            assert list(pool.map(sessionkit.power, range(5), [1, 2, 1, 2, 1])) == [0, 1, 2, 9, 4]
            assert pool.submit(math.sqrt, 16.0).result() == 4.0
            with pytest.raises(TaskFailed, match="ValueError"):
                pool.submit(sessionkit.fail, 1).result()
            with pytest.raises(UsageError, match="top of a module"):
                pool.submit(lambda: 1)
            with pytest.raises(UsageError, match="pool for functions"):
                pool.invoke(1)

    await asyncio.to_thread(script)


async def test_a_pool_serves_an_event_loop(served: Any) -> None:
    pool = await asyncio.to_thread(flame.sessions.sync.open, server=served.url, max_instances=1)
    try:
        answer = await asyncio.get_running_loop().run_in_executor(pool, sessionkit.power, 5)
        assert answer == 25
    finally:
        await asyncio.to_thread(pool.shutdown)


async def test_an_error_in_the_context_cancels_what_waits(served: Any, tmp_path: Path) -> None:
    def script() -> None:
        with flame.sessions.sync.open(sessionkit.wait_for, server=served.url, max_instances=1) as session:
            session.submit(str(tmp_path / "never"))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await asyncio.to_thread(script)
    (record,) = await served.manager.register.find(None, None, 10)
    assert record.state == "closed"
