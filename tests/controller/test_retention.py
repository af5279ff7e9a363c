"""Jobs that have ended are kept as long, and as large, as the operator says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.artifacts.files import FileArtifacts
from flame.controller.checkpoints import Checkpoints, rounds_of
from flame.controller.retention import Ended, Retention, choose
from flame.errors import NotFound, SpecError
from flame.spec.records import JobState


def test_what_ended_long_ago_goes_and_then_the_oldest_until_the_rest_fits() -> None:
    jobs = [Ended("a", 0.0, 10), Ended("b", 50.0, 10), Ended("c", 60.0, 0), Ended("d", 70.0, 10), Ended("e", 90.0, 10)]
    assert choose(jobs, 100.0, None, None) == []
    assert choose(jobs, 100.0, 60.0, None) == ["a"]
    assert choose(jobs, 100.0, 60.0, 20) == ["a", "b"]
    assert choose(jobs, 100.0, None, 0) == ["a", "b", "d", "e"], "one that has nothing makes no room"


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 100)), max_size=20),
    st.none() | st.floats(0, 100),
    st.none() | st.integers(0, 500),
)
def test_what_is_left_is_young_and_fits(
    given_: list[tuple[float, int]], seconds: float | None, size: int | None
) -> None:
    jobs = [Ended(str(number), at, bytes_) for number, (at, bytes_) in enumerate(given_)]
    gone = choose(jobs, 100.0, seconds, size)
    left = [job for job in jobs if job.id not in gone]
    assert len(set(gone)) == len(gone)
    assert size is None or sum(job.size for job in left) <= size
    assert seconds is None or all(100.0 - job.at <= seconds for job in left)


async def test_a_sweep_removes_ended_jobs_with_all_they_have_and_no_other(bench: Any) -> None:
    ended = await bench.job()
    await bench.controller.stop_job(ended.id)
    running = await bench.job()
    await bench.run(running.id)
    await bench.state(ended.id, JobState.TERMINATED)
    await bench.until(lambda: ended.id not in [job.id for job in bench.controller.active()])

    async def data() -> AsyncIterator[bytes]:
        yield b"x" * 1000

    kept = bench.controller.context.checkpoints
    for job in (ended, running):
        task = (await bench.controller.tasks(job.id))[0].id
        await kept.put(job.id, task, 3, data(), 2)
    retention = Retention(bench.controller, None, 999)
    assert await retention.sweep() == [ended.id]
    assert await kept.find(ended.id) == []
    assert len(await kept.find(running.id)) == 1
    with pytest.raises(NotFound):
        await bench.controller.job(ended.id)
    later = (await bench.controller.job(running.id)).created_at + 1e6
    assert await Retention(bench.controller, 60.0, None).sweep(later) == []


async def pieces(size: int) -> AsyncIterator[bytes]:
    yield b"x" * size


async def test_the_newest_checkpoints_of_each_task_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(FileArtifacts(tmp_path), tmp_path, limit=100)
    for number in (1, 2, 10):
        for task in ("a", "b"):
            await kept.put("job", task, number, pieces(number), 2)
    assert [(one.round, one.task, one.size) for one in await kept.find("job")] == [
        (2, "a", 2),
        (2, "b", 2),
        (10, "a", 10),
        (10, "b", 10),
    ]
    assert rounds_of(await kept.find("job")) == [2, 10]
    await kept.forget("job", 2)
    assert rounds_of(await kept.find("job")) == [2]
    with pytest.raises(SpecError, match="larger"):
        await kept.put("job", "a", 3, pieces(101), 2)
    assert rounds_of(await kept.find("job", "a")) == [2], "nothing of it is left"


@pytest.mark.parametrize("file", ["../secret", "link", ".hidden", "absent", "short"])
async def test_a_worker_can_have_no_file_taken_but_its_own(tmp_path: Path, file: str) -> None:
    kept = Checkpoints(FileArtifacts(tmp_path), tmp_path, limit=100)
    folder = tmp_path / "workers" / "t.2" / "artifacts"
    folder.mkdir(parents=True)
    (tmp_path / "workers" / "t.2" / "secret").write_bytes(b"12345")
    (folder / "link").symlink_to(tmp_path / "workers" / "t.2" / "secret")
    (folder / ".hidden").write_bytes(b"12345")
    (folder / "short").write_bytes(b"1234")
    assert not await kept.adopt("job", "t", 1, 2, attempt=2, file=file, size=5)
    assert await kept.find("job") == []
    (folder / "whole").write_bytes(b"12345")
    for _ in range(2):  # an answer that was lost is asked for again
        assert await kept.adopt("job", "t", 1, 2, attempt=2, file="whole", size=5)
    assert rounds_of(await kept.find("job")) == [1]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "job" / "t").iterdir()) == ["0000000001"]
