"""A job whose data lie in a bucket: its workers find them as files, with the credentials of their environment alone."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame.spec.nouns import Dataset, DatasetGroups
from flame.spec.records import JobState

READS = """
import hashlib
from flame.sdk import Config
config = Config("config.json")
data = config.dataset_path.read_bytes()
print(config.dataset, hashlib.sha256(data).hexdigest(), config.dataset_path.name, flush=True)
"""


@pytest.mark.parametrize("promised", [True, False])
async def test_workers_read_what_lies_in_a_bucket_as_files_and_it_is_fetched_once(
    s3: Any,
    make_server: Callable[..., Any],
    make_code: Any,
    make_form: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    promised: bool,
) -> None:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path / "cache"))
    folder = s3.folder / s3.bucket / f"data-{tmp_path.name}"
    folder.mkdir()
    data = os.urandom(100_000)
    (folder / "site.npz").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    url = f"s3://{s3.bucket}/{folder.name}/site.npz"
    sites = [Dataset(id=f"d{n}", name=f"site {n}", url=url, sha256=digest if promised and n else "") for n in range(3)]
    groups = [DatasetGroups(role="trainer", dataset_groups={"default": [site.id or "" for site in sites]})]
    async with make_server() as served:
        code = await served.client.code.upload(make_code(READS, "print('done')\n"))
        job = await served.client.jobs.create(make_form(code, datasets=sites, data_spec=groups))
        await served.client.jobs.start(job.id)
        async with asyncio.timeout(60):
            job = await served.client.jobs.wait(job.id)
        assert job.state is JobState.COMPLETED, job.failure
        for task in await served.client.jobs.tasks(job.id):
            if task.role == "trainer":
                log = b"".join([piece async for piece in served.client.tasks.log(task.id)])
                assert log.splitlines()[-1] == f"{url} {digest} site.npz".encode()
            assert "flame-secret" not in repr(task)
    kept = tmp_path / "cache" / "datasets" / "files" / digest
    assert [path.name for path in kept.iterdir()] == ["site.npz"]


async def test_a_dataset_that_is_not_there_fails_the_job_with_a_sentence(
    s3: Any,
    make_server: Callable[..., Any],
    make_code: Any,
    make_form: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path / "cache"))
    site = Dataset(id="d0", name="site", url=f"s3://{s3.bucket}/no/such.npz")
    groups = [DatasetGroups(role="trainer", dataset_groups={"default": ["d0"]})]
    async with make_server() as served:
        code = await served.client.code.upload(make_code(READS, "import time\ntime.sleep(60)\n"))
        job = await served.client.jobs.create(make_form(code, datasets=[site], data_spec=groups))
        await served.client.jobs.start(job.id)
        async with asyncio.timeout(60):
            job = await served.client.jobs.wait(job.id)
        assert job.state is JobState.FAILED
        assert job.failure is not None
        assert f"The dataset {site.url} cannot be had: there is no such object." in str(job.failure)
