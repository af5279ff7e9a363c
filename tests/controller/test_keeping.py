"""Logs, artifacts, keys, leases and the queue: each by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.artifacts import open_artifacts
from flame.controller.artifacts import JobArtifacts
from flame.controller.keys import Keys
from flame.controller.leases import Leases
from flame.controller.logs import Logs
from flame.controller.submission import new_id
from flame.errors import NotFound, SpecError, StoreError

WHO = ("job", "task", 1)


async def whole(logs: Logs, **how: Any) -> bytes:
    return b"".join([piece async for piece in logs.read(*WHO, **how)])


async def test_a_log_grows_at_its_end_alone_and_says_where_that_is(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    assert await logs.append(*WHO, 0, b"hello ") == 6
    assert await logs.append(*WHO, 0, b"hello ") == 6, "a repeated call writes nothing"
    assert await logs.append(*WHO, 9, b"lost") == 6, "nor does one that leaves a gap"
    assert await logs.append(*WHO, 6, b"world\n") == 12
    assert await logs.append(*WHO, 12, b"") == 12
    assert await whole(logs) == b"hello world\n"
    assert await whole(logs, offset=6) == b"world\n"
    assert await whole(Logs(tmp_path)) == b"hello world\n", "it is still there after a restart"


async def test_pieces_that_race_for_one_place_are_not_torn(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    logs.open(*WHO)
    pieces = [bytes([65 + number]) * 100_000 for number in range(8)]
    sizes = await asyncio.gather(*(logs.append(*WHO, 0, piece) for piece in pieces))
    assert set(sizes) == {100_000}
    assert len(set(await whole(logs))) == 1


@given(st.lists(st.binary(max_size=30), max_size=12), st.integers(0, 100))
def test_a_log_is_whole_however_it_was_cut(pieces: list[bytes], offset: int) -> None:
    import tempfile

    async def check() -> None:
        with tempfile.TemporaryDirectory() as folder:
            logs, size = Logs(Path(folder)), 0
            for piece in pieces:
                size = await logs.append(*WHO, size, piece)
            assert size == sum(map(len, pieces))
            assert await whole(logs, offset=min(offset, size)) == b"".join(pieces)[min(offset, size) :]

    asyncio.run(check())


async def test_who_follows_a_log_gets_each_piece_as_it_comes_and_then_the_end(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    logs.open(*WHO)
    following = logs.read(*WHO, follow=True)
    assert await anext(following) == b"", "nothing so far"
    coming = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0)
    await logs.append(*WHO, 0, b"one")
    assert await coming == b"one"
    await logs.append(*WHO, 3, b"two")
    logs.close(*WHO)
    assert [piece async for piece in following if piece] == [b"two"]
    assert await whole(logs, follow=True) == b"onetwo", "a closed log does not keep anyone waiting"


async def test_a_long_log_is_read_in_parts_and_its_tail_is_short(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    data = b"".join(b"%07d\n" % number for number in range(100_000))
    await logs.append(*WHO, 0, data)
    pieces = [piece async for piece in logs.read(*WHO)]
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= 256 * 1024
    assert logs.tail(*WHO, lines=2) == ["0099998", "0099999"]
    await logs.append(*WHO, len(data), b"x" * 100_000)
    assert len(logs.tail(*WHO)[-1]) == 2000
    assert Logs(tmp_path / "nowhere").tail(*WHO) == []


async def test_a_log_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("in the way")
    logs = Logs(tmp_path)
    logs.open(*WHO)
    for data in (b"small", b"x" * 100_000):
        with pytest.raises(StoreError, match="cannot be written"):
            await logs.append(*WHO, 0, data)
    assert await logs.size(*WHO) == 0


async def pieces_of(*pieces: bytes, fail: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    if fail is not None:
        raise fail


async def test_an_artifact_is_whole_or_not_there(tmp_path: Path) -> None:
    artifacts = JobArtifacts(open_artifacts(None, tmp_path), limit=10)
    path = Path(await artifacts.put("job", "model.safetensors", pieces_of(b"abc", b"def")))
    assert path == tmp_path / "artifacts" / "job" / "model.safetensors"
    assert path.read_bytes() == b"abcdef"
    assert (await artifacts.find("job", "model.safetensors")).size == 6
    with pytest.raises(SpecError, match="larger than the 10 bytes"):
        await artifacts.put("job", "model.safetensors", pieces_of(b"x" * 6, b"x" * 6))
    with pytest.raises(ConnectionResetError):
        await artifacts.put("job", "model.safetensors", pieces_of(b"x", fail=ConnectionResetError()))
    assert path.read_bytes() == b"abcdef", "the earlier one is untouched"
    assert os.listdir(path.parent) == ["model.safetensors"], "and nothing else is left"
    with pytest.raises(NotFound, match=r"it has model\.safetensors"):
        await artifacts.find("job", "other")
    with pytest.raises(NotFound, match="it has none"):
        await artifacts.find("nobody", "other")
    await artifacts.remove("job")
    assert not path.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "x" * 201, "a\n"])
def test_an_artifacts_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError):
        JobArtifacts(open_artifacts(None, tmp_path), limit=10).name("job", name)


def test_keys_are_the_same_after_a_restart_and_open_nothing_else(tmp_path: Path) -> None:
    keys, again = Keys.load(tmp_path / "secret"), Keys.load(tmp_path / "secret")
    assert keys.task("t", 1) == again.task("t", 1)
    assert keys.opens(keys.task("t", 1), "t", 1)
    assert len({keys.task("t", 1), keys.task("t", 2), keys.task("t.1", 1), keys.job("t")}) == 4
    assert Keys.load(tmp_path / "other").task("t", 1) != keys.task("t", 1)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(StoreError, match="is damaged"):
        Keys.load(tmp_path / "secret")
    with pytest.raises(StoreError, match="cannot be read or made"):
        Keys.load(tmp_path / "no" / "secret")


async def test_a_lease_that_is_not_renewed_is_lost_once() -> None:
    lost: list[Any] = []
    leases = Leases(0.1, lost.append)
    leases.begin("silent")
    leases.begin("lively")
    leases.begin("dropped")
    leases.drop("dropped")
    leases.renew("stranger")
    async with asyncio.timeout(10):
        while not lost:
            leases.renew("lively")
            await asyncio.sleep(0.005)
    assert lost == ["silent"]
    assert "silent" not in leases
    assert "stranger" not in leases
    leases.close()


async def test_a_server_that_was_held_up_blames_no_worker() -> None:
    import time

    lost: list[Any] = []
    leases = Leases(0.2, lost.append)
    leases.begin("worker")
    time.sleep(0.5)  # noqa: ASYNC251 - the process is stopped, so nobody could be heard
    await asyncio.sleep(0.01)
    leases.renew("worker")
    await asyncio.sleep(0.01)
    assert not lost
    leases.close()


def test_ids_sort_by_time_even_when_the_clock_stands_still() -> None:
    ids = [new_id() for _ in range(1000)]
    assert ids == sorted(ids)
    assert all(len(one) == 24 for one in ids)
