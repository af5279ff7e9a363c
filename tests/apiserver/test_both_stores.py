"""A job ends with the same bits whichever database keeps the state, and wherever its artifacts are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from flame.client import Client
from flame.spec.load import load_job
from flame.spec.records import JobState

NUMPY = Path(__file__).parents[2] / "examples" / "numpy"  # which needs no library that takes long to import


async def test_a_job_learns_the_same_with_sqlite_and_with_mongodb_and_a_bucket(
    start_process: Callable[..., Any],
    mongo_url: str,
    s3: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_job(NUMPY, overrides=["policy.deterministic=true"])
    models, metrics = [], []
    places: list[dict[str, Any]] = [{}, {"db": mongo_url, "artifacts": f"s3://{s3.bucket}/{tmp_path.name}"}]
    for number, place in enumerate(places):
        (tmp_path / str(number)).mkdir()
        server = start_process(data_dir=str(tmp_path / str(number)), **place)
        server.data_dir = tmp_path / str(number)
        async with Client(await server.url()) as client:
            job = await client.jobs.submit(loaded)
            await client.jobs.start(job.id)
            async with asyncio.timeout(100):
                job = await client.jobs.wait(job.id)
            assert job.state is JobState.COMPLETED, job.failure
            path = await client.jobs.artifact(job.id, "model.safetensors", tmp_path / f"model{number}")
            models.append(load_file(path))
            metrics.append([(one.round, one.metrics) for one in job.rounds])
        server.kill()
        await server.ended()
    assert models[0].keys() == models[1].keys()
    assert all(models[0][name].tobytes() == models[1][name].tobytes() for name in models[0])
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == 10
