"""Jobs on several computes, of which some are away at times."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from flame.controller import computes
from flame.controller.computes import Place
from flame.errors import Conflict, NotFound, RunnerError, SpecError
from flame.runners import Capacity, WorkerExit, WorkerInfo, WorkerSpec
from flame.spec.nouns import Compute, Dataset, Placement, Resources
from flame.spec.records import Job, JobState, TaskState

Control = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computes, "AGAIN", 0.01)
    monkeypatch.setattr(computes, "LOOK", 0.05)


@pytest.fixture
async def far(bench: Any) -> Any:
    """Another compute beside the local one, in default/us."""
    await bench.controller.register.create(
        Compute(name="far", kind="local", region="us", server="http://10.0.0.1:10100/")
    )
    return bench.world.other("far")


def datasets(*realms: str) -> list[Dataset]:
    return [
        Dataset(id=f"d{at}", name=f"site {at}", url=f"file:///site{at}", realm=realm) for at, realm in enumerate(realms)
    ]


async def complete(bench: Any, job: Job, *worlds: Any) -> Job:
    """Play the workers of a job, on whatever machine each is."""
    await bench.state(job.id, JobState.DEPLOYING, JobState.RUNNING)
    for task in sorted(await bench.controller.tasks(job.id), key=lambda task: task.role != "trainer"):
        # The aggregator last: what it leaves is done.
        await bench.until(lambda name=f"{task.id}.{task.attempt}": any(name in world.workers for world in worlds))
        flamelet = bench.flamelet(task)
        if task.state is TaskState.DEPLOYING:
            await flamelet.connect()
            await flamelet.say("state", state="running")
        await flamelet.say("state", state="completed", exitCode=0)
        for world in worlds:
            world.exit(task.id, task.attempt)
    return await bench.state(job.id, JobState.COMPLETED)


async def test_data_go_to_their_realm_and_others_stay_with_them(bench: Any, far: Any) -> None:
    asked: list[WorkerSpec] = []
    far.on_start = bench.world.on_start = asked.append
    job = await bench.job(trainers=2, datasets=datasets("us", "default/us/west"))
    await bench.state(job.id, JobState.DEPLOYING)
    await bench.until(lambda: len(far.workers) == 3)
    assert bench.world.started == []
    assert {task.compute for task in await bench.controller.tasks(job.id)} == {"far"}
    assert {spec.environment["FLAME_SERVER"] for spec in asked} == {"http://10.0.0.1:10100"}
    assert bench.controller.computes.site("far").used.workers == 3
    await complete(bench, job, far)
    assert bench.controller.computes.site("far").used.workers == 0
    await bench.controller.context.background.drain()
    assert sorted(far.cleaned) == sorted(f"{spec.task}.1" for spec in asked)


async def test_a_job_says_where_a_role_runs_with_what_and_from_which_image(bench: Any, far: Any) -> None:
    asked: dict[str, list[WorkerSpec]] = {"far": [], "local": []}
    far.on_start, bench.world.on_start = asked["far"].append, asked["local"].append
    resources = Resources(cpu=0.5, memory="64Mi")
    placement = {"aggregator": Placement(realm="far", image="flame:2"), "trainer": Placement(resources=resources)}
    job = await bench.job(trainers=1, placement=placement, datasets=datasets("local"))
    await bench.state(job.id, JobState.DEPLOYING)
    await bench.until(lambda: bool(asked["far"] and asked["local"]))
    assert asked["far"][0].image == "flame:2"
    assert asked["local"][0].resources == resources
    assert bench.controller.computes.site("local").used == (1, 0.5, 64 << 20, 0)


async def test_what_could_never_fit_is_refused_and_what_does_not_fit_now_waits_and_says_why(bench: Any) -> None:
    bench.world.capacity = Capacity(cpu=2.0, memory=1 << 30, gpu=0)
    await bench.until(lambda: bench.controller.computes.site("local").capacity.cpu == 2.0)
    big = {"trainer": Placement(resources=Resources(memory="600Mi"))}
    first = await bench.job(trainers=1, placement=big)
    second = await bench.job(trainers=1, placement=big)
    await bench.until(lambda: bench.controller._active[second.id].job.reason is not None)
    assert (await bench.controller.job(second.id)).reason == (
        "It waits for room: a trainer needs 600Mi of memory beside the job's other workers, "
        "and compute 'local' has 424Mi of 1Gi free."
    )
    for resources, says in ((Resources(gpu=1), "1 GPUs"), (Resources(memory="2Gi"), "2Gi of memory")):
        with pytest.raises(SpecError, match=f"the job could never start: a trainer needs {says}"):
            await bench.job(trainers=1, placement={"trainer": Placement(resources=resources)})
    await complete(bench, first, bench.world)
    await complete(bench, second, bench.world)


async def test_a_drained_compute_gets_no_new_workers_and_those_that_are_there_go_on(bench: Any, far: Any) -> None:
    there = await bench.job(trainers=1, datasets=datasets("far"))
    await bench.state(there.id, JobState.DEPLOYING)
    assert (await bench.controller.register.drain("far")).state == "drained"
    waits = await bench.job(trainers=1, datasets=datasets("us"))
    other = await bench.job(trainers=1)
    await complete(bench, other, bench.world)
    found = await bench.controller.job(waits.id)
    assert found.state is JobState.STARTING
    assert found.reason == "It waits for a compute that can take a trainer: compute 'far' is drained."
    await complete(bench, there, far, bench.world)
    assert (await bench.controller.register.drain("far", drained=False)).state == "ready"
    await complete(bench, waits, far, bench.world)


async def test_a_compute_with_workers_is_neither_deleted_nor_made_another(bench: Any, far: Any) -> None:
    job = await bench.job(trainers=1, datasets=datasets("far"))
    await bench.state(job.id, JobState.DEPLOYING)
    with pytest.raises(Conflict, match="Compute 'far' has 2 workers; drain it"):
        await bench.controller.register.delete("far")
    with pytest.raises(Conflict, match="has 2 workers, so its kind and configuration cannot change"):
        await bench.controller.register.update("far", Compute(name="far", kind="local", config={"slots": 3}))
    changed = await bench.controller.register.update("far", Compute(name="far", kind="local", slots=7, region="us"))
    assert changed.capacity.slots == 7
    await complete(bench, job, far)
    moved = await bench.controller.register.update("far", Compute(name="far", kind="local", config={"slots": 3}))
    assert moved.state == "ready"
    await bench.controller.register.delete("far")
    with pytest.raises(NotFound):
        bench.controller.register.get("far")


async def test_a_compute_out_of_reach_is_kept_told_of_and_tried_again(bench: Any) -> None:
    world = bench.world.other("off")
    world.down = "The engine does not answer."
    made = await bench.controller.register.create(Compute(name="off", kind="local", region="eu"))
    assert (made.state, made.problem) == ("unreachable", "The engine does not answer.")
    held = await bench.job(trainers=1, datasets=datasets("eu"))
    other = await bench.job(trainers=1)
    await complete(bench, other, bench.world)
    assert (
        "compute 'off' cannot be used now: The engine does not answer." in (await bench.controller.job(held.id)).reason
    )
    world.down = None
    await complete(bench, held, world, bench.world)
    world.down = "It is off again."
    await bench.until(lambda: bench.controller.register.get("off").problem == "It is off again.")
    world.down = None
    await bench.until(lambda: bench.controller.register.get("off").state == "ready")


async def test_a_worker_that_cannot_be_started_on_one_compute_is_started_on_another(bench: Any) -> None:
    for name in ("a", "b"):
        await bench.controller.register.create(Compute(name=name, kind="local", region="us"))
    bench.world.other("a").refuse = "The disk is full."
    job = await bench.job(trainers=1, datasets=datasets("us"))
    await bench.until(lambda: len(bench.world.other("b").workers) == len(bench.world.workers) == 1)
    done = await complete(bench, job, bench.world.other("b"), bench.world)
    tasks = await bench.controller.tasks(job.id)
    assert {(task.attempt, task.compute) for task in tasks} == {(2, "b"), (2, "local")}
    assert done.failure is None


@contextlib.asynccontextmanager
async def restarted(control: Control, world: Any, realm: str = "far") -> AsyncIterator[tuple[Any, Job, Any]]:
    """A server that starts again while a compute with running workers is out of reach."""
    async with control() as bench:
        await bench.controller.register.create(Compute(name="far", kind="local", region="us"))
        far = world.other("far")
        placement = {"aggregator": Placement(realm="local")}
        job = await bench.job(trainers=1, datasets=datasets(realm), placement=placement)
        await bench.state(job.id, JobState.DEPLOYING)
        for task in await bench.controller.tasks(job.id):
            await bench.until(lambda name=f"{task.id}.1": name in {**world.workers, **far.workers})
            flamelet = bench.flamelet(task)
            await flamelet.connect()
            await flamelet.say("state", state="running")
    far.down = "The network is cut."
    async with control(lease=5.0) as bench:
        yield bench, job, far


async def test_a_compute_out_of_reach_at_the_start_loses_no_workers_and_holds_nobody_up(
    control: Control, world: Any
) -> None:
    async with restarted(control, world) as (bench, job, far):
        assert bench.controller.register.get("far").state == "unreachable"
        assert bench.controller.register.get("far").used.slots == 1, "its workers are taken to be there"
        other = await bench.job(trainers=1)
        await complete(bench, other, world)
        assert far.ended == []
        far.down = None
        await bench.until(lambda: bench.controller.register.get("far").state == "ready")
        ended = await complete(bench, job, world, far)
        assert [task.attempt for task in await bench.controller.tasks(job.id)] == [1, 1]
        assert ended.failure is None
        assert far.started == [f"{(await bench.controller.tasks(job.id))[1].id}.1"]


async def test_a_worker_may_say_that_it_is_there_before_its_compute_does(control: Control, world: Any) -> None:
    async with restarted(control, world) as (bench, job, far):
        ended = await complete(bench, job, world, far)
        assert ended.failure is None
        assert bench.controller.register.get("far").state == "unreachable"


async def test_a_worker_that_ended_while_its_compute_was_away_is_missed_when_it_is_back(
    control: Control, world: Any
) -> None:
    async with restarted(control, world) as (bench, job, far):
        trainer = (await bench.controller.tasks(job.id))[1]
        far.workers.clear()
        far.down = None
        ended = await bench.state(job.id, JobState.FAILED)
        assert ended.failure.task == trainer.id
        assert ended.failure.message == "Its worker had ended when compute 'far' could be reached again."


async def test_a_job_that_is_stopped_ends_once_its_workers_out_of_reach_are_gone(control: Control, world: Any) -> None:
    async with restarted(control, world) as (bench, job, far):
        await bench.controller.stop_job(job.id)
        await bench.until(lambda: not world.workers)
        assert (await bench.controller.job(job.id)).state is JobState.STOPPING
        far.down = None
        await bench.state(job.id, JobState.TERMINATED)
        assert far.workers == {}


async def test_workers_of_nobody_are_ended_also_when_their_compute_comes_late(control: Control, world: Any) -> None:
    async with restarted(control, world) as (bench, job, far):
        far.workers["stray.1"] = WorkerInfo("stray", "nobody", 1, "pid-x")
        old = (await bench.controller.tasks(job.id))[1]
        far.workers[f"{old.id}.7"] = WorkerInfo(old.id, job.id, 7, "pid-y")
        far.down = None
        await bench.until(lambda: set(far.ended) == {"stray.1", f"{old.id}.7"})
        await complete(bench, job, world, far)


class Sessions:
    """Another tenant, as the sessions are one."""

    def __init__(self) -> None:
        self.freed_ = asyncio.Event()
        self.gone: list[str] = []

    def owns(self, worker: WorkerInfo) -> bool:
        return worker.job.startswith("session")

    def exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        self.gone.append(worker.task)

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        raise AssertionError("it was never away")

    def freed(self) -> None:
        self.freed_.set()


async def test_sessions_take_room_of_the_same_computes_but_not_what_a_job_waits_for(control: Control) -> None:
    async with control(slots=4) as bench:
        sessions = Sessions()
        bench.controller.computes.add_tenant(sessions)
        there = bench.controller.computes
        assert there.take("s1", Resources()) == Place("local")
        assert there.take("s2", Resources(), ["us"]) == Place("local")
        runner = there.runner("local")
        worker = await runner.start(WorkerSpec("executor", "session1", 1, {}, module="flame.sessions.executor"))
        job = await bench.job(trainers=2)
        await bench.until(lambda: bench.controller._active[job.id].job.reason is not None)
        assert "it needs 3 workers, and 2 of 4 slots are free" in (await bench.controller.job(job.id)).reason
        refused = there.take("s3", Resources(), label="executor")
        assert refused == Place(None, "It waits for room: others are ahead of it in the queue.")
        sessions.freed_.clear()
        bench.world.exit("executor", 1)
        assert sessions.gone == ["executor"]
        assert worker.job == "session1"
        there.give("s1")
        await complete(bench, job, bench.world)
        await asyncio.wait_for(sessions.freed_.wait(), 5)
        assert there.take("s3", Resources()) == Place("local")
        there.give("s2")
        there.give("s3")
        assert there.used == 0
        with pytest.raises(RunnerError, match="no compute 'x' any more"):
            there.runner("x")
