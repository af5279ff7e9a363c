"""What is particular to artifacts in a folder, and to choosing a place."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flame.artifacts import open_artifacts
from flame.artifacts.files import FileArtifacts
from flame.errors import MissingExtra, StoreError, UsageError


async def test_half_written_files_of_a_killed_process_are_removed_and_those_in_work_are_not(tmp_path: Path) -> None:
    place = FileArtifacts(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".partial-killed").write_bytes(b"half")

    async def data() -> AsyncIterator[bytes]:
        yield b"first"
        FileArtifacts(tmp_path).sweep("a")
        yield b"second"

    await place.put("a/b", data())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]
    assert await place.get("a/b") == b"firstsecond"
    await place.put("artifacts/job/model", b"whole")
    (tmp_path / "artifacts" / "job" / ".partial-killed").write_bytes(b"half")
    await FileArtifacts(tmp_path).check()  # as a server does when it starts
    assert [path.name for path in (tmp_path / "artifacts" / "job").iterdir()] == ["model"]


async def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file in the way")
    with pytest.raises(StoreError, match="'a/b' cannot be written"):
        await FileArtifacts(tmp_path).put("a/b", b"data")


async def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    class Full(FileArtifacts):
        def _path(self, name: str) -> Path:
            return Path("/dev/full") if name == "full" else super()._path(name)

    place = Full(tmp_path)

    async def data() -> AsyncIterator[bytes]:
        yield b"first"
        raise OSError(28, "No space left on device")  # the sender's own: passed on as it is

    with pytest.raises(OSError, match="No space"):
        await place.put("a/b", data())
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    error = place._failure("written", "a/b", OSError(28, "No space left on device"))
    assert "is full. Free some space" in error.message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("flame", "of no known kind"),
        ("ftp://bucket", "of no known kind"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("file://", "names no folder"),
        ("s3://key:geheim@bucket", "must hold no credentials"),
        ("s3://bucket?secret_access_key=geheim", "must hold no credentials"),
        ("ftp://key:geheim@bucket", "of no known kind"),
    ],
)
def test_what_is_no_place_is_refused_without_its_secrets(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_artifacts(url, tmp_path)
    assert "geheim" not in str(caught.value)


def test_without_the_library_the_extra_that_brings_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "flame.artifacts.bucket", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtra, match=r"pip install 'flame\[cloud\]'"):
        open_artifacts("s3://bucket", tmp_path)


@pytest.mark.parametrize("late", [False, True])
async def test_a_worker_s_file_that_is_a_link_to_somebody_else_s_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Neither if it is one from the beginning, nor if it becomes one while it is looked at."""
    secret, offered = tmp_path / "secret", tmp_path / "offered"
    secret.write_bytes(b"12345678")
    offered.write_bytes(b"checkpnt")
    link = os.link

    def swap() -> None:
        offered.unlink()
        offered.symlink_to(secret)

    def swapping(source: Path, target: Path, **options: bool) -> None:
        swap()
        link(source, target, **options)

    if late:
        monkeypatch.setattr("flame.artifacts.files.os.link", swapping)
    else:
        swap()
    place = FileArtifacts(tmp_path / "place")
    assert not await place.adopt("a/b", offered, 8)
    assert await place.stat("a/b") is None
    assert not [path for path in (tmp_path / "place").rglob("*") if not path.is_dir()]
