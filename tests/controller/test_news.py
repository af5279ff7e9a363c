"""What a compute says of workers: what they wait for before they run, and why it takes them away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from waiting import until

from flame.spec.nouns import RestartPolicy
from flame.spec.records import JobState

Control = Callable[..., AbstractAsyncContextManager[Any]]
FULL = "No node takes its pod: 1 Insufficient cpu."


async def reason(bench: Any, task: Any, wanted: str | None) -> None:
    async def so() -> bool:
        return bool((await bench.controller.task(task.id)).reason == wanted)

    await until(so)


async def test_a_worker_that_waits_for_its_compute_is_not_lost_and_says_what_for(control: Control) -> None:
    async with control(lease=0.2, deploy=0.2) as bench:
        crowded, other = await bench.job(), await bench.job()
        waiting = await bench.deployed(crowded.id)
        for task in waiting:
            bench.world.say(task.id, 1, FULL)
        await reason(bench, waiting[0], FULL)
        lost = await bench.deployed(other.id)  # started later, and not heard of either
        await bench.until(lambda: all(f"{task.id}.1" in bench.world.ended for task in lost))
        assert all(f"{task.id}.1" in bench.world.workers for task in waiting)
        waiting = waiting[0]
        bench.world.say(waiting.id, 1, None)  # it runs, and does not connect
        await reason(bench, waiting, None)
        await bench.until(lambda: f"{waiting.id}.1" in bench.world.ended)


async def test_what_is_said_of_its_compute_does_not_take_away_what_the_worker_says_itself(bench: Any) -> None:
    job = await bench.job()
    task, *_ = await bench.deployed(job.id)
    bench.world.say(task.id, 1, FULL)
    await reason(bench, task, FULL)
    await bench.run(job.id)
    await bench.flamelet(task).say("waiting", message="It waits for 2 trainers.")
    bench.world.say(task.id, 1, None)
    await asyncio.sleep(0)
    await reason(bench, task, "It waits for 2 trainers.")


async def test_a_worker_that_its_compute_takes_away_is_lost_and_not_ended_by_its_own_will(bench: Any) -> None:
    job = await bench.job(restart=RestartPolicy(attempts=0))
    tasks = await bench.run(job.id)
    bench.world.say(tasks[1].id, 1, "Its pod was evicted.")
    await bench.flamelet(tasks[1]).say("state", state="terminated", message="Its worker was asked to end.")
    assert (await bench.controller.task(tasks[1].id)).state == "running"
    bench.world.exit(tasks[1].id, 1)
    job = await bench.state(job.id, JobState.FAILED)
    assert job.failure.task == tasks[1].id
    assert "asked to end" not in job.failure.message
