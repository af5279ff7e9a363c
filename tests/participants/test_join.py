"""People who bring their own worker and data: invited, agreed, there, away, back."""

from __future__ import annotations

from typing import Any

import pytest

from flame.spec.records import JobState, TaskState


async def accept(place: Any, job: Any) -> tuple[str, ...]:
    return "--accept-digest", (await place.client.jobs.get(job.id)).code


async def test_a_hybrid_job_trains_with_system_workers_and_participants_one_of_whom_leaves_and_comes_back(
    place: Any,
) -> None:
    job = await place.job(system=2, brought=2, rounds=9, held=(2, 5), min_trainers=3)
    agreed = await accept(place, job)
    invite = await place.client.invites.create(job.id, uses=2)
    job = await place.state(job, JobState.DEPLOYING)
    assert "waits for 1 participant" in job.reason
    assert all(task.attempt == 0 for task in await place.tasks(job)), "nobody is started before"
    stays = place.join(2, invite.token, *agreed)
    goes = place.join(3, invite.token, *agreed)
    await place.until(job, lambda tasks: place.running(tasks) == 5)
    await place.round(job, 1)
    goes.interrupt()
    assert await goes.end() == 130
    assert "You have left" in goes.text
    (away,) = [task for task in await place.tasks(job) if task.participant == "owner 3"]
    assert (away.state, away.attempt) == (TaskState.READY, 1)
    assert "may come back" in away.reason
    place.open(2, 3)
    await place.round(job, 4)
    comes = place.join(3, invite.token, *agreed)
    await comes.says("attempt 2")
    await place.until(job, lambda tasks: place.running(tasks) == 5)
    place.open(5, 4)
    job = await place.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    assert [await stays.end(), await comes.end()] == [0, 0], stays.text + comes.text
    assert "Your part has completed" in stays.text
    steps, counts = await place.steps(job)
    assert counts[2:] == [3, 3, 3, 4, 4, 4, 4], "it takes part again"
    whole, without = (1 + 2 + 4 + 8) / 4, (1 + 2 + 4) / 3
    assert steps[2:] == [pytest.approx(whole if count == 4 else without, abs=1e-4) for count in counts[2:]]
