"""The client against a real server: everything a user does with designs, datasets, jobs and tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from waiting import until

import flame.client
from flame.client import Client, load_job
from flame.errors import Conflict, JobFailed, NotFound, SpecError
from flame.spec.nouns import Dataset
from flame.spec.records import JobState

WAITS = "import signal; print('up', flush=True); signal.pause()"


async def test_a_job_is_submitted_followed_and_read(server: Any, job: Any) -> None:
    async with Client(server.url) as client:
        submitted = await client.jobs.submit(load_job(job()))
        assert submitted.state is JobState.READY
        await client.jobs.start(submitted.id)
        events = [event async for event in client.jobs.events(submitted.id, follow=True)]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert (events[-1].type, events[-1].data["state"]) == ("job", "completed")
        tasks = await client.jobs.tasks(submitted.id)
        assert [task.role for task in tasks] == ["aggregator", "trainer", "trainer"]
        logs = [b"".join([piece async for piece in client.tasks.log(task.id)]) for task in tasks]
        assert logs == [b"merged\n", b"trained\n", b"trained\n"]
        assert [one.id for one in await client.jobs.list(JobState.COMPLETED)] == [submitted.id]
        assert await client.jobs.list(JobState.FAILED) == []
        assert (await client.jobs.wait(submitted.id)).state is JobState.COMPLETED
        later = [event.seq async for event in client.jobs.events(submitted.id, after=3, follow=True)]
        assert later == [event.seq for event in events[3:]]
        await client.jobs.delete(submitted.id)
        with pytest.raises(NotFound):
            await client.jobs.get(submitted.id)


async def test_a_log_is_followed_to_the_end_of_its_task(server: Any, job: Any) -> None:
    async with Client(server.url) as client:
        made = await client.jobs.submit(load_job(job(trainer=WAITS, aggregator=WAITS)))
        await client.jobs.start(made.id)
        task = (await client.jobs.tasks(made.id))[0]
        pieces = client.tasks.log(task.id, follow=True)
        assert (await anext(pieces)).startswith(b"up")
        await client.jobs.stop(made.id)
        assert b"".join([piece async for piece in pieces]).strip() == b""
        ended = await client.jobs.wait(made.id)
        assert ended.state is JobState.TERMINATED
        with pytest.raises(Conflict):
            await client.jobs.stop(made.id)


async def test_what_follows_goes_on_after_a_killed_server(server: Any, tmp_path: Path, job: Any) -> None:
    """A wait, a stream of events and a log that began before kill -9 end as if nothing had been."""
    folder = job(
        trainer=f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.05)\nprint('went')"
    )
    async with Client(server.url) as client:
        made = await client.jobs.submit(load_job(folder))
        await client.jobs.start(made.id)
        lost = asyncio.Event()
        waiting = asyncio.create_task(client.jobs.wait(made.id, on_lost=lambda _: lost.set()))
        events: list[int] = []

        async def follow() -> None:
            events.extend([event.seq async for event in client.jobs.events(made.id, follow=True)])

        following = asyncio.create_task(follow())
        trainer = (await client.jobs.tasks(made.id))[1]

        async def read() -> bytes:
            return b"".join([piece async for piece in client.tasks.log(trainer.id, follow=True)])

        reading = asyncio.create_task(read())
        async for event in client.jobs.events(made.id, follow=True):
            if event.type == "job" and event.data["state"] == "running":
                break
        server.kill()
        await asyncio.wait_for(lost.wait(), 20)
        (tmp_path / "go").touch()
        await server.start()
        ended = await asyncio.wait_for(waiting, 60)
        assert ended.state is JobState.COMPLETED
        await asyncio.wait_for(following, 20)
        assert events == list(range(1, len(events) + 1))
        assert await asyncio.wait_for(reading, 20) == b"went\n"
        assert [task.attempt for task in await client.jobs.tasks(made.id)] == [1, 1, 1]


async def test_an_artifact_is_downloaded_whole_or_not_at_all(server: Any, tmp_path: Path, job: Any) -> None:
    hands_in = (
        "import os, flame.sdk.link as l\n"
        "path = os.path.join(os.environ['FLAME_ARTIFACTS'], 'm.bin')\n"
        "open(path, 'wb').write(b'x' * 1_000_000)\n"
        "l.current().artifact('m.bin', path)\n"
    )
    async with Client(server.url) as client:
        made = await client.jobs.submit(load_job(job(aggregator=hands_in)))
        await client.jobs.start(made.id)
        assert (await client.jobs.wait(made.id)).state is JobState.COMPLETED
        path = await client.jobs.artifact(made.id, "m.bin", tmp_path)
        assert path.read_bytes() == b"x" * 1_000_000
        with pytest.raises(NotFound):
            await client.jobs.artifact(made.id, "none", tmp_path / "none")
        assert not (tmp_path / "none").exists()


async def test_designs_schemas_and_code(server: Any, job: Any) -> None:
    folder = job()
    bundle = load_job(folder)
    assert bundle.form.schema is not None
    assert bundle.archive is not None
    async with Client(server.url) as client:
        made = await client.designs.create("central", "a first one")
        await client.schemas.put(made.id, bundle.form.schema)
        digest = await client.code.put(made.id, bundle.archive)
        held = await client.designs.get(made.id)
        assert (held.name, held.code) == ("central", digest)
        assert await client.schemas.get(made.id) == bundle.form.schema
        assert await client.code.get(made.id) == bundle.archive
        assert (await client.designs.update(made.id, name="middle", description="a second one")).name == "middle"
        assert [one.name for one in await client.designs.list()] == ["middle"]
        await client.code.delete(made.id)
        with pytest.raises(NotFound):
            await client.code.get(made.id)
        await client.designs.delete(made.id)
        assert await client.designs.list() == []


async def test_datasets(server: Any) -> None:
    async with Client(server.url) as client:
        made = await client.datasets.create(Dataset(name="north", url="file:///north", realm="us"))
        assert (await client.datasets.get(made.id)).dataset.url == "file:///north"
        changed = await client.datasets.update(made.id, Dataset(name="north", url="file:///else"))
        assert changed.dataset.url == "file:///else"
        assert [one.id for one in await client.datasets.list()] == [made.id]
        await client.datasets.delete(made.id)
        with pytest.raises(NotFound):
            await client.datasets.get(made.id)


async def test_a_registered_dataset_is_found_when_a_job_is_read(server: Any, job: Any) -> None:
    async with Client(server.url) as client:
        north = await client.datasets.create(Dataset(name="north", url="file:///north"))
        named = [{"role": "trainer", "datasetGroups": {"default": [north.id]}}]
        folder = job(datasets=[], dataSpec=named)
        ended = await flame.client.run(folder, server=server.url)
        assert ended.state is JobState.COMPLETED
        assert [task.config.dataset for task in await client.jobs.tasks(ended.id)] == ["", "file:///north"]
        named[0]["datasetGroups"] = {"default": ["unheard"]}
        job(datasets=[], dataSpec=named)
        with pytest.raises(SpecError, match="unheard"):
            await flame.client.run(folder, server=server.url)


async def test_run_without_a_server_starts_one_that_ends_by_itself(home: Path, workers: Any, job: Any) -> None:
    seen: list[str] = []
    ended = await flame.client.run(job(), on_event=lambda event: seen.append(event.type))
    assert ended.state is JobState.COMPLETED
    assert seen[-1] == "job"
    await until(lambda: not (home / "server.json").exists())
    assert workers(home) == []


async def test_run_raises_the_cause_of_a_failure(job: Any) -> None:
    with pytest.raises(JobFailed, match=r"tiny .* failed: .*exit code 3"):
        await flame.client.run(job(trainer="import sys; sys.exit(3)"))


async def test_several_who_need_a_private_server_at_once_share_it(job: Any) -> None:
    folders = [job(f"job{i}") for i in range(3)]
    ended = await asyncio.gather(*(flame.client.run(folder) for folder in folders))
    assert [one.state for one in ended] == [JobState.COMPLETED] * 3
    assert len({one.id for one in ended}) == 3


async def test_a_private_server_that_cannot_start_says_why(home: Path, job: Any) -> None:
    home.mkdir()
    (home / "flame.db").mkdir()
    with pytest.raises(flame.errors.ServerUnreachable, match=r"did not start: .*flame\.db.*server\.log"):
        await flame.client.run(job())


async def test_a_stale_server_file_is_passed_over(home: Path, unused_tcp_port: int, job: Any) -> None:
    import os

    home.mkdir()
    (home / "server.json").write_text(f'{{"url": "http://127.0.0.1:{unused_tcp_port}", "pid": {os.getpid()}}}')
    assert (await flame.client.run(job())).state is JobState.COMPLETED
