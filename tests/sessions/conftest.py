"""Real servers with real executors: in the test's own loop, or as processes that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import flame.sessions
from flame.client import Client
from flame.serve import ServeSettings, serve
from flame.sessions import Connection


class Served:
    """A server of a test's own, with a connection to it."""

    def __init__(self, url: str, connection: Connection, client: Client, manager: object) -> None:
        self.url = url
        self.connection = connection
        self.client = client
        self.manager = manager
        self.open = connection.open


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    async with serve(ServeSettings(port=0, slots=4), data_dir) as server:
        try:
            async with flame.sessions.connect(server.url) as connection, Client(server.url) as client:
                yield Served(server.url, connection, client, server.api.sessions)
        finally:
            await server.api.sessions.stop_all()


class ServerProcess:
    """A server in a process of its own, which can be killed and started again at the same address."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log = data_dir.parent / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> str:
        command = [
            sys.executable,
            "-m",
            "flame",
            "serve",
            "--port",
            "0",
            "--data-dir",
            str(self.data_dir),
            "--slots",
            "4",
        ]
        with self.log.open("ab") as log:
            self.process = await asyncio.to_thread(
                subprocess.Popen, command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        async with asyncio.timeout(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(OSError, ValueError, LookupError):
                    said = json.loads((self.data_dir / "server.json").read_text())
                    if said["pid"] == self.process.pid:
                        return str(said["url"])
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[ServerProcess]:
    (tmp_path / "data").mkdir()
    one = ServerProcess(tmp_path / "data")
    yield one
    if one.process is not None and one.process.poll() is None:
        one.process.kill()
        one.process.wait()
    for pid in executors(tmp_path / "data"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def executors(data_dir: Path) -> list[int]:
    """The executors whose working directory is in a data directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"flame.sessions.executor" in words and Path(os.readlink(entry / "cwd")).is_relative_to(data_dir):
                    found.append(int(entry.name))
    return found


@pytest.fixture
def find_executors(tmp_path: Path) -> Callable[[], list[int]]:
    return lambda: executors(tmp_path / "data")
