"""A world to run a controller in: a real store, and a compute whose workers are played by the tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from waiting import until

from flame.controller.context import DEFAULT, Options
from flame.controller.controller import Controller
from flame.controller.keys import Keys
from flame.controller.supervisor import Supervisor
from flame.errors import RunnerError
from flame.notifier import Notifier
from flame.runners.base import Capacity, ExitCallback, NewsCallback, Runner, WorkerExit, WorkerInfo, WorkerSpec
from flame.spec import bundle
from flame.spec.nouns import Channel, Dataset, DatasetGroups, JobForm, RestartPolicy, Role, RoundPolicy, Schema
from flame.spec.records import ComputeRecord, Event, Job, JobState, Report, Task
from flame.store import Store, open_store

KEYS = Keys(b"0123456789abcdef0123456789abcdef")


class World:
    """The machine: its workers outlive controllers."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerInfo] = {}
        self.started: list[str] = []
        self.ended: list[str] = []
        self.cleaned: list[str] = []
        self.refuse: str | None = None
        self.stubborn = 0
        self.told: ExitCallback | None = None
        self.on_news: NewsCallback | None = None
        self.on_list: Callable[[], None] | None = None
        self.on_start: Callable[[WorkerSpec], None] | None = None
        self.down: str | None = None
        self.capacity = Capacity()
        self.others: dict[str, World] = {}

    def other(self, name: str) -> World:
        """The machine of another compute."""
        return self.others.setdefault(name, World())

    def check(self) -> None:
        """Be out of reach, if so it is."""
        if self.down:
            raise RunnerError(self.down)

    def say(self, task: str, attempt: int, message: str | None) -> None:
        """The compute says what a worker waits for, or why it takes it away."""
        assert self.on_news is not None
        self.on_news(self.workers[f"{task}.{attempt}"], message)

    def exit(self, task: str, attempt: int, code: int | None = 0, signal: str | None = None) -> None:
        """A worker ends by itself."""
        info = self.workers.pop(f"{task}.{attempt}", None)
        if info is not None and self.told is not None:
            self.told(info, WorkerExit(code, signal))


class FakeRunner(Runner):
    kind = "fake"
    Config = msgspec.defstruct("Config", [])

    def __init__(self, world: World, data_dir: Path) -> None:
        super().__init__(self.Config(), instance="test", data_dir=data_dir)
        self.world = world

    async def open(self, on_exit: ExitCallback) -> None:
        self.world.check()
        self.world.told = on_exit
        self.world.on_news = self.on_news

    async def start(self, spec: WorkerSpec) -> WorkerInfo:
        world = self.world
        world.check()
        if world.refuse:
            raise RunnerError(world.refuse)
        info = WorkerInfo(spec.task, spec.job, spec.attempt, f"pid-{len(world.started)}")
        world.workers[spec.name] = info
        world.started.append(spec.name)
        if world.on_start is not None:
            world.on_start(spec)
        return info

    async def list(self) -> Sequence[WorkerInfo]:
        self.world.check()
        found = list(self.world.workers.values())
        if self.world.on_list is not None:
            self.world.on_list()
        return found

    async def end(self, worker: WorkerInfo, *, grace: float = 5.0) -> None:
        self.world.check()
        if self.world.stubborn:
            self.world.stubborn -= 1
            raise RunnerError("it does not want to")
        name = f"{worker.task}.{worker.attempt}"
        self.world.workers.pop(name, None)
        self.world.ended.append(name)

    async def logs(self, worker: WorkerInfo) -> AsyncIterator[bytes]:
        yield b"flamelet: cannot import\n"

    async def clean(self, worker: WorkerInfo) -> None:
        self.world.cleaned.append(f"{worker.task}.{worker.attempt}")

    async def capacity(self) -> Capacity:
        self.world.check()
        return self.world.capacity

    async def close(self) -> None:
        self.world.told = None


class Bench:
    """A controller in its world, and short words for what tests do with it."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self.world = world
        self.controller: Controller
        self.store: Store
        self.code = ""

    async def job(self, *, trainers: int = 2, start: bool = True, **fields: Any) -> Job:
        job = await self.controller.create_job(form(self.code, trainers, **fields))
        return await self.controller.start_job(job.id) if start else job

    async def state(self, job: str, *states: JobState) -> Job:
        """Wait until a job is in one of these states."""
        found = await self.controller.job(job)
        if found.state in states:
            return found
        async for batch in await self.controller.events(job, follow=True):
            for event in batch:
                if event.type == "job" and JobState(event.data["state"]) in states:
                    return await self.controller.job(job)
        raise AssertionError(f"the job ended {(await self.controller.job(job)).state}")

    async def events(self, job: str, kind: str | None = None) -> list[Event]:
        batches = await self.controller.events(job)
        return [event async for batch in batches for event in batch if kind in (None, event.type)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that no stream tells."""
        await until(condition)

    async def deployed(self, job: str) -> list[Task]:
        """Wait until all of a job's workers are there."""
        await self.state(job, JobState.DEPLOYING)
        tasks = await self.controller.tasks(job)
        await self.until(lambda: all(f"{task.id}.{task.attempt}" in self.world.workers for task in tasks))
        return await self.controller.tasks(job)

    async def run(self, job: str) -> list[Task]:
        """Bring a job to where all of its tasks run."""
        tasks = await self.deployed(job)
        for task in tasks:
            flamelet = Flamelet(self, task.id, task.attempt)
            await flamelet.connect()
            await flamelet.say("state", state="running")
        return await self.controller.tasks(job)

    def flamelet(self, task: Task) -> Flamelet:
        return Flamelet(self, task.id, task.attempt)


class Flamelet:
    """A worker's agent, as far as the controller sees it."""

    def __init__(self, bench: Bench, task: str, attempt: int) -> None:
        self.bench = bench
        self.task = task
        self.attempt = attempt

    @property
    def supervisor(self) -> Supervisor:
        return self.bench.controller.door.enter(self.task, self.attempt, KEYS.task(self.task, self.attempt))

    async def connect(self) -> list[Event]:
        """Follow the events until there are some."""
        async for batch in await self.bench.controller.door.orders(self.supervisor, self.task, self.attempt):
            return list(batch)
        raise AssertionError

    async def orders(self, kind: str, count: int = 1) -> list[Event]:
        """Follow the events until there are so many of a kind."""
        found: list[Event] = []
        async for batch in await self.bench.controller.door.orders(self.supervisor, self.task, self.attempt):
            found += [event for event in batch if event.type == kind]
            if len(found) >= count:
                break
        return found

    async def say(self, kind: str, seq: int | None = None, **data: Any) -> int:
        worker = self.supervisor.worker(self.task, self.attempt)
        report = Report(seq=worker.acked + 1 if seq is None else seq, type=kind, data=data)
        return await self.supervisor.hearing.report(self.task, self.attempt, [report])

    async def complete(self) -> None:
        await self.say("state", state="completed", exitCode=0)
        self.bench.world.exit(self.task, self.attempt)


def schema() -> Schema:
    place = [{"param": "default"}]
    return Schema(
        name="two tiers",
        roles=[
            Role(name="trainer", is_data_consumer=True, group_association=place),
            Role(name="aggregator", group_association=place),
        ],
        channels=[Channel(name="param", pair=["trainer", "aggregator"])],
    )


def form(bundle: str, trainers: int = 2, **fields: Any) -> JobForm:
    if "policy" in fields:
        fields["policy"] = msgspec.convert(fields["policy"], RoundPolicy)
    fields["restart"] = msgspec.convert(fields.get("restart", {"attempts": 0}), RestartPolicy)
    datasets = [Dataset(id=f"d{i}", name=f"site {i}", url=f"file:///site{i}") for i in range(trainers)]
    groups = {"default": [f"d{i}" for i in range(trainers)]}
    given: dict[str, Any] = {
        "name": "digits",
        "schema": schema(),
        "code": bundle,
        "datasets": datasets,
        "data_spec": [DatasetGroups(role="trainer", dataset_groups=groups)],
    }
    return JobForm(**{**given, **fields})


def code(folder: Path) -> bytes:
    for role in ("trainer", "aggregator"):
        (folder / "code" / role).mkdir(parents=True, exist_ok=True)
        (folder / "code" / role / "main.py").write_text("print('hello')\n")
    return bundle.pack(folder / "code")


@contextlib.asynccontextmanager
async def controlled(
    folder: Path, world: World, wrap: Callable[[Store], Store] | None = None, **options: Any
) -> AsyncIterator[Bench]:
    """A controller; leaving the context is not an orderly end, but close to a kill."""
    bench = Bench(folder, world)
    real = open_store("sqlite:///flame.db", folder)
    bench.store = wrap(real) if wrap else real
    notifier = Notifier(bench.store)

    def make_runner(compute: ComputeRecord) -> FakeRunner:
        return FakeRunner(world if compute.name == DEFAULT else world.other(compute.name), folder)

    given = {"slots": 100, "parting": 0.2, **options}
    bench.controller = Controller(bench.store, notifier, make_runner, KEYS, Options(data_dir=folder, **given))
    try:
        bench.code = await real.put_bundle(code(folder))
        await bench.controller.open()
        yield bench
    finally:
        await bench.controller.close()
        notifier.close()
        await real.close()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
async def bench(tmp_path: Path, world: World) -> AsyncIterator[Bench]:
    async with controlled(tmp_path, world) as bench:
        yield bench


@pytest.fixture
def control(tmp_path: Path, world: World) -> Callable[..., contextlib.AbstractAsyncContextManager[Bench]]:
    """Make a controller with options, or another one in the same world."""

    def make(
        wrap: Callable[[Store], Store] | None = None, **options: Any
    ) -> contextlib.AbstractAsyncContextManager[Bench]:
        return controlled(tmp_path, world, wrap, **options)

    return make


@pytest.fixture
def make_form() -> Callable[..., JobForm]:
    return form
