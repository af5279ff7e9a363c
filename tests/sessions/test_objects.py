"""Values that are shared: one copy at the server, one on each host, gone with the last session that has them."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flame.errors import CodecError, NotFound, SpecError, TaskFailed
from flame.sessions import objects
from flame.sessions.payload import Reference

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit

_arrays = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in ("f8", "f4", "i8", "u1", "bool")]),
    hnp.array_shapes(min_dims=0, min_side=0),
)
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=9)
    | st.binary(max_size=9)
    | _arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(_values)
@settings(max_examples=60, deadline=None)
def test_any_value_comes_back_with_its_arrays_aligned_and_not_to_be_written_to(value: Any) -> None:
    reference, parts = objects.pack(value)
    data = b"".join(parts)
    assert reference.digest == hashlib.sha256(data).hexdigest()
    _same(objects.unpack(memoryview(data)), value)


def _same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, np.ndarray):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype
        assert not got.flags.writeable
    elif isinstance(wanted, list):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            _same(one, other)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            _same(got[key], wanted[key])
    else:
        assert got == wanted


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_damaged_objects_are_refused(rest: bytes, place: int, change: bytes) -> None:
    data = bytearray(b"".join(objects.pack({"a": np.arange(9.0), "b": rest})[1]))
    place %= len(data)
    data[place : place + len(change)] = change
    for spoilt in (bytes(data), rest):
        with contextlib.suppress(CodecError):  # or what it says is another value; nothing else may come of it
            objects.unpack(memoryview(spoilt))


async def test_a_value_that_was_put_is_shared_by_tasks_and_goes_with_its_session(served: Any, tmp_path: Path) -> None:
    kept = tmp_path / "data" / "objects"
    async with served.open(sessionkit.total, max_instances=2) as session:
        reference = await session.put(np.arange(100_000.0))
        assert await session.put(np.arange(100_000.0)) == reference
        answers = [answer async for answer in session.map([[reference, k] for k in range(40)])]
        assert answers == [np.arange(100_000.0).sum() + k for k in range(40)]
        np.testing.assert_array_equal(await session.get(reference), np.arange(100_000.0))
        assert len([path for path in kept.rglob("*") if path.is_file()]) == 1
        with pytest.raises(NotFound, match="has no object"):
            await session.get(Reference("0" * 64))
        with pytest.raises(TaskFailed, match="has no object"):
            await session.invoke([Reference("0" * 64), 1])
    assert [path for path in kept.rglob("*") if path.is_file()] == []


async def test_a_task_can_answer_with_an_object(served: Any) -> None:
    async with served.open(sessionkit.Makes, max_instances=1) as session:
        reference = await session.invoke(1000)
        assert isinstance(reference, Reference)
        np.testing.assert_array_equal(await session.get(reference), np.ones(1000))


async def test_an_object_of_one_session_is_nothing_to_another_that_does_not_have_it(served: Any) -> None:
    async with served.open(sessionkit.total, max_instances=1) as one, served.open(sessionkit.total) as other:
        reference = await one.put(b"x" * 1000)
        with pytest.raises(NotFound):
            await other.get(reference)
        await other.put(b"x" * 1000)
        await one.close()
        assert await other.get(reference) == b"x" * 1000


async def test_bytes_that_are_not_the_digests_are_refused(served: Any) -> None:
    async with served.open(sessionkit.total) as session:
        with pytest.raises(SpecError, match="are not those of the digest"):
            await session._bring(Reference("0" * 64), [b"other"])
        with pytest.raises(NotFound):
            await session.get(Reference("0" * 64))


async def test_large_common_data_is_one_file_that_all_executors_map(served: Any, tmp_path: Path) -> None:
    """What the processes have of it is shared: their own memory does not grow by it."""
    size = 40 << 20
    async with served.open(
        sessionkit.Mapped, common_data={"array": np.ones(size // 8)}, min_instances=3, max_instances=3
    ) as session:
        seen: dict[int, tuple[float, int, str]] = {}
        while len(seen) < 3:
            for pid, *rest in [answer async for answer in session.map(range(30))]:
                seen[pid] = tuple(rest)
    for total, private, path in seen.values():
        assert total == size / 8
        assert private < size / 4
        assert path.startswith(str(tmp_path / "data" / "objects"))


def test_a_host_fetches_an_object_once_and_lets_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {}
    for k in range(4):
        reference, parts = objects.pack(np.full(1000, k))
        packed[reference.digest] = b"".join(parts)
    fetched: list[str] = []

    def fetch(digest: str) -> Any:
        fetched.append(digest)
        yield from (packed[digest][:100], packed[digest][100:])

    monkeypatch.setattr(objects, "CACHE_BYTES", 20_000)
    for _ in range(2):  # as two processes
        host = objects.HostObjects(None, tmp_path, fetch)
        for k, digest in enumerate(list(packed)[:2]):
            assert host.get(Reference(digest))[0] == k
    assert len(fetched) == 2
    for digest in packed:
        host.map(digest)
    assert len(list(tmp_path.glob("??/*"))) == 2
    np.testing.assert_array_equal(
        host.get(Reference(next(iter(packed)))), np.zeros(1000)
    )  # mapped, although its file is gone


def test_what_comes_damaged_is_not_kept(tmp_path: Path) -> None:
    host = objects.HostObjects(None, tmp_path, lambda digest: iter([b"something else"]))
    with pytest.raises(CodecError, match="other bytes"):
        host.map("ab" * 32)
    assert list(tmp_path.glob("??/*")) == []
