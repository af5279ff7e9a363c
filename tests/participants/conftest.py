"""A real server as a process, jobs for participants, and participants as processes of their own: ``flame join``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flame.cli.main import flame
from flame.client import Client
from flame.spec import bundle
from flame.spec.nouns import Channel, Dataset, DatasetGroups, JobForm, ModelSpec, Role, RoundPolicy, Schema
from flame.spec.records import Job, JobState, Task, TaskState

TRAINER = """
import os, pathlib, sys
import numpy as np
from flame.sdk import Config, Trainer

class Site(Trainer):
    dataset_size = 1

    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(8, np.float32)}

    def load_data(self):
        path = pathlib.Path(self.config.dataset.removeprefix("file://"))
        self.step = float(path.read_text())

    def train(self):
        print("trains", self._round, flush=True)
        self.model["w"] += self.step

    def evaluate(self):
        pass

site = Site(Config("config.json"))
site.compose()
site.run()
"""

AGGREGATOR = """
import pathlib, time
import numpy as np
from flame.sdk import Aggregator, Config

class Mean(Aggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(8, np.float32)}

    def evaluate(self):
        # Some rounds are held until the test opens them by a file, whose text says how many trainers must be there then.
        if self._round in self.config.hyperparameters["held"]:
            gate = pathlib.Path(self.config.hyperparameters["gate"] + str(self._round))
            while not gate.exists():
                time.sleep(0.02)
            count, channel = int(gate.read_text()), self.channel("aggregate")
            assert channel.wait_until(lambda: len(channel.all_ends()) == count, 30), channel.all_ends()
        print("mean", self._round, float(self.model["w"][0]), len(self._tally.folded), flush=True)

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""


class Server:
    """``flame serve`` on a data directory; it can be killed and started again."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.arguments = arguments
        self.data_dir = data_dir
        self.log = data_dir.parent / "server.log"
        self.process: subprocess.Popen[bytes]
        self.url = ""

    async def start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "flame", "serve", "--port", "0", "--data-dir", str(self.data_dir)]
            command += self.arguments
            environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: ASYNC220
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(OSError, ValueError, LookupError):
                    said = json.loads((self.data_dir / "server.json").read_text())
                    if said["pid"] == self.process.pid:
                        self.url = said["url"]
                        return
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Joined:
    """``flame join``, with its own folder, home and data; the lines that it prints."""

    def __init__(self, folder: Path, url: str, token: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        environment |= {"HOME": str(folder), "FLAME_INVITE": token, **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flame", "join", "--server", url, "--work-dir", str(folder / "work"), *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    async def says(self, words: str) -> None:
        def there() -> bool:
            return any(words in line for line in self.lines)

        def wait() -> bool:
            with self._news:
                return self._news.wait_for(there, 30)

        assert await asyncio.to_thread(wait), self.text

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """The whole machine goes: this command, its flamelet and the child of that."""
        import psutil

        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.kill()

    def close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()

    async def end(self) -> int:
        status = await asyncio.to_thread(self.process.wait, 60)
        await asyncio.to_thread(self._reader.join, 10)
        return status


class Place:
    """A server with a client, and what a test of participants needs."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.gate = folder / "gate"
        self.server = Server(folder / "data", *arguments)
        self.client: Client
        self.joined: list[Joined] = []

    async def job(
        self, *, system: int, brought: int, rounds: int = 6, held: Sequence[int] = (), start: bool = True, **policy: Any
    ) -> Job:
        archive = pack(self.folder / "code")
        digest = await self.client.code.upload(archive)
        place = [{"param": "default"}]
        roles = [Role(name="trainer", is_data_consumer=True, group_association=place)]
        roles.append(Role(name="aggregator", group_association=place))
        tags = {"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]}
        datasets = []
        for number in range(system):
            (self.folder / f"site{number}").write_text(str(2.0**number))
            datasets.append(Dataset(id=f"d{number}", name=f"site {number}", url=f"file://{self.folder}/site{number}"))
        form = JobForm(
            name="digits",
            code=digest,
            schema=Schema(
                name="two tiers",
                roles=roles,
                channels=[Channel(name="param", pair=["trainer", "aggregator"], func_tags=tags)],
            ),
            datasets=datasets,
            data_spec=[
                DatasetGroups(
                    role="trainer",
                    dataset_groups={"default": [one.id or "" for one in datasets]},
                    from_user={"default": brought},
                )
            ],
            model_spec=ModelSpec(hyperparameters={"rounds": rounds, "gate": str(self.gate), "held": list(held)}),
            policy=RoundPolicy(**policy),
        )
        job = await self.client.jobs.create(form)
        return await self.client.jobs.start(job.id) if start else job

    def open(self, round: int, trainers: int) -> None:
        """Let the job go on behind a held round, once so many trainers are there."""
        partial = self.gate.with_name("partial")
        partial.write_text(str(trainers))
        partial.replace(f"{self.gate}{round}")

    def join(self, number: int, token: str, *arguments: str, **kwargs: Any) -> Joined:
        """The participant of this number, whose data make its training steps distinct."""
        folder = self.folder / f"owner{number}"
        folder.mkdir(exist_ok=True)
        (folder / "data").write_text(str(2.0**number))
        words = ("--dataset", "data", "--name", f"owner {number}", *arguments)
        self.joined.append(Joined(folder, self.server.url, token, *words, **kwargs))
        return self.joined[-1]

    async def tasks(self, job: Job) -> list[Task]:
        return await self.client.jobs.tasks(job.id)

    async def state(self, job: Job, *states: JobState) -> Job:
        """Follow a job until it is in one of these states."""
        async with asyncio.timeout(60):
            async with contextlib.aclosing(self.client.jobs.events(job.id, follow=True)) as events:
                async for event in events:
                    if event.type == "job" and JobState(event.data["state"]) in states:
                        return await self.client.jobs.get(job.id)
        raise AssertionError((await self.client.jobs.get(job.id)).state)

    async def until(self, job: Job, condition: Callable[[list[Task]], bool]) -> list[Task]:
        """Follow a job until its tasks are so."""
        async with asyncio.timeout(60):
            if condition(tasks := await self.tasks(job)):
                return tasks
            async with contextlib.aclosing(self.client.jobs.events(job.id, follow=True)) as events:
                async for event in events:
                    if event.type == "task" and condition(tasks := await self.tasks(job)):
                        return tasks
        raise AssertionError([(task.role, task.state, task.reason) for task in tasks])

    async def steps(self, job: Job) -> tuple[list[float], list[int]]:
        """What each round added to the model, and how many updates it had, as the aggregator has printed them."""
        (top,) = [task for task in await self.tasks(job) if task.role == "aggregator"]
        data = b"".join([piece async for piece in self.client.tasks.log(top.id)])
        rows = [line.split()[1:] for line in data.decode().splitlines() if line.startswith("mean")]
        assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
        means = [0.0, *(float(mean) for _, mean, _ in rows)]
        return [after - before for before, after in pairwise(means)], [int(count) for _, _, count in rows]

    async def round(self, job: Job, number: int) -> None:
        """Wait until a round is finished."""
        async with asyncio.timeout(60):
            async with contextlib.aclosing(self.client.jobs.events(job.id, follow=True)) as events:
                async for event in events:
                    if event.type == "round" and event.data["round"] >= number:
                        return
        raise AssertionError("the job has ended before")

    def running(self, tasks: list[Task]) -> int:
        return sum(task.state is TaskState.RUNNING for task in tasks)


def pack(folder: Path) -> bytes:
    for role, main in (("trainer", TRAINER), ("aggregator", AGGREGATOR)):
        (folder / role).mkdir(parents=True, exist_ok=True)
        (folder / role / "main.py").write_text(main)
    return bundle.pack(folder)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with living(Place(tmp_path)) as one:
        yield one


@pytest.fixture
async def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    """A server with certificates of an authority of its own, which asks workers for theirs, as the guide says it; p2p under TLS, too."""
    certs = tmp_path / "certs"
    for words in (["ca"], ["server", "--host", "flame.test"], ["client", "workers"], ["client", "site"]):
        made = CliRunner().invoke(flame, ["cert", *words, "--dir", str(certs)])
        assert made.exit_code == 0, made.output
    monkeypatch.setenv("FLAME_CA", str(certs / "ca.pem"))
    given = {
        "--tls-cert": "server.pem",
        "--tls-key": "server-key.pem",
        "--tls-ca": "ca.pem",
        "--tls-client-ca": "ca.pem",
        "--tls-worker-cert": "workers.pem",
        "--tls-worker-key": "workers-key.pem",
    }
    arguments = [word for option, file in given.items() for word in (option, str(certs / file))]
    async with living(Place(tmp_path, *arguments, "--p2p-tls")) as one:
        yield one


@contextlib.asynccontextmanager
async def living(one: Place) -> AsyncIterator[Place]:
    """The place with its server, until all in it has ended."""
    await one.server.start()
    try:
        async with Client(one.server.url) as one.client:
            yield one
            for job in await one.client.jobs.list():
                if not job.state.ended and job.state is not JobState.READY:
                    await one.client.jobs.stop(job.id)
                    await one.client.jobs.wait(job.id)
    finally:
        for joined in one.joined:
            joined.kill()
            await joined.end()
            joined.close()
        one.server.kill()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No process of a test outlives it."""
    import psutil

    yield
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(str(tmp_path)):
                left.append(process)
    psutil.wait_procs(left, 10)
    assert not [process for process in left if process.is_running()]
