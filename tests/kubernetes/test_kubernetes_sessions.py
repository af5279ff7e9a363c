"""A session whose executors are pods: as many as its load asks for, and none once it is closed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "sessions"))
import sessionkit
from engines import kubectl
from jobkit import TOKEN, Server
from waiting import blocked_until

import flame.sessions


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, namespace: str, kubeconfig: str, image: str) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), namespace, kubeconfig, image)
    server.start()
    yield server
    server.kill()


def running(namespace: str) -> list[Any]:
    return list(json.loads(kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"])


async def test_executors_are_pods_that_come_with_the_load_and_go_with_it(server: Server, namespace: str) -> None:
    async with (
        flame.sessions.connect(server.url, TOKEN) as connection,
        connection.open(sessionkit.slow_square, max_instances=3, delay_release=0.5) as session,
    ):
        answers = session.submit_many(range(6000))
        await answers[0]  # so one is there, and has more to do
        pods = await asyncio.to_thread(running, namespace)
        assert 1 <= len(pods) <= 3
        assert await asyncio.gather(*answers) == [number * number for number in range(6000)]
        assert all("flame.sessions.executor" in pod["spec"]["containers"][0]["command"] for pod in pods)
        assert await session.invoke(12) == 144
    await asyncio.to_thread(blocked_until, lambda: running(namespace) == [])


async def test_a_pod_that_is_deleted_by_hand_costs_no_task(server: Server, namespace: str) -> None:
    async with (
        flame.sessions.connect(server.url, TOKEN) as connection,
        connection.open(sessionkit.slow_square, max_instances=2, delay_release=0.5) as session,
    ):
        futures = session.submit_many(range(8000))
        await futures[100]
        (pod, *_) = await asyncio.to_thread(running, namespace)
        await asyncio.to_thread(
            kubectl, "delete", "pod", "-n", namespace, pod["metadata"]["name"], "--force", "--grace-period=0"
        )
        assert await asyncio.gather(*futures) == [number * number for number in range(8000)]
    await asyncio.to_thread(blocked_until, lambda: running(namespace) == [])
