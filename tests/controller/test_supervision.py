"""What the controller does with jobs whose workers are played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from flame.errors import Conflict, Forbidden, NotFound, SpecError, Unauthorized
from flame.spec.records import JobState, TaskState

Control = Callable[..., AbstractAsyncContextManager[Any]]


async def test_a_job_goes_from_ready_to_completed_and_keeps_its_rounds(bench: Any) -> None:
    job = await bench.job(start=False)
    assert job.state is JobState.READY
    assert {task.state for task in await bench.controller.tasks(job.id)} == {TaskState.READY}
    await bench.controller.start_job(job.id)
    tasks = await bench.run(job.id)
    assert {task.worker for task in tasks} == {"pid-0", "pid-1", "pid-2"}
    for number in (1, 2):
        await bench.flamelet(tasks[0]).say("round", round=number, metrics={"loss": 1 / number}, seconds=0.5)
    model = {"name": "digits", "path": "/models/model.safetensors", "registry": "local"}
    await bench.flamelet(tasks[0]).say("model", **model)
    assert [r.round for r in (await bench.controller.job(job.id)).rounds] == [1, 2]
    for task in tasks:
        await bench.flamelet(task).complete()
    job = await bench.state(job.id, JobState.COMPLETED)
    await bench.until(lambda: not bench.controller.active())
    job = await bench.controller.job(job.id)
    assert [r.metrics for r in job.rounds] == [{"loss": 1.0}, {"loss": 0.5}]
    assert job.model.path == model["path"]
    assert job.started_at <= job.running_at <= job.ended_at
    states = [event.data["state"] for event in await bench.events(job.id, "job")]
    assert states == ["starting", "deploying", "running", "completed"]
    assert not bench.world.ended, "nobody had to be ended"
    await bench.until(lambda: len(bench.world.cleaned) == 3)


async def test_a_failed_task_fails_the_job_with_its_cause_and_the_end_of_its_log(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    trainer = tasks[1]
    log = b"".join(b"line %d\n" % i for i in range(100))
    await bench.controller.context.logs.append(job.id, trainer.id, 1, 0, log)
    await bench.flamelet(trainer).say("state", state="failed", exitCode=3, message="It was thrown.")
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.message == "It was thrown."
    assert (job.failure.task, job.failure.role, job.failure.attempt) == (trainer.id, "trainer", 1)
    assert job.failure.exit_code == 3
    assert job.failure.log[-1] == "line 99"
    assert not bench.world.workers, "every other worker was ended"
    assert (await bench.controller.task(trainer.id)).failure.exit_code == 3


async def test_what_failed_beside_the_cause_is_named_in_the_warnings(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    await asyncio.gather(
        bench.flamelet(tasks[0]).say("state", state="failed", message="Its peer has left."),
        bench.flamelet(tasks[1]).say("state", state="failed", message="It ran out of paper."),
    )
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.message == "Its peer has left."
    assert job.warnings == [f"Task {tasks[1].id} (trainer) failed too: It ran out of paper."]


async def test_a_worker_that_dies_fails_its_task_with_the_signal(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    bench.world.exit(tasks[2].id, 1, code=None, signal="SIGKILL")
    job = await bench.state(job.id, JobState.FAILED)
    assert "killed by SIGKILL" in job.failure.message
    assert job.failure.signal == "SIGKILL"


async def test_a_worker_that_dies_before_it_ran_is_replaced_once_and_its_last_words_are_kept(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.deployed(job.id)
    bench.world.exit(tasks[1].id, 1, code=1)
    await bench.until(lambda: f"{tasks[1].id}.2" in bench.world.workers)
    assert (await bench.controller.task(tasks[1].id)).attempt == 2
    with pytest.raises(Forbidden, match=r"Attempt 1 of task .* is over: the newest is 2"):
        await bench.flamelet(tasks[1]).say("state", state="running")
    bench.world.exit(tasks[1].id, 2, code=1)
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.attempt == 2
    assert job.failure.log == ["flamelet: cannot import"]


async def test_a_worker_that_cannot_be_started_fails_the_job_with_the_cause(bench: Any) -> None:
    bench.world.refuse = "there is no python"
    job = await bench.job()
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.message == "Its worker could not be started: there is no python"


async def test_a_job_goes_on_without_a_trainer_that_its_policy_can_spare(bench: Any) -> None:
    job = await bench.job(trainers=3, policy={"minTrainers": 2})
    tasks = await bench.run(job.id)
    bench.world.exit(tasks[1].id, 1, code=1)
    await bench.until(lambda: bench.controller.active()[0].warnings)
    assert "the job goes on without it" in (await bench.controller.job(job.id)).warnings[0]
    for task in (tasks[0], tasks[2], tasks[3]):
        await bench.flamelet(task).complete()
    assert (await bench.state(job.id, JobState.COMPLETED)).failure is None


async def test_a_silent_worker_is_lost_with_its_lease(control: Control) -> None:
    async with control(lease=0.2) as bench:
        job = await bench.job()
        tasks = await bench.run(job.id)

        async def renew() -> None:
            while True:
                for task in tasks[:2]:
                    bench.controller.door.enter(task.id, 1, bench.controller.context.keys.task(task.id, 1))
                await asyncio.sleep(0.02)

        renewing = asyncio.create_task(renew())
        job = await bench.state(job.id, JobState.STOPPING)
        renewing.cancel()
        assert job.failure.task == tasks[2].id
        assert "Nothing has been heard of its worker" in job.failure.message
        await bench.state(job.id, JobState.FAILED)
        assert f"{tasks[2].id}.1" in bench.world.ended, "it may be alive: it is ended"


async def test_a_worker_that_never_connects_is_replaced(control: Control) -> None:
    async with control(lease=0.2, deploy=0.2) as bench:
        job = await bench.job()
        tasks = await bench.deployed(job.id)
        await bench.until(lambda: f"{tasks[0].id}.2" in bench.world.workers)
        assert f"{tasks[0].id}.1" in bench.world.ended


async def test_stopping_tells_and_ends_every_worker(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    listening = asyncio.create_task(bench.flamelet(tasks[0]).orders("stop"))
    await asyncio.sleep(0)
    job = await bench.controller.stop_job(job.id)
    assert job.state is JobState.STOPPING
    assert (await listening)[0].data == {"reason": "the job was stopped"}
    await bench.state(job.id, JobState.TERMINATED)
    assert not bench.world.workers
    assert {task.state for task in await bench.controller.tasks(job.id)} == {TaskState.TERMINATED}


async def test_a_worker_that_cannot_be_ended_keeps_the_job_stopping_until_it_is(bench: Any) -> None:
    job = await bench.job()
    await bench.run(job.id)
    bench.world.stubborn = 1
    await bench.controller.stop_job(job.id)
    await bench.state(job.id, JobState.TERMINATED)
    assert not bench.world.workers


async def test_a_job_that_runs_too_long_is_ended(bench: Any) -> None:
    job = await bench.job(max_run_time=0.1)
    await bench.run(job.id)
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.message == "The job ran longer than its maxRunTime of 0.1 s."
    assert not bench.world.workers


async def test_ending_a_task_fails_it_and_the_job(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    await bench.controller.end_task(tasks[1].id)
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.message == "Its worker was ended on request."
    with pytest.raises(Conflict, match="no worker to end: it is failed"):
        await bench.until(lambda: not bench.controller.active())
        await bench.controller.end_task(tasks[1].id)


async def test_requests_that_the_state_forbids_are_refused(bench: Any, make_form: Any) -> None:
    job = await bench.job(start=False)
    with pytest.raises(Conflict, match="is ready: it has not been started"):
        await bench.controller.stop_job(job.id)
    await bench.controller.start_job(job.id)
    with pytest.raises(Conflict, match="has been started already"):
        await bench.controller.start_job(job.id)
    with pytest.raises(Conflict, match="only a ready one can be changed"):
        await bench.controller.update_job(job.id, make_form(bench.code))
    with pytest.raises(Conflict, match="stop it before you delete it"):
        await bench.controller.delete_job(job.id)
    await bench.controller.stop_job(job.id)
    await bench.state(job.id, JobState.TERMINATED)
    for request in (bench.controller.start_job, bench.controller.stop_job):
        with pytest.raises(Conflict, match="has ended"):
            await request(job.id)
    with pytest.raises(NotFound):
        await bench.controller.start_job("0" * 24)


async def test_reports_that_were_heard_before_count_once(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    flamelet = bench.flamelet(tasks[0])
    assert await flamelet.say("round", seq=2, round=1, metrics={}, seconds=0.1) == 2
    assert await flamelet.say("round", seq=2, round=1, metrics={}, seconds=0.1) == 2
    assert await flamelet.say("round", seq=1, round=1, metrics={}, seconds=0.1) == 2
    assert len(await bench.events(job.id, "round")) == 1
    with pytest.raises(SpecError, match=r"report 3 \(round\)"):
        await flamelet.say("round", seq=3, round="one")
    assert await flamelet.say("something newer", seq=3, what=1) == 3
    await flamelet.say("metrics", round=1, metrics={"loss": 0.5, "nan": None, "count": 3})
    (event,) = await bench.events(job.id, "metrics")
    assert event.data["metrics"] == {"loss": 0.5, "count": 3.0}
    assert event.data["role"] == "aggregator"


async def test_a_key_opens_one_attempt_of_one_task(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    keys, enter = bench.controller.context.keys, bench.controller.door.enter
    for key in (None, "", "ö", keys.task(tasks[0].id, 2), keys.task(tasks[1].id, 1), keys.job(job.id)):
        with pytest.raises(Unauthorized):
            enter(tasks[0].id, 1, key)
    with pytest.raises(Forbidden):
        enter(tasks[0].id, 2, keys.task(tasks[0].id, 2))
    assert enter(tasks[0].id, 1, keys.task(tasks[0].id, 1))


async def test_what_a_worker_waits_for_is_shown_until_it_does_not(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    flamelet = bench.flamelet(tasks[0])
    await flamelet.say("waiting", message="It waits for 2 trainers.")
    assert (await bench.controller.task(tasks[0].id)).reason == "It waits for 2 trainers."
    await flamelet.say("waiting", message="")
    assert (await bench.controller.task(tasks[0].id)).reason is None


async def test_a_warning_is_kept_once(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    for _ in range(3):
        await bench.flamelet(tasks[0]).say("warning", message="The registry is down.")
    assert (await bench.controller.job(job.id)).warnings == ["The registry is down."]


async def test_the_manifest_has_the_servers_own_choices(control: Control) -> None:
    from flame.spec.nouns import Broker, Registry

    choices = {"registry": Registry(sort="mlflow", uri="http://m"), "brokers": (Broker(sort="mqtt", host="b:1883"),)}
    async with control(**choices) as bench:
        job = await bench.job()
        tasks = await bench.deployed(job.id)
        manifest = await bench.controller.door.manifest(bench.flamelet(tasks[0]).supervisor, tasks[0].id, 1)
        assert manifest.config.registry == Registry(sort="mlflow", uri="http://m")
        assert manifest.config.brokers == [Broker(sort="mqtt", host="b:1883")]
        assert manifest.code == bench.code
        assert manifest.job_key == bench.controller.context.keys.job(job.id)
        own = await bench.job(
            registry=Registry(sort="mlflow", uri="http://mlflow"), brokers=[Broker(sort="mqtt", host="x")]
        )
        tasks = await bench.deployed(own.id)
        manifest = await bench.controller.door.manifest(bench.flamelet(tasks[0]).supervisor, tasks[0].id, 1)
        assert manifest.config.registry == Registry(sort="mlflow", uri="http://mlflow")
        assert manifest.config.brokers == [Broker(sort="mqtt", host="x")]
        files = await bench.job(registry=Registry(sort="local"))
        tasks = await bench.deployed(files.id)
        manifest = await bench.controller.door.manifest(bench.flamelet(tasks[0]).supervisor, tasks[0].id, 1)
        assert manifest.config.registry.uri == str(bench.folder / "registry"), "it must outlive the worker's own folder"


async def test_peers_hear_of_each_other_once_and_of_those_who_leave(bench: Any) -> None:
    job = await bench.job()
    aggregator, one, two = await bench.run(job.id)
    for task in (one, aggregator, two):
        data = {"channel": "param", "group": "default", "member": {"end": task.id, "address": f"tcp://{task.index}"}}
        await bench.flamelet(task).say("join", **data)
        await bench.flamelet(task).say("join", **data)
    events = await bench.flamelet(aggregator).orders("peers", 2)
    assert [[member["end"] for member in event.data["joined"]] for event in events] == [[one.id], [two.id]]
    assert events[0].data["joined"][0] == {
        "end": one.id,
        "role": "trainer",
        "attempt": 1,
        "address": f"tcp://{one.index}",
    }
    news = await bench.flamelet(one).orders("peers", 2)
    assert [[member["end"] for member in event.data["joined"]] for event in news] == [[], [aggregator.id]]
    await bench.flamelet(two).say("leave", channel="param", group="default")
    assert (await bench.flamelet(aggregator).orders("peers", 3))[2].data["left"] == [two.id]
    with pytest.raises(SpecError, match="has no part in a channel 'other'"):
        await bench.flamelet(two).say("join", channel="other", group="default", member={})
    await bench.controller.stop_job(job.id)
    await bench.state(job.id, JobState.TERMINATED)
    await bench.controller.context.background.drain()
    assert not await bench.store.find("members")


async def test_peers_hear_of_a_worker_that_was_lost(bench: Any) -> None:
    job = await bench.job(trainers=3, policy={"minTrainers": 2})
    tasks = await bench.run(job.id)
    for task in tasks[:2]:
        await bench.flamelet(task).say("join", channel="param", group="default", member={"end": task.id})
    bench.world.exit(tasks[1].id, 1, code=1)
    events = await bench.flamelet(tasks[0]).orders("peers", 3)
    assert events[2].data["left"] == [tasks[1].id]


async def test_jobs_wait_for_room_in_the_order_of_priority(control: Control) -> None:
    async with control(slots=4) as bench:
        first = await bench.job()
        await bench.run(first.id)
        low = await bench.job(priority="low")
        high = await bench.job(priority="60")
        big = await bench.job(trainers=9, priority="low")
        await bench.until(lambda: all(job.reason for job in bench.controller.active()[1:]))
        reasons = {job.id: job.reason for job in bench.controller.active()}
        assert reasons[high.id] == "It waits for room: it needs 3 workers, and 1 of 4 slots are free."
        assert reasons[low.id] == "It waits for room: 1 job is ahead of it in the queue."
        assert reasons[big.id] == "It waits for room: 2 jobs are ahead of it in the queue."
        for job, after in ((first, high), (high, low), (low, big)):
            await bench.controller.stop_job(job.id)
            assert len(await bench.deployed(after.id)) == (10 if after is big else 3)
            assert (await bench.controller.job(after.id)).reason is None


async def test_a_deleted_job_leaves_nothing(bench: Any) -> None:
    job = await bench.job()
    tasks = await bench.run(job.id)
    await bench.flamelet(tasks[0]).say("round", round=1, metrics={}, seconds=0.1)
    await bench.controller.context.logs.append(job.id, tasks[0].id, 1, 0, b"hello\n")
    await bench.controller.stop_job(job.id)
    await bench.state(job.id, JobState.TERMINATED)
    await bench.until(lambda: not bench.controller.active())
    await bench.controller.context.background.drain()
    design = (await bench.controller.job(job.id)).design_id
    await bench.controller.delete_job(job.id)
    for collection in ("jobs", "tasks", "members"):
        assert not await bench.store.find(collection)
    for stream in (f"job/{job.id}", f"rounds/{job.id}", *(f"task/{task.id}.1" for task in tasks)):
        assert not await bench.store.read(stream)
    assert not list((bench.folder / "logs").iterdir())
    assert {f"{task.id}.1" for task in tasks} <= set(bench.world.cleaned)
    assert await bench.store.get_bundle(bench.code), "its design still has the code"
    await bench.controller.catalog.delete_design(design)
    assert not await bench.store.get_bundle(bench.code)


async def test_a_ready_job_can_be_changed(bench: Any, make_form: Any) -> None:
    job = await bench.job(start=False)
    changed = await bench.controller.update_job(job.id, make_form(bench.code, 3, name="more"))
    assert (changed.id, changed.name) == (job.id, "more")
    assert len(await bench.controller.tasks(job.id)) == 4
    await bench.controller.start_job(job.id)
    assert len(await bench.deployed(job.id)) == 4


async def test_nothing_is_written_of_a_job_that_is_refused(bench: Any, make_form: Any) -> None:
    for wrong in (
        {"code": "0" * 64},
        {"data_spec": []},
        {"priority": "urgent"},
        {"design_id": "nobody", "schema": None},
    ):
        with pytest.raises(SpecError):
            await bench.controller.create_job(make_form(bench.code, **wrong))
    for collection in ("jobs", "tasks", "designs", "datasets"):
        assert not await bench.store.find(collection)


async def test_the_same_job_twice_shares_design_and_datasets(bench: Any) -> None:
    one, two = await bench.job(start=False), await bench.job(start=False)
    assert one.id < two.id
    assert one.design_id == two.design_id
    assert len(await bench.store.find("datasets")) == 2
    assert one.form.data_spec == two.form.data_spec
    first = {task.id for task in await bench.controller.tasks(one.id)}
    assert not first & {task.id for task in await bench.controller.tasks(two.id)}


async def test_what_unfinished_jobs_use_is_not_removed(bench: Any) -> None:
    job = await bench.job(start=False)
    dataset = job.form.data_spec[0].dataset_groups["default"][0]
    with pytest.raises(Conflict, match=rf"used by job 'digits' \({job.id}, ready\)"):
        await bench.controller.catalog.delete_design(job.design_id)
    with pytest.raises(Conflict, match="used by job 'digits'"):
        await bench.controller.catalog.delete_dataset(dataset)
    await bench.controller.delete_job(job.id)
    await bench.controller.catalog.delete_design(job.design_id)
    await bench.controller.catalog.delete_dataset(dataset)


async def test_a_registered_design_is_left_alone_by_a_job_of_its_name(bench: Any) -> None:
    mine = await bench.controller.catalog.create_design("digits", "mine")
    job = await bench.job(start=False)
    assert job.design_id != mine.id
    assert (await bench.controller.catalog.design(job.design_id)).name == "digits (2)"
    assert (await bench.controller.catalog.design(mine.id)).code is None
