"""Artifacts in a bucket of a real S3 server: large ones, and a server that goes away in the middle."""

import asyncio
import json
import os
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flame.artifacts.bucket import BucketArtifacts
from flame.errors import StoreError

PIECE = os.urandom(1 << 20)


async def paced(count: int, reached: dict[int, asyncio.Event]) -> AsyncIterator[bytes]:
    """Pieces of 1 MiB, which say how far they were taken."""
    for number in range(count):
        if number in reached:
            reached[number].set()
        yield PIECE


async def test_a_gigabyte_goes_in_and_out_with_memory_flat(s3: Any, tmp_path: Path) -> None:
    program = """
        import asyncio, json, resource, sys, time
        from flame.artifacts.bucket import BucketArtifacts

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        async def data(count):
            piece = bytes(range(256)) * 4096
            for _ in range(count):
                yield piece

        async def main():
            place = BucketArtifacts(sys.argv[1])
            await place.put("small", b"x")
            begin, idle = time.monotonic(), peak()
            await place.put("a/large", data(1024))
            wrote, size = time.monotonic() - begin, 0
            async for piece in place.read("a/large"):
                assert piece[:1] == bytes([size % 256])
                size += len(piece)
            read = time.monotonic() - begin - wrote
            print(json.dumps({"size": size, "idle": idle, "peak": peak(), "write": wrote, "read": read}))

        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(program), f"s3://{s3.bucket}/gigabyte", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    said = json.loads(out)
    assert said["size"] == 1 << 30 == s3.objects()["gigabyte/a/large"]
    # What is on its way at once is five parts of 16 MiB, and the next in the making.
    assert said["peak"] - said["idle"] < 160, said
    (s3.folder / s3.bucket / "gigabyte/a/large").unlink()


async def test_a_process_may_end_right_behind_its_last_answer(s3: Any) -> None:
    program = """
        import asyncio, sys
        from flame.artifacts.bucket import BucketArtifacts

        async def main():
            place = BucketArtifacts(sys.argv[1])
            await place.put("large", bytes(24 << 20))
            async for _ in place.read("large"):
                pass

        asyncio.run(main())
    """
    for number in range(10):  # half of them were aborted
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(program), f"s3://{s3.bucket}/ends/{number}"
        )
        assert await process.wait() == 0


async def test_a_server_killed_while_it_is_written_to_is_waited_for(s3: Any) -> None:
    place = BucketArtifacts(f"s3://{s3.bucket}/killed")
    reached = {number: asyncio.Event() for number in (40, 100)}
    writing = asyncio.create_task(place.put("a/b", paced(200, reached)))
    for event in reached.values():
        await event.wait()
        await s3.restart(pause=0.5)
    await asyncio.wait_for(writing, 60)
    assert s3.objects()["killed/a/b"] == 200 << 20
    async for piece in place.read("a/b"):
        assert PIECE.startswith(piece[:16]) or piece[:16] in PIECE
    await place.delete("a/b")


async def test_a_server_killed_while_it_is_read_is_waited_for_and_no_byte_is_lost_or_doubled(s3: Any) -> None:
    place = BucketArtifacts(f"s3://{s3.bucket}/read")
    data = os.urandom(64 << 20)
    await place.put("a/b", data)
    received = bytearray()
    restarts = 0
    async for piece in place.read("a/b"):
        received += piece
        if restarts < 2 and len(received) > (restarts + 1) * (16 << 20):
            restarts += 1
            await s3.restart(pause=0.3)
    assert restarts == 2
    assert received == data
    await place.delete("a/b")


async def test_a_server_that_stays_away_is_a_plain_error_and_there_is_never_half_an_object(s3: Any) -> None:
    place = BucketArtifacts(f"s3://{s3.bucket}/gone", patience=1.0)
    await place.put("a/b", b"old")
    reached = {40: asyncio.Event()}
    writing = asyncio.create_task(place.put("a/b", paced(100, reached)))
    await reached[40].wait()
    await asyncio.to_thread(s3.kill)
    try:
        with pytest.raises(StoreError, match=r"The artifact 'a/b' cannot be written in s3://flame-\w+/gone: .*"):
            await writing
        for call in (place.get("a/b"), place.stat("a/b"), place.find("a"), place.delete("a/b")):
            with pytest.raises(StoreError, match=r"cannot be (read|listed) in s3://"):
                await call
    finally:
        await asyncio.to_thread(s3.start)
    assert await place.get("a/b") == b"old"


async def test_wrong_credentials_are_said_without_showing_them(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheimnis")
    place = BucketArtifacts(f"s3://{s3.bucket}/x", patience=1.0)
    for call in (place.put("a/b", b""), place.get("a/b"), place.find("a")):
        with pytest.raises(StoreError, match="credentials of the environment do not allow it") as caught:
            await call
        assert "geheimnis" not in str(caught.value)
    assert "x/a/b" not in s3.objects()


async def test_a_bucket_that_is_not_there_is_said_so(s3: Any) -> None:
    place = BucketArtifacts("s3://no-such-bucket-of-flame", patience=1.0)
    with pytest.raises(StoreError, match=r"cannot be used: The specified bucket does not exist\.$"):
        await place.check()
    with pytest.raises(StoreError, match=r"'a/b' cannot be written in s3://.*: The specified bucket does not exist\.$"):
        await place.put("a/b", b"data")
    await BucketArtifacts(f"s3://{s3.bucket}/prefix").check()


async def test_an_artifact_that_is_replaced_while_it_is_read_is_not_mixed(s3: Any) -> None:
    place = BucketArtifacts(f"s3://{s3.bucket}/mixed")
    await place.put("a/b", bytes(48 << 20))
    reading = place.read("a/b")
    first = await anext(reading)
    await place.put("a/b", b"\1" * (48 << 20))
    await s3.restart()  # breaks the answer that is under way off
    rest, refused = first, ""
    try:
        async for piece in reading:
            rest += piece
    except StoreError as error:
        refused = error.message
    # How much had been sent before the break is the system's choice.
    assert "was replaced while it was read" in refused or rest == bytes(48 << 20)
