"""A server as a process: it is killed, ended, started twice, and started for the moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

from flame.client import Client
from flame.spec.nouns import RestartPolicy
from flame.spec.records import JobState

#: Reports a round, waits to be let on, reports the next.
ROUNDS = """
import os, time
from flame.sdk.link import current
for number in range(1, 5):
    current().round(number, {{"loss": 1 / number}}, 0.01)
    print("round", number, flush=True)
    while not os.path.exists(os.path.join({gates!r}, str(number))):
        time.sleep(0.005)
"""

WAITS = """
import os, time
while not os.path.exists(os.path.join({gates!r}, "4")):
    time.sleep(0.005)
"""

#: Takes its own flamelet along, the first time.
KILLS = """
import json, os, signal
name = json.load(open("config.json"))["job"]["name"]
try:
    os.mkdir(os.path.join({gates!r}, name))
except FileExistsError:
    print("done")
else:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
"""


async def start_job(client: Client, code: bytes, make_form: Any, **fields: Any) -> str:
    digest = await client.code.upload(code)
    job = await client.jobs.create(make_form(digest, **fields))
    await client.jobs.start(job.id)
    return job.id


async def until_round(client: Client, job: str, number: int) -> None:
    async with asyncio.timeout(60):
        async for event in client.jobs.events(job, follow=True):
            if event.type == "round" and event.data["round"] == number:
                return


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descriptors(server: psutil.Process) -> Counter[str]:
    """What a process has open, without the database: SQLite opens its files when a connection first needs them."""
    names = Counter[str]()
    for number in os.listdir(f"/proc/{server.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = re.sub(r"\[\d+\]", "", os.readlink(f"/proc/{server.pid}/fd/{number}"))
            names[name] += "/flame.db" not in name
    return names


def open_gate(gates: Path, number: int) -> None:
    gates.mkdir(exist_ok=True)
    (gates / str(number)).touch()


async def test_a_killed_server_is_followed_by_one_that_ends_the_job_with_the_same_workers(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    gates = tmp_path / "gates"
    code = make_code(WAITS.format(gates=str(gates)), ROUNDS.format(gates=str(gates)))
    server = start_process()
    async with Client(await server.url()) as client:
        job = await start_job(client, code, make_form)
        await until_round(client, job, 1)
        waiting = asyncio.create_task(client.jobs.wait(job))
        workers = {task.id: task.worker for task in await client.jobs.tasks(job)}
        server.kill()
        await server.ended()
        open_gate(gates, 1)  # a round ends while nobody hears of it
        second = start_process()
        await second.url()
        await until_round(client, job, 2)
        server = second
        for number in (2, 3):
            open_gate(gates, number)
            await until_round(client, job, number + 1)
            server.kill()
            await server.ended()
            server = start_process()
            await server.url()
        open_gate(gates, 4)
        async with asyncio.timeout(60):
            ended = await waiting
        assert ended.state is JobState.COMPLETED, ended.failure
        assert [r.round for r in ended.rounds] == [1, 2, 3, 4]
        tasks = await client.jobs.tasks(job)
        assert {task.id: task.worker for task in tasks} == workers, "nobody was restarted"
        assert {task.attempt for task in tasks} == {1}
        log = b"".join([piece async for piece in client.tasks.log(tasks[0].id)])
        assert log == b"round 1\nround 2\nround 3\nround 4\n"


async def test_workers_outlive_a_server_that_is_ended_in_order(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    gates = tmp_path / "gates"
    code = make_code(WAITS.format(gates=str(gates)), ROUNDS.format(gates=str(gates)))
    server = start_process()
    async with Client(await server.url()) as client:
        job = await start_job(client, code, make_form)
        await until_round(client, job, 1)
        workers = [int(task.worker or 0) for task in await client.jobs.tasks(job)]
        server.kill(signal.SIGTERM)
        assert await server.ended() == 0
    assert "3 workers go on" in server.log.read_text()
    assert not (server.data_dir / "server.json").exists()
    assert all(alive(pid) for pid in workers)
    server = start_process()
    async with Client(await server.url()) as client:
        await client.jobs.stop(job)
        assert (await client.jobs.wait(job)).state is JobState.TERMINATED
    assert not any(alive(pid) for pid in workers)


async def test_a_second_server_in_a_data_directory_is_refused_and_told_of_the_first(
    start_process: Callable[..., Any],
) -> None:
    first = start_process()
    url = await first.url()
    second = start_process()
    assert await second.ended() == 1
    said = second.log.read_text()
    assert f"process {first.process.pid} at {url}" in said
    first.kill()
    await first.ended()
    assert await start_process().url()


async def test_a_port_that_is_taken_is_refused_with_a_sentence(
    start_process: Callable[..., Any], tmp_path: Path
) -> None:
    first = start_process()
    port = int((await first.url()).rsplit(":", 1)[1])
    second = start_process(port=port, data_dir=str(tmp_path / "other"))
    assert await second.ended() == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in second.log.read_text()


async def test_a_private_server_says_where_it_is_and_ends_with_its_last_visitor(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    server = start_process(private=True)
    said = json.loads(await asyncio.to_thread(server.process.stdout.readline))
    assert said["pid"] == server.process.pid
    gates = tmp_path / "gates"
    async with Client(said["url"]) as client, client.attach():
        async with client.attach():
            job = await start_job(
                client, make_code(WAITS.format(gates=str(gates)), ROUNDS.format(gates=str(gates))), make_form
            )
            await until_round(client, job, 1)
        assert not (await client.jobs.get(job)).state.ended, "somebody is still there"
        workers = [int(task.worker or 0) for task in await client.jobs.tasks(job)]
    assert await server.ended() == 0
    assert not any(alive(pid) for pid in workers), "it takes its jobs along"
    server = start_process()
    async with Client(await server.url()) as client:
        assert (await client.jobs.get(job)).state is JobState.TERMINATED


async def test_a_private_server_ends_when_nobody_comes(start_process: Callable[..., Any]) -> None:
    process = start_process(private=True, patience=0.05)
    assert await process.ended() == 0
    assert "nobody has attached within 0.05 s" in process.log.read_text()


async def test_a_second_signal_ends_the_server_at_once(
    start_process: Callable[..., Any], make_code: Any, make_form: Any
) -> None:
    stubborn = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('began', flush=True)\ntime.sleep(100)\n"
    server = start_process(private=True)
    async with Client(await server.url()) as client, client.attach():
        job = await start_job(client, make_code(stubborn, stubborn), make_form)
        workers = [task.id for task in await client.jobs.tasks(job)]
        for worker in workers:
            async for piece in client.tasks.log(worker, follow=True):
                if b"began" in piece:
                    break
        server.kill(signal.SIGTERM)
        await until(lambda: "stopping 1 jobs" in server.log.read_text())
        server.kill(signal.SIGTERM)
        assert await server.ended() == 128 + signal.SIGTERM
    server = start_process()
    async with Client(await server.url()) as client:
        assert (await client.jobs.wait(job)).state is JobState.TERMINATED


async def test_a_secret_is_readable_by_its_owner_alone(start_process: Callable[..., Any]) -> None:
    server = start_process()
    await server.url()
    for name in ("secret", "flame.db"):
        assert os.stat(server.data_dir / name).st_mode & 0o077 == 0


async def test_what_a_server_and_its_workers_write_is_for_their_account_alone(
    start_process: Any, make_form: Any, make_code: Any, tmp_path: Path
) -> None:
    """Also in a folder that was there before, for all to read."""
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    data.chmod(0o755)
    server = start_process()
    async with Client(await server.url()) as client:
        digest = await client.code.upload(make_code("open('here', 'w').write('x'); raise SystemExit(3)"))
        job = await client.jobs.create(make_form(digest))
        await client.jobs.start(job.id)
        assert (await client.jobs.wait(job.id)).state is JobState.FAILED  # so what its workers wrote is kept
        written = {path.relative_to(data).as_posix(): path.lstat().st_mode & 0o777 for path in data.rglob("*")}
    assert {"flame.db", "secret", "audit.log", "server.json", "workers"} <= written.keys()
    assert any(path.endswith("/here") for path in written)
    assert not {path: oct(mode) for path, mode in written.items() if mode & 0o077}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what another process has open")
async def test_jobs_and_killed_workers_leave_no_descriptor_open(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    code = make_code("print('done')\n", KILLS.format(gates=str(tmp_path)))
    process = start_process()
    url = await process.url()
    server = psutil.Process(process.process.pid)

    async def run(name: str) -> None:
        async with Client(url) as client:
            job = await start_job(client, code, make_form, name=name, restart=RestartPolicy(attempts=3, backoff=0.0))
            ended = await client.jobs.wait(job)
            assert ended.state is JobState.COMPLETED, ended.failure
            assert sum(task.attempt for task in await client.jobs.tasks(job)) == 4, "one of three was started again"

    await run("first")
    await until(lambda: not descriptors(server)["anon_inode:[pidfd]"] and len(server.net_connections()) <= 1)
    before = descriptors(server)
    for number in range(5):
        await run(f"job-{number}")
    await until(lambda: descriptors(server) == before)
