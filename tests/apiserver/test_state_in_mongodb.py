"""Servers with their state in MongoDB: killed, followed by a standby, and with the database itself killed in mid-job."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waiting import until

from flame.client import Client
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


class Gated:
    """A job whose rounds a test lets pass one by one."""

    def __init__(self, folder: Path, make_code: Any, make_form: Any) -> None:
        self._gates = folder / "gates"
        self._gates.mkdir()
        gates = str(self._gates)
        self._code, self._form = make_code(WAITS.format(gates=gates), ROUNDS.format(gates=gates)), make_form
        self.id = ""

    async def start(self, client: Client) -> None:
        digest = await client.code.upload(self._code)
        self.id = (await client.jobs.create(self._form(digest))).id
        await client.jobs.start(self.id)

    def let_pass(self, number: int) -> None:
        (self._gates / str(number)).touch()

    async def reaches(self, client: Client, number: int) -> None:
        async with asyncio.timeout(60):
            async for event in client.jobs.events(self.id, follow=True):
                if event.type == "round" and event.data["round"] == number:
                    return

    async def ends_well(self, client: Client) -> None:
        """It has completed, with every round once, and its first workers."""
        async with asyncio.timeout(60):
            job = await client.jobs.wait(self.id)
        assert job.state is JobState.COMPLETED, job.failure
        assert [one.round for one in job.rounds] == [1, 2, 3, 4]
        tasks = await client.jobs.tasks(self.id)
        assert {task.attempt for task in tasks} == {1}, "nobody was restarted"
        log = b"".join([piece async for piece in client.tasks.log(tasks[0].id)])
        assert log == b"round 1\nround 2\nround 3\nround 4\n"


async def test_a_job_outlives_its_server_and_goes_on_with_the_next_one(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, mongo_url: str, tmp_path: Path
) -> None:
    job = Gated(tmp_path, make_code, make_form)
    server = start_process(db=mongo_url)
    async with Client(await server.url()) as client:
        await job.start(client)
        for number in (1, 2, 3):
            await job.reaches(client, number)
            server.kill()
            await server.ended()
            job.let_pass(number)  # a round ends while nobody hears of it
            server = start_process(db=mongo_url)
            await server.url()
        job.let_pass(4)
        await job.ends_well(client)


async def test_a_database_that_is_killed_in_mid_job_holds_the_job_up_and_no_more(
    start_process: Callable[..., Any], make_code: Any, make_form: Any, private_mongo: Any, tmp_path: Path
) -> None:
    job = Gated(tmp_path, make_code, make_form)
    server = start_process(db=f"{private_mongo.url}/flame", takeover=4.0)
    async with Client(await server.url()) as client:
        await job.start(client)
        for number in (1, 2, 3):
            await job.reaches(client, number)
            await private_mongo.kill()
            job.let_pass(number)  # its report has nowhere to go
            await asyncio.sleep(2.5)  # longer than the server may write without its lock
            await private_mongo.start()
            await job.reaches(client, number + 1)
        job.let_pass(4)
        await job.ends_well(client)
    assert server.process.poll() is None


async def test_a_standby_takes_over_from_a_killed_server_and_the_workers_go_on(
    start_process: Callable[..., Any],
    make_code: Any,
    make_form: Any,
    mongo_url: str,
    tmp_path: Path,
    unused_tcp_port: int,
) -> None:
    job = Gated(tmp_path, make_code, make_form)

    def start(name: str, **settings: Any) -> Any:
        return start_process(
            db=mongo_url, port=unused_tcp_port, takeover=4.0, data_dir=str(tmp_path / name), **settings
        )

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = start("first")
    first.data_dir = tmp_path / "first"
    async with Client(await first.url()) as client:
        await job.start(client)
        await job.reaches(client, 1)
        refused = start("second")
        assert await refused.ended() == 1
        assert f"Another server works on this database: process {first.process.pid} on" in refused.log.read_text()
        standby = start("second", standby=True)
        standby.data_dir = tmp_path / "second"
        await until(lambda: "standby: process" in standby.log.read_text())
        assert standby.process.poll() is None
        first.kill()
        await first.ended()
        job.let_pass(1)
        await standby.url()
        await job.reaches(client, 2)
        for number in (2, 3, 4):
            job.let_pass(number)
        await job.ends_well(client)


async def test_a_stopped_server_that_was_followed_ends_when_it_wakes_up(
    start_process: Callable[..., Any], mongo_url: str, tmp_path: Path, unused_tcp_port: int
) -> None:
    (tmp_path / "second").mkdir()
    first = start_process(db=mongo_url, port=unused_tcp_port, takeover=3.0)
    await first.url()
    # On another port: this one's listener is still there.
    second = start_process(db=mongo_url, standby=True, takeover=3.0, data_dir=str(tmp_path / "second"))
    second.data_dir = tmp_path / "second"
    first.kill(signal.SIGSTOP)
    try:
        await second.url()
    finally:
        first.kill(signal.SIGCONT)
    assert await first.ended() == 1
    assert "Another server has taken over the database" in first.log.read_text()
    assert second.process.poll() is None


async def test_a_standby_ends_when_it_is_told_to(
    start_process: Callable[..., Any], mongo_url: str, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    first = start_process(db=mongo_url)
    await first.url()
    standby = start_process(db=mongo_url, standby=True, data_dir=str(tmp_path / "second"))
    await until(lambda: "standby: process" in standby.log.read_text())
    standby.kill(signal.SIGTERM)
    assert await standby.ended() == 0
    assert first.process.poll() is None
