"""Executors of sessions in containers and in pods: they come with the load and go when there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "sessions"))
import sessionkit

import flame.sessions
from flame.client import Client
from flame.spec.nouns import Compute
from flame.spec.sessions import Application, SessionRecord


@pytest.mark.timeout(600)  # the first of a run builds the image
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
async def test_executors_come_with_the_load_and_go_when_there_is_none(
    kind: str, serving: Any, three: tuple[Compute, ...]
) -> None:
    async with serving() as client:
        await client.computes.create(next(one for one in three if one.kind == kind))
        await client.computes.drain("local")
        app = Application(name="squares", entry="operator:neg")
        async with (
            flame.sessions.connect(client.server, _token(client)) as connection,
            connection.open(app, max_instances=2, delay_release=1.0) as session,
            asyncio.timeout(200),
        ):
            for _ in range(2):  # the second time from nothing again
                assert [answer async for answer in session.map(range(500))] == [-n for n in range(500)]
                record = await _record(client, session.id)
                assert {one.compute for one in record.executors} == {kind}
                while (await _record(client, session.id)).executors or (await client.computes.get(kind)).used.slots:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        assert (await _record(client, session.id)).counts.succeed == 1000


@pytest.mark.timeout(600)
async def test_a_container_that_is_killed_costs_no_task(serving: Any, three: tuple[Compute, ...]) -> None:
    async with serving() as client:
        await _only_docker(client, three)
        async with (
            flame.sessions.connect(client.server, _token(client)) as connection,
            connection.open(sessionkit.slow_square, max_instances=2, delay_release=1.0) as session,
            asyncio.timeout(200),
        ):
            futures = session.submit_many(range(8000))
            await futures[100]
            executors = [one.id for one in (await _record(client, session.id)).executors]
            (container, *_) = await asyncio.to_thread(_containers, executors)
            assert not futures[-1].done(), "it was busy when it was killed"
            await asyncio.to_thread(subprocess.run, ["docker", "kill", container], check=True, capture_output=True)
            assert await asyncio.gather(*futures) == [number * number for number in range(8000)]
        async with asyncio.timeout(60):
            while (await client.computes.get("docker")).used.slots:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert await asyncio.to_thread(_containers, executors) == []


@pytest.mark.timeout(600)
async def test_what_tasks_share_comes_over_the_network_into_a_container_and_is_mapped_there(
    serving: Any, three: tuple[Compute, ...]
) -> None:
    ones = np.ones(4_000_000)
    async with serving() as client:
        await _only_docker(client, three)
        async with (
            flame.sessions.connect(client.server, _token(client)) as connection,
            connection.open(sessionkit.Mapped, common_data={"array": ones}, max_instances=1) as session,
            asyncio.timeout(200),
        ):
            _, total, _, path = await session.invoke(None)
            assert total == ones.sum()
            assert path.startswith("/"), "the array is a view of a file"
            assert not Path(path).exists(), "the file is the container's own"


async def _only_docker(client: Client, computes: tuple[Compute, ...]) -> None:
    await client.computes.create(next(one for one in computes if one.kind == "docker"))
    await client.computes.drain("local")


def _containers(executors: list[str]) -> list[str]:
    """Those that run."""
    found = []
    for executor in executors:
        command = ["docker", "ps", "--quiet", "--filter", f"label=flame.task={executor}"]
        found += subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return found


async def _record(client: Client, session: str) -> SessionRecord:
    return await client._session.call("GET", f"/v1/sessions/{session}", into=SessionRecord)


def _token(client: Client) -> str:
    """With which a client was made."""
    return client._session._headers["Authorization"].removeprefix("Bearer ")
