"""What every place of artifacts promises: a folder, and a bucket on a real S3 server."""

import asyncio
import hashlib
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flame.artifacts import Artifacts, open_artifacts
from flame.artifacts.base import addressed
from flame.errors import NotFound, UsageError


@pytest.fixture(params=["files", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        return f"s3://{server.bucket}/{tmp_path.name}"
    return (tmp_path / "place").as_uri()


@pytest.fixture
async def place(url: str, tmp_path: Path) -> AsyncIterator[Artifacts]:
    place = open_artifacts(url, tmp_path)
    yield place
    await place.close()


async def pieces(*data: bytes, fault: BaseException | None = None) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece
    if fault:
        raise fault


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1, (16 << 20), (33 << 20) + 7])
async def test_an_artifact_is_read_back_as_it_was_written(place: Artifacts, size: int) -> None:
    data = os.urandom(size)
    kept = await place.put("models/job-1/model.safetensors", pieces(data[:1000], data[1000:]))
    assert kept.size == size
    assert [one.size for one in await place.find("models")] == [size]
    assert await place.get("models/job-1/model.safetensors") == data


async def test_a_part_of_an_artifact_is_read_alone(place: Artifacts) -> None:
    data = os.urandom(3_000_000)
    await place.put("a/b", data)
    for start, end in ((0, 10), (5, None), (2_999_999, None), (1_500_000, 2_500_000), (2_999_990, 9_000_000)):
        assert b"".join([piece async for piece in place.read("a/b", start, end)]) == data[start:end]
    for start, end in ((3_000_000, None), (5_000_000, None), (7, 7)):
        assert [piece async for piece in place.read("a/b", start, end)] == []


async def test_what_is_absent_is_said_so(place: Artifacts) -> None:
    assert await place.stat("a/b") is None
    assert not await place.delete("a/b")
    assert await place.find("a") == []
    await place.delete_all("a")
    with pytest.raises(NotFound, match="no artifact 'a/b'"):
        await place.get("a/b")


async def test_a_list_is_of_a_folder_and_in_order(place: Artifacts) -> None:
    for name in ("jobs/2/b", "jobs/1/z", "jobs/1/a", "jobs/10/a", "jobs/1/deep/er"):
        await place.put(name, name.encode())
    assert [(found.name, found.size) for found in await place.find("jobs/1")] == [
        ("jobs/1/a", 8),
        ("jobs/1/deep/er", 14),
        ("jobs/1/z", 8),
    ]
    assert len(await place.find("jobs")) == 5
    await place.delete_all("jobs/1")
    assert [found.name for found in await place.find("jobs")] == ["jobs/10/a", "jobs/2/b"]
    assert await place.delete("jobs/2/b")
    assert [found.name for found in await place.find("jobs")] == ["jobs/10/a"]


async def test_bytes_are_kept_once_under_their_digest(place: Artifacts) -> None:
    data = b"code" * 1000
    digest = await place.keep("bundles", data)
    assert digest == hashlib.sha256(data).hexdigest() == await place.keep("bundles", data)
    assert await place.get(addressed("bundles", digest)) == data
    assert len(await place.find("bundles")) == 1


@pytest.mark.parametrize("size", [10, 40 << 20])
async def test_a_sender_that_fails_changes_nothing_and_its_error_is_passed_on(place: Artifacts, size: int) -> None:
    await place.put("a/b", b"old")
    with pytest.raises(LookupError, match="the sender's own"):
        await place.put("a/b", pieces(bytes(size), bytes(size), fault=LookupError("the sender's own")))
    assert await place.get("a/b") == b"old"
    assert [found.name for found in await place.find("a")] == ["a/b"]


@pytest.mark.parametrize("size", [10, 40 << 20])
async def test_a_cancelled_sender_changes_nothing(place: Artifacts, size: int) -> None:
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield bytes(size)
        waiting.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(place.put("a/b", endless()))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await place.stat("a/b") is None
    await place.put("a/b", b"new")  # nothing of the first one is in the way
    assert await place.get("a/b") == b"new"


async def test_of_several_writers_one_is_read_whole(place: Artifacts) -> None:
    each = [bytes([n]) * (18 << 20) for n in range(4)]
    await asyncio.gather(*(place.put("a/b", pieces(data)) for data in each))
    assert await place.get("a/b") in each


@pytest.mark.parametrize("name", ["", "/a", "a/", "../a", "a/../b", "a//b", ".partial-x", "a\0b", "ü", "a" * 1000])
async def test_a_name_leads_nowhere_else(place: Artifacts, name: str) -> None:
    for call in (place.put(name, b""), place.stat(name), place.get(name), place.find(name), place.delete(name)):
        with pytest.raises(UsageError, match="cannot be an artifact's name"):
            await call


async def test_a_writer_killed_at_any_moment_leaves_the_old_artifact(
    place: Artifacts, url: str, tmp_path: Path
) -> None:
    await place.put("a/b", b"old")
    program = """
        import asyncio, sys
        from pathlib import Path
        from flame.artifacts import open_artifacts

        async def endless():
            while True:
                yield bytes(1 << 20)
                print(".", flush=True)

        asyncio.run(open_artifacts(sys.argv[1], Path(sys.argv[2])).put("a/b", endless()))
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), url, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    for _ in range(50):  # several parts are there by then
        assert await process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert await place.get("a/b") == b"old"
    assert [found.name for found in await place.find("a")] == ["a/b"]
