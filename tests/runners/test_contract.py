"""What holds for every kind of runner, each on the real thing."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from waiting import until

sys.path.insert(0, str(Path(__file__).parent))

from places import Place, place

from flame.errors import RunnerError
from flame.runners import WorkerExit, WorkerInfo


@pytest.fixture(params=["local", "docker"])
async def there(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    somewhere = place(request.param, tmp_path)
    yield somewhere
    await somewhere.close()


async def test_a_started_worker_is_listed_and_an_ended_one_is_not(there: Place) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a"))
    assert (worker.task, worker.job, worker.attempt) == ("a", "job1", 1)
    await there.ready(runner, worker)
    assert list(await runner.list()) == [worker]
    await runner.end(worker)
    assert list(await runner.list()) == []
    await runner.end(worker)  # once more is no error
    assert there.exits == []  # who asked for it needs not be told


async def test_starting_a_worker_that_is_there_gives_that_one(there: Place) -> None:
    runner = await there.open()
    first, second = await asyncio.gather(runner.start(there.spec("a")), runner.start(there.spec("a")))
    assert first == second == await runner.start(there.spec("a"))
    next_attempt = await runner.start(there.spec("a", attempt=2))
    assert next_attempt.handle != first.handle
    assert sorted(await runner.list()) == sorted([first, next_attempt])
    await there.ready(runner, first, next_attempt)


@pytest.mark.parametrize(
    ("behaviour", "how"),
    [
        ("exit=0", WorkerExit(0, None)),
        ("exit=7", WorkerExit(7, None)),
        ("sig=9", WorkerExit(None, "SIGKILL")),
        ("sig=11", WorkerExit(None, "SIGSEGV")),
    ],
)
async def test_an_end_is_reported_once_with_its_code(there: Place, behaviour: str, how: WorkerExit) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a", behaviour))
    await until(lambda: bool(there.exits))
    assert there.exits == [(worker, how)]
    assert list(await runner.list()) == []
    await runner.end(worker)
    await runner.close()
    assert len(there.exits) == 1


@pytest.mark.parametrize("behaviour", ["polite", "stubborn"])
async def test_a_worker_that_was_asked_to_end_is_gone_and_not_reported(there: Place, behaviour: str) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a", behaviour))
    await there.ready(runner, worker)
    await asyncio.gather(runner.end(worker, grace=0.3), runner.end(worker, grace=0.3))
    assert list(await runner.list()) == []
    assert there.exits == []


async def test_a_worker_that_somebody_kills_is_reported(there: Place) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a"))
    await there.ready(runner, worker)
    await there.kill(worker, "SIGKILL")
    await until(lambda: bool(there.exits))
    ((reported, how),) = there.exits
    assert (reported, how.exit_code, how.signal) == (worker, None, "SIGKILL")


async def test_many_workers_start_at_once_and_end_at_once(there: Place) -> None:
    runner = await there.open()
    workers = await asyncio.gather(*(runner.start(there.spec(f"t{n}")) for n in range(12)))
    assert len({worker.handle for worker in workers}) == 12
    await there.ready(runner, *workers)
    assert sorted(await runner.list()) == sorted(workers)
    await asyncio.gather(*(runner.end(worker) for worker in workers))
    assert list(await runner.list()) == []
    assert there.exits == []


async def test_a_worker_is_told_everything_and_no_list_shows_its_key(there: Place) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a", "tell=FLAME_TASK_KEY,FLAME_ATTEMPT"))
    await there.ready(runner, worker)
    assert str({"FLAME_TASK_KEY": "se'cret a", "FLAME_ATTEMPT": "1"}) in await there.printed(runner, worker)
    assert "cret a" not in await there.shown(worker)


async def test_what_a_worker_itself_has_printed_is_kept_until_it_is_cleaned_up(there: Place) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a", "exit=1"))
    await until(lambda: bool(there.exits))
    assert await there.printed(runner, worker) == "worker a\n"
    await runner.clean(worker)
    await runner.clean(worker)
    assert await there.printed(runner, worker) == ""


async def test_names_cannot_lead_out_of_a_folder(there: Place) -> None:
    runner = await there.open()
    for task in ("../a", "", ".."):
        with pytest.raises(RunnerError):
            await runner.start(there.spec(task))
        with pytest.raises(RunnerError):
            await runner.clean(WorkerInfo(task, "job1", 1, "1"))
    assert list(await runner.list()) == []


async def test_workers_go_on_without_their_server_and_are_adopted_by_the_next(there: Place) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a"))
    await there.ready(runner, worker)
    await runner.close()

    again = await there.open()
    assert list(await again.list()) == [worker]
    assert await again.start(there.spec("a")) == worker
    await there.kill(worker, "SIGKILL")
    await until(lambda: bool(there.exits))
    ((reported, how),) = there.exits
    assert reported == worker
    assert how.signal in ("SIGKILL", None)  # of a process, only its parent learns it


async def test_a_worker_of_another_server_is_left_alone(there: Place, tmp_path: Path) -> None:
    runner = await there.open()
    worker = await runner.start(there.spec("a"))
    await there.ready(runner, worker)
    other = place(there.kind, tmp_path / "other")
    stranger = await other.open()
    assert list(await stranger.list()) == []
    await stranger.end(worker)
    assert list(await runner.list()) == [worker]
    await other.close()
