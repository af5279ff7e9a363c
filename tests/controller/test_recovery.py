"""A server that is killed at any instant is followed by one that takes up where it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest

from flame.errors import FlameError, StoreError
from flame.runners.base import WorkerInfo, WorkerSpec
from flame.spec.records import JobState, TaskState
from flame.store import Store

Control = Callable[..., AbstractAsyncContextManager[Any]]


async def test_running_workers_are_adopted_and_the_job_goes_on(control: Control, world: Any) -> None:
    async with control() as bench:
        job = await bench.job()
        tasks = await bench.run(job.id)
        await bench.flamelet(tasks[0]).say("round", round=1, metrics={"loss": 1.0}, seconds=0.1)
        await bench.flamelet(tasks[1]).say("join", channel="param", group="default", member={"end": tasks[1].id})
    started = list(world.started)
    async with control() as bench:
        assert world.started == started, "nobody was restarted"
        found = await bench.controller.job(job.id)
        assert found.state is JobState.RUNNING
        assert [r.round for r in found.rounds] == [1]
        aggregator = bench.flamelet(tasks[0])
        await aggregator.connect()
        assert await aggregator.say("round", seq=2, round=1, metrics={"loss": 1.0}, seconds=0.1) == 2, "heard before"
        await aggregator.say("round", seq=3, round=2, metrics={"loss": 0.5}, seconds=0.1)
        await aggregator.say("join", channel="param", group="default", member={"end": tasks[0].id})
        peers = (await aggregator.orders("peers"))[0].data["joined"]
        assert [member["end"] for member in peers] == [tasks[1].id], "members are remembered"
        for task in tasks:
            await bench.flamelet(task).complete()
        await bench.state(job.id, JobState.COMPLETED)
        await bench.until(lambda: not bench.controller.active())
        assert [r.round for r in (await bench.controller.job(job.id)).rounds] == [1, 2]
        assert len(await bench.events(job.id, "round")) == 2


async def test_a_worker_that_died_while_the_server_was_away_fails_its_task(control: Control, world: Any) -> None:
    async with control() as bench:
        job = await bench.job()
        tasks = await bench.run(job.id)
    world.exit(tasks[1].id, 1)
    async with control() as bench:
        job = await bench.state(job.id, JobState.FAILED)
        assert job.failure.message == "Its worker ended while the server was down."
        assert job.failure.task == tasks[1].id


async def test_a_worker_that_dies_while_the_server_takes_up_its_job_is_not_missed(control: Control, world: Any) -> None:
    async with control() as bench:
        job = await bench.job()
        tasks = await bench.run(job.id)
    world.on_list = lambda: world.exit(tasks[1].id, 1, code=None, signal="SIGKILL")
    async with control() as bench:
        job = await bench.state(job.id, JobState.FAILED)
        assert job.failure.signal == "SIGKILL"


async def test_a_worker_that_was_never_started_is_started_under_a_new_attempt(control: Control, world: Any) -> None:
    async with control() as bench:
        job = await bench.job()
        tasks = await bench.deployed(job.id)
    world.workers.pop(f"{tasks[2].id}.1")
    async with control() as bench:
        await bench.until(lambda: f"{tasks[2].id}.2" in world.workers)
        assert world.started.count(f"{tasks[0].id}.1") == 1
        tasks = await bench.run(job.id)
        assert [task.attempt for task in tasks] == [1, 1, 2]


async def test_workers_that_nobody_owns_are_ended(control: Control, world: Any) -> None:
    world.workers["stray.1"] = WorkerInfo("stray", "nobody", 1, "pid-99")
    async with control() as bench:
        await bench.until(lambda: world.ended == ["stray.1"])


async def test_an_older_attempt_that_is_still_there_is_ended(control: Control, world: Any) -> None:
    async with control() as bench:
        job = await bench.job()
        tasks = await bench.deployed(job.id)
        info = world.workers[f"{tasks[1].id}.1"]
        bench.world.exit(tasks[1].id, 1, code=1)
        await bench.until(lambda: f"{tasks[1].id}.2" in world.workers)
        tasks = await bench.run(job.id)
    world.workers[f"{tasks[1].id}.1"] = info
    async with control() as bench:
        await bench.until(lambda: f"{tasks[1].id}.1" in world.ended)
        assert (await bench.controller.job(job.id)).state is JobState.RUNNING
        assert f"{tasks[1].id}.2" in world.workers


async def test_what_earlier_attempts_have_left_is_removed_whichever_server_saw_them_end(
    control: Control, world: Any
) -> None:
    async with control() as bench:
        job = await bench.job(restart={"attempts": 1})
        tasks = await bench.run(job.id)
        world.exit(tasks[1].id, 1, code=None, signal="SIGKILL")
        await bench.until(lambda: f"{tasks[1].id}.2" in world.workers)
    assert world.cleaned == [], "somebody may want to look at it while the job is under way"
    async with control() as bench:
        for task in await bench.run(job.id):
            await bench.flamelet(task).complete()
        await bench.state(job.id, JobState.COMPLETED)
        await bench.until(lambda: not bench.controller.active())
        await bench.controller.context.background.drain()
        assert sorted(world.cleaned) == sorted(
            f"{task.id}.{number}"
            for task in await bench.controller.tasks(job.id)
            for number in range(1, task.attempt + 1)
        )
        assert len(world.cleaned) == 4


async def test_a_queued_job_stays_queued_and_a_stopping_one_goes_on_stopping(control: Control, world: Any) -> None:
    async with control(slots=3) as bench:
        first = await bench.job()
        await bench.run(first.id)
        second = await bench.job()
        world.stubborn = 3
        await bench.controller.stop_job(first.id)
        assert (await bench.controller.job(first.id)).state is JobState.STOPPING
    assert len(world.workers) == 3
    world.stubborn = 0
    async with control(slots=3) as bench:
        await bench.state(first.id, JobState.TERMINATED)
        assert len(await bench.deployed(second.id)) == 3


async def test_the_time_limit_counts_on_over_a_restart(control: Control) -> None:
    async with control() as bench:
        job = await bench.job(max_run_time=0.3)
        await bench.run(job.id)
        since = (await bench.controller.job(job.id)).running_at
    async with control() as bench:
        job = await bench.state(job.id, JobState.FAILED)
        assert job.running_at == since
        assert "maxRunTime" in job.failure.message


async def test_a_failing_store_changes_nothing_and_is_tried_again(control: Control) -> None:
    async with control(wrap=Mortal) as bench:
        job = await bench.job()
        tasks = await bench.run(job.id)
        bench.store.failing = True
        with pytest.raises(StoreError):
            await bench.controller.stop_job(job.id)
        assert (await bench.controller.job(job.id)).state is JobState.RUNNING
        with pytest.raises(StoreError):
            await bench.flamelet(tasks[0]).say("round", round=1, metrics={}, seconds=0.1)
        refused = bench.store.refused
        bench.world.exit(tasks[1].id, 1, code=9)
        await bench.until(lambda: bench.store.refused > refused)
        bench.store.failing = False
        job = await bench.state(job.id, JobState.FAILED)
        assert job.failure.exit_code == 9
        assert job.rounds == []


class Mortal:
    """A store whose server is killed at a certain write: before it reaches the database, or right after it."""

    WRITES = ("insert", "replace", "delete", "append", "drop")

    def __init__(self, store: Store, *, after: bool = False) -> None:
        self._store = store
        self._at = -1
        self._after = after
        self.writes = 0
        self.failing = False
        self.refused = 0
        self.killed = asyncio.Event()

    def count(self, at: int) -> None:
        """Count from now on: the write at which to die; 0 for none."""
        self.writes, self._at = 0, at or -1

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return partial(self._write, method) if name in self.WRITES else method

    async def _write(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failing:
            self.refused += 1
            raise StoreError("The disk is full.")
        self.writes += 1
        if self.killed.is_set() or (self.writes == self._at and not self._after):
            await self._die()
        result = await method(*args, **kwargs)
        if self.killed.is_set() or self.writes == self._at:
            await self._die()
        return result

    async def _die(self) -> None:
        self.killed.set()
        await asyncio.get_running_loop().create_future()  # nothing ever comes back from a killed process


class Play:
    """Workers that do their job, whichever server is there."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.bench: Any = None
        self.there = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        world.on_start = lambda spec: self.tasks.append(asyncio.create_task(self.work(spec)))

    async def work(self, spec: WorkerSpec) -> None:
        """A worker from its first call to its exit. It repeats what was not answered."""
        said: Sequence[tuple[str, dict[str, Any]]] = [
            ("state", {"state": "running"}),
            ("join", {"channel": "param", "group": "default", "member": {"end": spec.task}}),
            ("metrics", {"round": 1, "metrics": {"loss": 1.0}}),
            ("round", {"round": 1, "metrics": {}, "seconds": 0.1, "group": spec.task}),
            ("warning", {"message": f"Worker {spec.task} is tired."}),
            ("state", {"state": "completed", "exitCode": 0}),
        ]
        try:
            await self.insist(lambda flamelet: flamelet.orders("start"), spec)
            for seq, (kind, data) in enumerate(said, 1):
                await self.insist(lambda flamelet, seq=seq, kind=kind, data=data: flamelet.say(kind, seq, **data), spec)
        except FlameError:
            pass  # refused for good: the attempt is over
        self.world.exit(spec.task, spec.attempt)

    async def insist(self, call: Callable[[Any], Any], spec: WorkerSpec) -> None:
        while True:
            await self.there.wait()
            bench = self.bench
            flamelet = type(bench).flamelet(bench, _Named(spec.task, spec.attempt))
            calling = asyncio.ensure_future(call(flamelet))
            dying = asyncio.ensure_future(bench.store.killed.wait())
            await asyncio.wait([calling, dying], return_when=asyncio.FIRST_COMPLETED)
            dying.cancel()
            if calling.done():
                return calling.result()
            calling.cancel()


class _Named:
    def __init__(self, id: str, attempt: int) -> None:
        self.id = id
        self.attempt = attempt


async def play(control: Control, world: Any, at: int, *, after: bool) -> int:
    """Run a job to its end, with the server killed at a write and started again; gives the number of writes."""
    play = Play(world)
    job = None
    stores: list[Mortal] = []

    def wrap(store: Store) -> Any:
        stores.append(Mortal(store, after=after))
        return stores[-1]

    for life in range(2):
        async with control(wrap=wrap) as bench:
            stores[-1].count(at if life == 0 else 0)
            play.bench = bench
            play.there.set()

            async def use(bench: Any = bench) -> None:
                nonlocal job
                if job is None:  # the user tries again what was not answered
                    found = await bench.controller.jobs()
                    job = found[0].id if found else (await bench.job(start=False)).id
                if (await bench.controller.job(job)).state is JobState.READY:
                    await bench.controller.start_job(job)
                await bench.state(job, JobState.COMPLETED, JobState.FAILED, JobState.TERMINATED)
                await bench.until(lambda: not bench.controller.active())
                await bench.controller.context.background.drain()

            using = asyncio.create_task(use())
            dying = asyncio.create_task(stores[-1].killed.wait())
            async with asyncio.timeout(20):
                await asyncio.wait([using, dying], return_when=asyncio.FIRST_COMPLETED)
            dying.cancel()
            if not stores[-1].killed.is_set():
                await using
                await check(bench, job)
                break
            using.cancel()
            play.there.clear()
            await asyncio.wait([using])
    else:
        raise AssertionError("it was killed only once")
    for task in play.tasks:
        await task
    return stores[0].writes


async def check(bench: Any, id: str) -> None:
    job = await bench.controller.job(id)
    assert job.state is JobState.COMPLETED, job.failure
    assert len(job.rounds) == 3, "each worker reported one round, and none is lost or doubled"
    events = await bench.events(id)
    assert len([event for event in events if event.type == "round"]) == 3
    assert len([event for event in events if event.type == "metrics"]) == 3
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    ended = [event for event in events if event.type == "job" and JobState(event.data["state"]).ended]
    assert events[-1] is ended[0]
    assert {task.state for task in await bench.controller.tasks(id)} == {TaskState.COMPLETED}
    assert sorted(job.warnings) == sorted(f"Worker {task.id} is tired." for task in await bench.controller.tasks(id))
    assert not bench.world.workers
    attempts = [(task.id, number) for task in await bench.controller.tasks(id) for number in range(1, task.attempt + 1)]
    for collection in ("members", "endings"):
        assert await bench.store.find(collection) == [], "it was tidied up"
    assert [await bench.store.read(f"task/{task}.{number}") for task, number in attempts] == [[]] * len(attempts)
    assert {f"{task}.{number}" for task, number in attempts} <= set(bench.world.cleaned)


async def test_a_kill_at_any_write_loses_nothing_and_doubles_nothing(
    control: Control, world: Any, tmp_path: Any
) -> None:
    writes = await play(control, world, 0, after=False)
    assert writes > 30
    for at in range(1, writes + 1):
        for name in ("flame.db", "flame.db-wal", "flame.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        type(world).__init__(world)
        await play(control, world, at, after=at % 2 == 0)
