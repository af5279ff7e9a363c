"""Jobs from submission to end, over real sockets with real worker processes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from waiting import until

from flame.errors import Conflict, NotFound, SpecError
from flame.spec.nouns import Channel, JobForm, Role, Schema
from flame.spec.records import JobState, TaskState

#: Waits for a file, and leaves it to others to end it.
WAITS = """
import os, sys, time, json
print("began", flush=True)
while not os.path.exists({gate!r}):
    time.sleep(0.01)
print("ends", flush=True)
"""

FAILS = """
import sys
for number in range(40):
    print("line", number)
sys.exit(3)
"""


def processes_of(job: str) -> list[psutil.Process]:
    """The processes that belong to a job, flamelets and children, by what their environment says."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if any(job in value for name, value in environment.items() if name.startswith("FLAME_")):
            found.append(process)
    return found


async def submit(served: Any, code: bytes, make_form: Callable[..., JobForm], **fields: Any) -> str:
    digest = await served.client.code.upload(code)
    return str((await served.client.jobs.create(make_form(digest, **fields))).id)


async def until_log(served: Any, task: str, text: bytes) -> None:
    log = b""
    async with asyncio.timeout(60):
        async for piece in served.client.tasks.log(task, follow=True):
            log += piece
            if text in log:
                return
    raise AssertionError(log)


async def test_a_job_runs_from_submission_to_its_end(served: Any, make_code: Any, make_form: Any) -> None:
    job = await submit(served, make_code(), make_form)
    assert (await served.client.jobs.start(job)).state is JobState.STARTING
    ended = await served.client.jobs.wait(job)
    assert ended.state is JobState.COMPLETED, ended.failure
    for task in await served.client.jobs.tasks(job):
        assert task.state is TaskState.COMPLETED
        assert b"".join([piece async for piece in served.client.tasks.log(task.id)]) == b"done\n"
    assert not processes_of(job)
    # What workers leave is removed when all went well.
    await until(lambda: not list((served.data_dir / "workers").iterdir()))


async def test_workers_need_no_token_of_the_server(make_server: Any, make_code: Any, make_form: Any) -> None:
    async with make_server(token="secret") as served:
        job = await submit(served, make_code(), make_form)
        await served.client.jobs.start(job)
        assert (await served.client.jobs.wait(job)).state is JobState.COMPLETED


async def test_a_task_failure_reaches_the_user_with_cause_and_log(served: Any, make_code: Any, make_form: Any) -> None:
    gate = str(served.data_dir / "gate")
    job = await submit(served, make_code(FAILS, WAITS.format(gate=gate)), make_form)
    await served.client.jobs.start(job)
    ended = await served.client.jobs.wait(job)
    assert ended.state is JobState.FAILED
    assert (ended.failure.role, ended.failure.exit_code) == ("trainer", 3)
    assert ended.failure.log[-1] == "line 39"
    assert not processes_of(job), "the aggregator was ended"


async def test_a_stopped_job_leaves_no_process(served: Any, make_code: Any, make_form: Any) -> None:
    stubborn = "import signal, subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsubprocess.Popen(['sleep', '1000'])\n"
    code = make_code(WAITS.format(gate="/nowhere"), stubborn + WAITS.format(gate="/nowhere"))
    job = await submit(served, code, make_form)
    await served.client.jobs.start(job)
    for task in await served.client.jobs.tasks(job):
        await until_log(served, task.id, b"began")
    assert len(processes_of(job)) >= 6
    await served.client.jobs.stop(job)
    ended = await served.client.jobs.wait(job)
    assert ended.state is JobState.TERMINATED
    assert ended.failure is None
    assert not processes_of(job)


async def test_a_killed_worker_fails_the_job_with_the_signal(served: Any, make_code: Any, make_form: Any) -> None:
    job = await submit(served, make_code(WAITS.format(gate="/nowhere"), WAITS.format(gate="/nowhere")), make_form)
    await served.client.jobs.start(job)
    tasks = await served.client.jobs.tasks(job)
    for task in tasks:
        await until_log(served, task.id, b"began")
    task = await served.client.tasks.get(tasks[2].id)
    os.kill(int(task.worker), 9)
    ended = await served.client.jobs.wait(job)
    assert ended.failure.task == task.id
    assert ended.failure.signal == "SIGKILL"
    assert ended.failure.log == ["began"]
    assert not processes_of(job)


async def test_fifty_jobs_at_once_all_complete_and_none_is_mixed_up(
    make_server: Any, make_code: Any, make_form: Any
) -> None:
    tells = "import json\nconfig = json.load(open('config.json'))\nprint(config['job']['name'], config['role'], config['dataset'])\n"
    async with make_server(slots=6) as served:
        digest = await served.client.code.upload(make_code(tells))
        alone = Schema(
            name="alone",
            roles=[Role(name="trainer", is_data_consumer=True)],
            channels=[Channel(name="ring", pair=["trainer", "trainer"])],
        )

        async def one(number: int) -> tuple[str, list[bytes]]:
            form = make_form(digest, trainers=1, name=f"job-{number}", schema=alone)
            job = await served.client.jobs.create(form)
            await served.client.jobs.start(job.id)
            ended = await served.client.jobs.wait(job.id)
            assert ended.state is JobState.COMPLETED, ended.failure
            tasks = await served.client.jobs.tasks(job.id)
            logs = [b"".join([piece async for piece in served.client.tasks.log(task.id)]) for task in tasks]
            return job.id, logs

        results = await asyncio.gather(*(one(number) for number in range(50)))
        assert len({job for job, _ in results}) == 50
        for number, (_, logs) in enumerate(results):
            name = f"job-{number}".encode()
            assert logs == [name + b" trainer file:///site0\n"]
        assert len(await served.client.jobs.list()) == 50
        assert len(await served.client.jobs.list(JobState.COMPLETED)) == 50


async def test_requests_that_the_state_forbids_get_409_and_a_sentence(
    served: Any, make_code: Any, make_form: Any
) -> None:
    job = await submit(served, make_code(), make_form)
    status, answer = await served.call("POST", f"/v1/jobs/{job}/stop")
    assert status == 409
    assert answer == {
        "error": {
            "type": "Conflict",
            "message": "Job 'digits' is ready: it has not been started, so there is nothing to stop.",
        }
    }
    await served.client.jobs.start(job)
    with pytest.raises(Conflict):
        await served.client.jobs.start(job)
    with pytest.raises(Conflict):
        await served.client.jobs.delete(job)
    await served.client.jobs.wait(job)
    await served.client.jobs.delete(job)
    with pytest.raises(NotFound):
        await served.client.jobs.get(job)


async def test_a_wrong_job_is_refused_with_a_sentence_and_nothing_is_written(
    served: Any, make_code: Any, make_form: Any
) -> None:
    digest = await served.client.code.upload(make_code())
    with pytest.raises(SpecError, match="is not registered"):
        await served.client.jobs.create(make_form(digest, datasets=[]))
    body = {"name": "x", "code": digest, "colour": "red"}
    status, answer = await served.call("POST", "/v1/jobs", json=body)
    assert status == 422
    assert answer["error"]["message"].startswith("unknown key 'colour'; the keys here are 'name', ")
    status, answer = await served.call("POST", "/v1/jobs", data=b"{", headers={"Content-Type": "application/json"})
    assert (status, answer["error"]["type"]) == (400, "UsageError")
    status, answer = await served.call("POST", "/v1/jobs", data=json.dumps(body))
    assert status == 400
    assert "Content-Type: application/json" in answer["error"]["message"]
    assert await served.client.jobs.list() == []


async def test_lists_come_in_pages(served: Any, make_code: Any, make_form: Any) -> None:
    digest = await served.client.code.upload(make_code())
    ids = [(await served.client.jobs.create(make_form(digest, name=f"j{i}"))).id for i in range(5)]
    found: list[str] = []
    after = ""
    while after is not None:
        _, page = await served.call("GET", f"/v1/jobs?limit=2{f'&after={after}' if after else ''}")
        found += [job["id"] for job in page["items"]]
        after = page["next"]
    assert found == ids
    for query in ("limit=0", "limit=many", "state=angry", "colour=red", "limit=1&limit=2"):
        status, answer = await served.call("GET", f"/v1/jobs?{query}")
        assert (status, answer["error"]["type"]) == (400, "UsageError"), query


async def test_jobs_designs_and_datasets_are_there_after_a_restart(
    make_server: Any, make_code: Any, make_form: Any
) -> None:
    async with make_server() as served:
        job = await submit(served, make_code(), make_form)
        await served.client.jobs.start(job)
        before = await served.client.jobs.wait(job)
        task = (await served.client.jobs.tasks(job))[0]
    async with make_server() as served:
        assert await served.client.jobs.get(job) == before
        assert len(await served.client.datasets.list()) == 2
        (design,) = await served.client.designs.list()
        assert design.name == "digits"
        assert b"".join([piece async for piece in served.client.tasks.log(task.id, follow=True)]) == b"done\n"
        assert [event.type async for event in served.client.jobs.events(job, follow=True)][-1] == "job"
