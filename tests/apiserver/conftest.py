"""Real servers: within the test's own loop, and as processes of their own."""

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
from typing import Any

import aiohttp
import pytest

from flame.client import Client
from flame.serve import ServeSettings, serve
from flame.spec import bundle
from flame.spec.nouns import Channel, Dataset, DatasetGroups, JobForm, RestartPolicy, Role, Schema

DONE = "print('done')\n"


class Served:
    """A server of a test's own, and ways to call it."""

    def __init__(self, url: str, server: Any, http: aiohttp.ClientSession, client: Client, data_dir: Path) -> None:
        self.url = url
        self.server = server
        self.http = http
        self.client = client
        self.data_dir = data_dir

    async def call(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any]:
        """The status and the JSON of an answer."""
        async with self.http.request(method, self.url + path, **kwargs) as response:
            data = await response.read()
            return response.status, json.loads(data) if data and "json" in response.content_type else data


def form(code: str, *, trainers: int = 2, **fields: Any) -> JobForm:
    place = [{"param": "default"}]
    given: dict[str, Any] = {
        "name": "digits",
        "code": code,
        "restart": RestartPolicy(attempts=0),
        "schema": Schema(
            name="two tiers",
            roles=[
                Role(name="trainer", is_data_consumer=True, group_association=place),
                Role(name="aggregator", group_association=place),
            ],
            channels=[Channel(name="param", pair=["trainer", "aggregator"])],
        ),
        "datasets": [Dataset(id=f"d{i}", name=f"site {i}", url=f"file:///site{i}") for i in range(trainers)],
        "data_spec": [DatasetGroups(role="trainer", dataset_groups={"default": [f"d{i}" for i in range(trainers)]})],
    }
    return JobForm(**{**given, **fields})


def pack(folder: Path, trainer: str = DONE, aggregator: str = DONE) -> bytes:
    for role, main in (("trainer", trainer), ("aggregator", aggregator)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        (folder / role / "main.py").write_text(main)
    return bundle.pack(folder)


@contextlib.asynccontextmanager
async def serving(data_dir: Path, token: str | None = None, **settings: Any) -> AsyncIterator[Served]:
    data_dir.mkdir(parents=True, exist_ok=True)
    async with (
        serve(ServeSettings(port=0, token=token, **settings), data_dir) as server,
        aiohttp.ClientSession() as http,
        Client(server.url, token) as client,
    ):
        yield Served(server.url, server, http, client, data_dir)
        await server.controller.stop_all()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path / "data") as one:
        yield one


@pytest.fixture
def make_server(tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[Served]]:
    return lambda **settings: serving(tmp_path / "data", **settings)


@pytest.fixture
def make_form() -> Callable[..., JobForm]:
    return form


@pytest.fixture
def make_code(tmp_path: Path) -> Callable[..., bytes]:
    return lambda *mains: pack(tmp_path / "code", *mains)


class Process:
    """A server in a process of its own."""

    def __init__(self, data_dir: Path, *settings: str) -> None:
        self.data_dir = data_dir
        self.log = data_dir.parent / "server.log"
        script = (
            "import sys, json, pathlib\n"
            "from flame import process\n"
            "from flame.serve import ServeSettings\n"
            "from flame.errors import FlameError\n"
            "given = {'port': 0, 'data_dir': sys.argv[1], **json.loads(sys.argv[2])}\n"
            "given['data_dir'] = pathlib.Path(given['data_dir'])\n"
            "process.PRIVATE_PATIENCE = given.pop('patience', process.PRIVATE_PATIENCE)\n"
            "try: sys.exit(process.run_server(ServeSettings(**given)))\n"
            "except FlameError as error: sys.exit(str(error))\n"
        )
        arguments = [str(data_dir), settings[0] if settings else "{}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )

    async def url(self) -> str:
        """Its address, once it listens."""
        async with asyncio.timeout(60):
            while True:
                if self.process.poll() is not None:
                    raise AssertionError(self.log.read_text())
                with contextlib.suppress(OSError, ValueError, LookupError):
                    said = json.loads((self.data_dir / "server.json").read_text())
                    if said["pid"] == self.process.pid:
                        return str(said["url"])
                await asyncio.sleep(0.01)

    async def ended(self) -> int:
        """Wait for its end; gives the status."""
        async with asyncio.timeout(60):
            return await asyncio.to_thread(self.process.wait)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(**settings: Any) -> Process:
        (tmp_path / "data").mkdir(exist_ok=True)
        started.append(Process(tmp_path / "data", json.dumps(settings)))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.process.wait()
        if one.process.stdout:
            one.process.stdout.close()
