"""What outlives a killed server and killed executors: everything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from waiting import until

import flame.sessions
from flame.client import Client
from flame.errors import ServerUnreachable
from flame.spec.sessions import SessionRecord

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


async def record(url: str, session: str) -> SessionRecord:
    async with Client(url) as client:
        return await client._session.call("GET", f"/v1/sessions/{session}", into=SessionRecord)


async def test_ten_sessions_survive_killed_executors_and_a_server_killed_twice(
    server_process: Any, find_executors: Any
) -> None:
    url = await server_process.start()
    answered = Counter[int]()
    asked = 10, 1000

    async with flame.sessions.connect(url) as connection, asyncio.timeout(100):
        sessions = [connection.open(sessionkit.slow_square, weight=1 + k % 3) for k in range(asked[0])]
        async with contextlib.AsyncExitStack() as stack:
            for session in sessions:
                await stack.enter_async_context(session)
            futures = [session.submit_many(range(asked[1])) for session in sessions]
            for k, some in enumerate(futures):
                for future in some:
                    future.add_done_callback(lambda _, k=k: answered.update([k]))

            async def kill_executors() -> None:
                while True:
                    await asyncio.sleep(random.uniform(0.1, 0.6))
                    for pid in random.sample(found := find_executors(), min(1, len(found))):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

            killing = asyncio.create_task(kill_executors())
            for share in (0.3, 0.6):
                while answered.total() < share * asked[0] * asked[1]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await server_process.kill()
                assert await server_process.start() == url
            results = [await asyncio.gather(*some) for some in futures]
            killing.cancel()
            assert results == [[n * n for n in range(asked[1])]] * asked[0]
            assert answered == dict.fromkeys(range(asked[0]), asked[1])
            for session in sessions:
                counts = (await record(url, session.id)).counts
                assert (counts.total, counts.succeed) == (asked[1], asked[1])


async def test_what_was_submitted_is_there_after_a_kill_and_runs_on_without_its_client(
    server_process: Any, tmp_path: Path
) -> None:
    url = await server_process.start()
    gate = str(tmp_path / "gate")
    async with flame.sessions.connect(url) as connection:
        session = connection.open(sessionkit.wait_for, id="kept", max_instances=1)
        await session.__aenter__()
        session.submit_many([gate] * 50)
        await session.accepted()
        await session.leave()
    await server_process.kill()
    Path(gate).touch()
    url = await server_process.start()

    async def all_done() -> bool:
        return (await record(url, "kept")).counts.succeed == 50

    await until(all_done)
    async with Client(url) as client:
        page = await client._session.call("GET", "/v1/sessions/kept/tasks", query={"limit": 1000}, into=dict)
    assert [one["id"] for one in page["items"]] == list(range(1, 51))
    assert {one["state"] for one in page["items"]} == {"succeed"}


async def test_a_warm_executor_is_the_same_process_after_the_server_was_killed(server_process: Any) -> None:
    url = await server_process.start()
    async with flame.sessions.connect(url) as connection, connection.open(sessionkit.pid, max_instances=1) as session:
        first = await session.invoke(0)
        await server_process.kill()
        await server_process.start()
        assert await session.invoke(0) == first


async def test_an_executor_that_is_slow_to_come_back_is_waited_for_and_not_doubled(
    server_process: Any, find_executors: Any
) -> None:
    url = await server_process.start()
    async with flame.sessions.connect(url) as connection, connection.open(sessionkit.pid, max_instances=1) as session:
        first = await session.invoke(0)
        os.kill(first, signal.SIGSTOP)
        try:
            await server_process.kill()
            await server_process.start()
            again = session.submit(0)
            await session.accepted()
            await record(url, session.id)  # by now the scheduler has looked, and would have started another
            assert await asyncio.to_thread(find_executors) == [first]
        finally:
            os.kill(first, signal.SIGCONT)
        assert await again == first


async def test_a_client_gives_up_a_server_that_stays_away_and_says_so(server_process: Any) -> None:
    url = await server_process.start()
    async with flame.sessions.connect(url, patience=0.2) as connection:
        session = connection.open(sessionkit.square, max_instances=1)
        await session.__aenter__()
        await session.invoke(1)
        await server_process.kill()
        with pytest.raises(ServerUnreachable, match="No server answers"):
            await session.invoke(2)
        with pytest.raises(ServerUnreachable):
            session.submit(3)
