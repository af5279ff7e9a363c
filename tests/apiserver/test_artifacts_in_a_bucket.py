"""A server whose artifacts are in a bucket: models, code and past logs are there and nowhere else, and are read from there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from flame.errors import FlameError, NotFound, StoreError
from flame.spec.records import JobState

MODEL = """
import os, pathlib
from flame.sdk.link import current
path = pathlib.Path(os.environ["FLAME_ARTIFACTS"]) / "model.safetensors"
path.write_bytes(bytes(range(256)) * 20_000)
print("handed in", current().artifact("model.safetensors", path, 60), flush=True)
"""


async def run(served: Any, code: bytes, make_form: Any) -> Any:
    digest = await served.client.code.upload(code)
    job = await served.client.jobs.create(make_form(digest))
    await served.client.jobs.start(job.id)
    async with asyncio.timeout(60):
        job = await served.client.jobs.wait(job.id)
    assert job.state is JobState.COMPLETED, job.failure
    await served.server.controller.context.background.drain()
    return job


async def test_what_a_job_leaves_is_in_the_bucket_alone_and_is_read_from_there(
    s3: Any, make_server: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    model = bytes(range(256)) * 20_000
    prefix = f"server-{tmp_path.name}"
    url = f"s3://{s3.bucket}/{prefix}"
    async with make_server(artifacts=url) as served:
        job = await run(served, make_code("print('hello')\n", MODEL), make_form)
        tasks = {task.config.role: task.id for task in await served.client.jobs.tasks(job.id)}
        objects = {
            name.removeprefix(f"{prefix}/"): size for name, size in s3.objects().items() if name.startswith(prefix)
        }
        assert objects.pop(f"artifacts/{job.id}/model.safetensors") == len(model)
        assert objects.pop(f"bundles/{job.code[:2]}/{job.code}") > 0
        logs = [name for name in objects if name.startswith(f"logs/{job.id}/")]
        assert len(logs) == len(objects) == 3
        assert f"logs/{job.id}/{tasks['aggregator']}.1.log" in logs
        for folder in ("artifacts", "bundles", "logs"):
            assert not [path for path in (served.data_dir / folder).rglob("*") if path.is_file()]
        await served.client.jobs.artifact(job.id, "model.safetensors", tmp_path / "model")
        assert (tmp_path / "model").read_bytes() == model
    async with make_server(artifacts=url) as served:  # another server finds all of it
        log = b"".join([piece async for piece in served.client.tasks.log(tasks["aggregator"])])
        assert log == f"handed in {url}/artifacts/{job.id}/model.safetensors\n".encode()
        async with served.http.get(f"{served.url}/v1/tasks/{tasks['aggregator']}/log?offset=10") as answer:
            assert await answer.read() == log[10:]
        one = f"{served.url}/v1/jobs/{job.id}/artifacts/model.safetensors"
        async with served.http.get(one, headers={"Range": "bytes=100-355"}) as answer:
            assert (answer.status, await answer.read()) == (206, model[100:356])
            assert answer.headers["Content-Range"] == f"bytes 100-355/{len(model)}"
        async with served.http.get(one, headers={"Range": f"bytes={len(model)}-"}) as answer:
            assert answer.status == 416
        async with served.http.get(one, headers={"Range": "bytes=-10"}) as answer:
            assert (answer.status, await answer.read()) == (206, model[-10:])
        with pytest.raises(NotFound, match=r"it has model\.safetensors"):
            await served.client.jobs.artifact(job.id, "other", tmp_path / "other")
        await run(served, make_code("print('hello')\n", MODEL), make_form)  # the code is there already
        await served.client.jobs.delete(job.id)
        assert not [name for name in s3.objects() if job.id in name]


async def test_a_bucket_that_goes_away_in_mid_upload_holds_the_job_up_and_no_more(
    s3: Any, make_server: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    async with make_server(artifacts=f"s3://{s3.bucket}/{tmp_path.name}") as served:
        digest = await served.client.code.upload(make_code("print('hello')\n", MODEL))
        job = await served.client.jobs.create(make_form(digest))
        await asyncio.to_thread(s3.kill)
        with socket.create_server(("127.0.0.1", s3.port)) as cut:
            cut.setblocking(False)
            await served.client.jobs.start(job.id)
            async with asyncio.timeout(60):
                asking, _ = await asyncio.get_running_loop().sock_accept(cut)
            asking.close()  # not even the code can be had
        await asyncio.to_thread(s3.start)
        async with asyncio.timeout(60):
            ended = await served.client.jobs.wait(job.id)
        assert ended.state is JobState.COMPLETED, ended.failure


async def test_an_artifact_that_breaks_off_breaks_the_connection_and_leaves_no_file(
    s3: Any, make_server: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    async with make_server(artifacts=f"s3://{s3.bucket}/{tmp_path.name}") as served:
        job = await run(served, make_code("print('hello')\n", MODEL), make_form)
        place = served.server.controller.context.artifacts.place
        whole = place.read

        async def torn(*args: Any) -> AsyncIterator[bytes]:
            count = 0
            async for piece in whole(*args):
                yield piece
                count += 1
                if count == 2:
                    raise StoreError("The bucket has gone.")

        place.read = torn
        with pytest.raises(FlameError) as caught:
            await served.client.jobs.artifact(job.id, "model.safetensors", tmp_path / "model")
        assert "The bucket" not in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("model")]
        place.read = whole
        path = await served.client.jobs.artifact(job.id, "model.safetensors", tmp_path / "model")
        assert path.stat().st_size == 256 * 20_000


async def test_a_server_refuses_to_start_with_a_bucket_that_it_cannot_use(
    s3: Any, make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="The specified bucket does not exist"):
        async with make_server(artifacts="s3://no-such-bucket-of-flame"):
            pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheimnis")
    with pytest.raises(StoreError, match="the credentials of the environment do not allow it"):
        async with make_server(artifacts=f"s3://{s3.bucket}"):
            pass


async def test_code_that_was_kept_before_a_bucket_was_chosen_is_still_found(
    s3: Any, make_server: Callable[..., Any], make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    async with make_server() as served:
        digest = await served.client.code.upload(make_code())
        job = await served.client.jobs.create(make_form(digest))
    async with make_server(artifacts=f"s3://{s3.bucket}/{tmp_path.name}") as served:
        await served.client.jobs.start(job.id)
        async with asyncio.timeout(60):
            assert (await served.client.jobs.wait(job.id)).state is JobState.COMPLETED
