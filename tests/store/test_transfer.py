"""Export and import between the kinds of stores."""

import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flame.errors import Conflict, SpecError, StoreError
from flame.store import Store, open_store
from flame.store.base import Kept
from flame.store.transfer import copy, export_to, import_from


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Store]:
    """A store with something of everything."""
    store = open_store("sqlite:///flame.db", tmp_path / "source")
    for n in range(30):
        await store.insert(
            "jobs", f"{n:02}", {"jobId": "j", "n": n, "$odd.": ["ü", 2**70]}, keys=[f"name:{n}", "k" * n]
        )
    await store.replace("jobs", "07", {"state": "failed"}, version=1)
    await store.insert("designs", "1", {})
    await store.append("job/1", [("x", {"n": n}) for n in range(1300)])
    await store.append("job/2", [("large", {"text": "ü" * 100_000}), ("y", {})])
    await store.record([("session/1", n, bytes([n])) for n in range(1, 200)] + [("session/2", 5, b"")])
    for data in (b"", b"code", os.urandom(5_000_000)):
        await store.put_bundle(data)
    yield store
    await store.close()


async def everything(store: Store) -> list[Kept]:
    kept = [entry async for entry in store.dump()]
    merged: dict[str, list] = {}
    for entry in kept:
        if hasattr(entry, "events"):
            merged.setdefault(entry.stream, []).extend(entry.events)
        if hasattr(entry, "records"):
            merged.setdefault(entry.journal, []).extend(entry.records)
    whole = (entry for entry in kept if not hasattr(entry, "events") and not hasattr(entry, "records"))
    return sorted(whole, key=repr) + sorted(merged.items(), key=repr)


async def test_a_file_carries_everything_from_one_store_to_another(source: Store, tmp_path: Path) -> None:
    count = await export_to(source, tmp_path / "state.zip")
    target = open_store("sqlite:///flame.db", tmp_path / "target")
    assert await import_from(target, tmp_path / "state.zip") >= count - 2  # streams may be cut elsewhere
    assert await everything(target) == await everything(source)
    assert (await target.append("job/2", [("z", {})]))[0].seq == 3
    with pytest.raises(Conflict):
        await target.insert("jobs", "new", {}, keys=["name:3"])
    await target.close()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target", "state.zip"}


async def test_state_moves_to_mongodb_and_back(source: Store, mongo_url: str, tmp_path: Path) -> None:
    there, back = open_store(mongo_url, tmp_path), open_store("sqlite:///flame.db", tmp_path / "back")
    await copy(source, there)
    assert await everything(there) == await everything(source)
    assert (await there.get("jobs", "07")) == ("07", 2, {"state": "failed"})
    with pytest.raises(Conflict):
        await there.insert("jobs", "new", {}, keys=["name:3"])
    await export_to(there, tmp_path / "state.zip")
    await import_from(back, tmp_path / "state.zip")
    assert await everything(back) == await everything(source)
    assert (await there.append("job/1", [("z", {})]))[0].seq == 1301
    await there.close()
    await back.close()


async def test_an_import_needs_an_empty_store(source: Store, tmp_path: Path) -> None:
    await export_to(source, tmp_path / "state.zip")
    with pytest.raises(Conflict, match="not empty"):
        await import_from(source, tmp_path / "state.zip")


async def test_an_empty_store_can_be_exported(tmp_path: Path) -> None:
    store = open_store("sqlite:///flame.db", tmp_path)
    assert await export_to(store, tmp_path / "state.zip") == 0
    assert await import_from(store, tmp_path / "state.zip") == 0
    await store.close()


async def test_what_is_no_export_is_refused_with_its_name(source: Store, tmp_path: Path) -> None:
    target = open_store("sqlite:///flame.db", tmp_path / "target")
    path = tmp_path / "state.zip"
    with pytest.raises(SpecError, match=r"state\.zip: This is no export"):
        await import_from(target, path)
    path.write_bytes(b"something else")
    with pytest.raises(SpecError, match="no export"):
        await import_from(target, path)
    await export_to(source, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in (("flame.json", b'{"format": 2}'), ("documents.ndjson", b"{}"), ("bundles/" + "0" * 64, b"x")):
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in ({"flame.json": members["flame.json"]} | {name: content}).items():
                archive.writestr(member, data)
        with pytest.raises(SpecError, match=r"state\.zip: "):
            await import_from(target, path)
    await target.close()


async def test_an_export_that_cannot_be_written_leaves_nothing(source: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        await export_to(source, tmp_path / "nowhere" / "state.zip")
    (tmp_path / "state.zip").mkdir()
    (tmp_path / "state.zip" / "full").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        await export_to(source, tmp_path / "state.zip")
    assert not (tmp_path / "state.zip.part").exists()
