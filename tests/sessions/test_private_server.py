"""Sessions where no server is configured: a private one is there for as long as somebody needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from waiting import until

import flame.sessions
from flame.client.local import running

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FLAME_SERVER", "FLAME_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLAME_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("FLAME_CONFIG", str(tmp_path / "config.yaml"))
    return tmp_path / "data"


async def gone(data_dir: Path) -> None:
    await until(lambda: running(data_dir) is None)


async def test_one_that_is_about_to_end_is_not_mistaken_for_one_that_stays(data_dir: Path) -> None:
    for number in range(3):
        async with flame.sessions.open(sessionkit.square, max_instances=1) as session:
            assert await session.invoke(number) == number * number
    await gone(data_dir)


async def test_it_stays_for_the_second_who_uses_it_when_the_first_one_leaves(data_dir: Path) -> None:
    first, second = flame.sessions.connect(), flame.sessions.connect()
    async with first:
        await second.__aenter__()
        assert second.server == first.server
    try:
        async with second.open(sessionkit.square, max_instances=1) as session:
            assert await session.invoke(4) == 16
    finally:
        await second.close()
    await gone(data_dir)


async def test_one_that_is_killed_is_started_again_and_its_sessions_go_on(data_dir: Path) -> None:
    async with flame.sessions.open(sessionkit.pid, max_instances=1) as session:
        executor = await session.invoke(0)
        os.kill(json.loads((data_dir / "server.json").read_text())["pid"], signal.SIGKILL)
        assert await session.invoke(0) == executor
    await gone(data_dir)
