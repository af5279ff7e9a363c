"""Places where the tests of runners start workers: one class a kind, each on the real thing."""

import asyncio
import os
import subprocess
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

from flame.runners import Runner, WorkerExit, WorkerInfo, WorkerSpec, make_runner
from flame.spec.nouns import Resources

CODE = Path(__file__).parent
MODULE = "fake_worker"
IMAGE = "python:3.11-slim-bookworm"


class Place(ABC):
    """A compute, the runners that were opened on it, and everything that they reported.

    :param data_dir: the server's data directory.
    :param instance: the server's id.
    """

    kind: str

    def __init__(self, data_dir: Path, instance: str | None = None, **config: Any) -> None:
        self.data_dir = data_dir
        self.instance = instance or uuid.uuid4().hex[:16]
        self.config = config
        self.exits: list[tuple[WorkerInfo, WorkerExit]] = []
        self.news: list[tuple[WorkerInfo, str | None]] = []
        self.runners: list[Runner] = []

    async def open(self) -> Runner:
        runner = make_runner(self.kind, self.config, instance=self.instance, data_dir=self.data_dir)
        runner.on_news = lambda worker, message: self.news.append((worker, message))
        await runner.open(lambda worker, how: self.exits.append((worker, how)))
        self.runners.append(runner)
        return runner

    def spec(self, task: str, behaviour: str = "wait", attempt: int = 1, **more: Any) -> WorkerSpec:
        told = {"FLAME_TASK": task, "FLAME_TASK_KEY": f"se'cret {task}", "FLAME_ATTEMPT": str(attempt)}
        return WorkerSpec(task, "job1", attempt, {**told, "BEHAVIOUR": behaviour}, module=MODULE, **more)

    async def printed(self, runner: Runner, worker: WorkerInfo) -> str:
        return b"".join([piece async for piece in runner.logs(worker)]).decode()

    async def ready(self, runner: Runner, *workers: WorkerInfo) -> None:
        for worker in workers:

            async def said(worker: WorkerInfo = worker) -> bool:
                return f"worker {worker.task}\n" in await self.printed(runner, worker)

            await until(said)

    async def close(self) -> None:
        """End all that the test has left."""
        for runner in self.runners:
            await runner.close()
        last = make_runner(self.kind, self.config, instance=self.instance, data_dir=self.data_dir)
        await last.open(lambda worker, how: None)
        for worker in await last.list():
            await last.end(worker, grace=0)
        await last.close()

    @abstractmethod
    async def kill(self, worker: WorkerInfo, signal: str) -> None:
        """What somebody on the compute may do to a worker."""

    @abstractmethod
    async def shown(self, worker: WorkerInfo) -> str:
        """What lists of processes, containers or pods show of a worker."""


class LocalPlace(Place):
    kind = "local"

    def __init__(self, data_dir: Path, instance: str | None = None, **config: Any) -> None:
        super().__init__(data_dir, instance, environment={"PYTHONPATH": str(CODE)}, **config)

    async def kill(self, worker: WorkerInfo, signal: str) -> None:
        import signal as signals

        os.kill(int(worker.handle), signals.Signals[signal])

    async def shown(self, worker: WorkerInfo) -> str:
        return " ".join(psutil.Process(int(worker.handle)).cmdline())


class DockerPlace(Place):
    kind = "docker"

    def __init__(self, data_dir: Path, instance: str | None = None, **config: Any) -> None:
        known = {"image": IMAGE, "volumes": [f"{CODE}:/code:ro"], "environment": {"PYTHONPATH": "/code"}}
        super().__init__(data_dir, instance, **{**known, **config})

    async def docker(self, *arguments: str) -> str:
        host = ["--host", self.config["host"]] if "host" in self.config else []
        command = ["docker", *host, *arguments]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def containers(self) -> list[str]:
        """All that there are of this server, also those that have ended."""
        return (
            await self.docker("ps", "--all", "--quiet", "--filter", f"label=flame.instance={self.instance}")
        ).split()

    async def kill(self, worker: WorkerInfo, signal: str) -> None:
        await self.docker("kill", "--signal", signal, worker.handle)

    async def shown(self, worker: WorkerInfo) -> str:
        return await self.docker("inspect", worker.handle) + await self.docker("top", worker.handle)


def no_docker() -> str | None:
    """Why there is no Docker engine to test on; None where there is."""
    try:
        done = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "no Docker engine: there is no command `docker`"
    return f"no Docker engine with the image {IMAGE}: {done.stderr.strip()}" if done.returncode else None


def place(kind: str, data_dir: Path, instance: str | None = None, **config: Any) -> Place:
    """A place of a kind; skips the test where its engine is not there."""
    if kind == "docker" and (missing := no_docker()):
        pytest.skip(missing)
    kinds: dict[str, type[Place]] = {"local": LocalPlace, "docker": DockerPlace}
    return kinds[kind](data_dir, instance, **config)


def limited(memory: str) -> dict[str, Resources]:
    return {"resources": Resources(memory=memory)}
