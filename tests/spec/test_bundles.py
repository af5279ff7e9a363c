"""Code bundles are the same for the same code, and never leave their folder."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import Conflict, FlameError, SpecError, UsageError
from flame.spec import bundle

MAIN = b"print('hello')\n"


def zip_of(*entries: tuple[str, bytes] | tuple[str, bytes, int], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip as anybody may make one; an entry's third part is its mode."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data, *mode in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            if mode:
                info.external_attr = mode[0] << 16
            archive.writestr(info, data)
    return buffer.getvalue()


GOOD = zip_of(("trainer/main.py", MAIN), ("trainer/lib/model.py", b"x"), ("aggregator/main.py", MAIN))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    for name, data in {
        "trainer/main.py": MAIN,
        "trainer/lib/model.py": b"x",
        "aggregator/main.py": MAIN,
        "trainer/__pycache__/main.cpython-311.pyc": b"0",
        "trainer/.hidden": b"0",
        ".git/config": b"0",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# --- packing


def test_the_same_code_gives_the_same_bytes_wherever_it_comes_from(code: Path, tmp_path: Path) -> None:
    packed = bundle.pack(code)
    os.utime(code / "trainer" / "main.py", (0, 0))
    (code / "trainer" / "main.py").chmod(0o700)
    assert bundle.pack(code) == packed
    assert bundle.repack(GOOD) == packed
    (tmp_path / "code.zip").write_bytes(GOOD)
    assert bundle.pack(tmp_path / "code.zip") == packed
    assert (
        bundle.repack(
            zip_of(
                *(
                    (f"wrap/{name}", data)
                    for name, data in {
                        "trainer/main.py": MAIN,
                        "trainer/lib/model.py": b"x",
                        "aggregator/main.py": MAIN,
                    }.items()
                )
            )
        )
        == packed
    )
    assert bundle.folders(packed) == {"aggregator": True, "trainer": True}
    assert zipfile.ZipFile(io.BytesIO(packed)).namelist() == [
        "aggregator/main.py",
        "trainer/lib/model.py",
        "trainer/main.py",
    ]


def test_only_the_roles_are_taken_where_they_are_known(code: Path) -> None:
    assert set(bundle.folders(bundle.pack(code, ["trainer"]))) == {"trainer"}
    assert set(bundle.folders(bundle.repack(GOOD, ["aggregator"]))) == {"aggregator"}
    (code / "data.bin").write_bytes(b"0")
    assert set(bundle.folders(bundle.pack(code, ["trainer", "aggregator"]))) == {"aggregator", "trainer"}


def test_a_lone_role_is_no_wrapping() -> None:
    alone = zip_of(("trainer/main.py", MAIN), ("trainer/lib/main.py", MAIN))
    assert bundle.folders(bundle.repack(alone)) == {"trainer": True}
    assert bundle.folders(bundle.repack(alone, ["trainer"])) == {"trainer": True}
    wrapped = zip_of(("mnist/trainer/main.py", MAIN), ("mnist/README.md", b""), ("__MACOSX/mnist/._x", b""))
    assert bundle.folders(bundle.repack(wrapped, ["trainer"])) == {"trainer": True}


def test_what_cannot_be_packed_says_so(code: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder or zip file"):
        bundle.pack(tmp_path / "nothing")
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(SpecError, match=r"^bad: this is no zip file: "):
        bundle.pack(tmp_path / "bad.zip", name="bad")
    (tmp_path / "secret").write_text("x")
    (code / "trainer" / "link.py").symlink_to(tmp_path / "secret")
    with pytest.raises(SpecError, match=r"code: trainer/link.py: this link leads out of the code's folder"):
        bundle.pack(code, name="code")
    (code / "trainer" / "link.py").unlink()
    (code / "trainer" / "link.py").symlink_to(code / "trainer" / "link.py")
    with pytest.raises(SpecError, match=r"trainer/link.py: this link leads out of the code's folder"):
        bundle.pack(code)
    (code / "trainer" / "link.py").unlink()
    Path(os.fsdecode(os.fsencode(code / "trainer") + b"/\xff.py")).write_text("x")
    with pytest.raises(SpecError, match=r"a name that is no UTF-8 cannot be packed"):
        bundle.pack(code)
    Path(os.fsdecode(os.fsencode(code / "trainer") + b"/\xff.py")).unlink()
    (code / "trainer" / "lib2").symlink_to(code / "trainer" / "lib")
    with pytest.raises(SpecError, match="a link to a folder cannot be packed"):
        bundle.pack(code)
    (code / "trainer" / "lib2").unlink()
    os.mkfifo(code / "trainer" / "pipe")
    with pytest.raises(SpecError, match=r"trainer/pipe: this is no plain file"):
        bundle.pack(code)


def test_a_link_within_the_code_is_packed_as_a_file(code: Path) -> None:
    (code / "aggregator" / "model.py").symlink_to(Path("../trainer/lib/model.py"))
    packed = bundle.pack(code)
    assert zipfile.ZipFile(io.BytesIO(packed)).read("aggregator/model.py") == b"x"


def test_code_that_is_too_large_is_refused(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_UNPACKED", 20)
    with pytest.raises(SpecError, match="data do not belong into it"):
        bundle.pack(code)
    monkeypatch.setattr(bundle, "MAX_UNPACKED", 10_000)
    monkeypatch.setattr(bundle, "MAX_PACKED", 20)
    with pytest.raises(SpecError, match="data do not belong into it"):
        bundle.pack(code)
    with pytest.raises(SpecError, match="are allowed"):
        bundle.folders(GOOD)


# --- the check of the roles


def test_a_role_without_code_or_main_is_refused() -> None:
    code = bundle.folders(zip_of(("trainer/main.py", MAIN), ("aggregator/lib/main.py", MAIN), ("top.py", MAIN)))
    bundle.check_roles(code, ["trainer"])
    with pytest.raises(SpecError, match=r"^the code: aggregator: role 'aggregator' has no main.py in its folder"):
        bundle.check_roles(code, ["trainer", "aggregator"])
    with pytest.raises(
        SpecError,
        match=r"role 'boss' has no code: add a folder 'boss' with a main.py \(it has 'aggregator' and 'trainer'\)",
    ):
        bundle.check_roles(code, ["boss"], "x.zip")
    with pytest.raises(SpecError, match="it has no folder at all"):
        bundle.check_roles({}, ["boss"])


# --- unpacking


def test_only_the_roles_folder_is_unpacked(tmp_path: Path) -> None:
    assert bundle.extract(GOOD, "trainer", tmp_path) == tmp_path / "trainer"
    assert tree(tmp_path) == {"trainer/main.py": MAIN, "trainer/lib/model.py": b"x"}
    with pytest.raises(Conflict, match="exists already"):
        bundle.extract(GOOD, "trainer", tmp_path)
    bundle.extract(GOOD, "aggregator", tmp_path)
    assert "aggregator/main.py" in tree(tmp_path)


def test_unpacked_files_are_plain_and_not_executable(tmp_path: Path) -> None:
    bundle.extract(zip_of(("trainer/main.py", MAIN, stat.S_IFREG | 0o4777)), "trainer", tmp_path)
    mode = (tmp_path / "trainer" / "main.py").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_ISGID | 0o111)


EVIL: dict[str, bytes] = {
    "parent": zip_of(("trainer/main.py", MAIN), ("trainer/../../evil", b"x")),
    "parent at the top": zip_of(("trainer/main.py", MAIN), ("../evil", b"x")),
    "absolute": zip_of(("trainer/main.py", MAIN), ("/tmp/evil", b"x")),
    "drive": zip_of(("trainer/main.py", MAIN), ("C:/evil", b"x")),
    "backslash": zip_of(("trainer/main.py", MAIN), ("trainer\\..\\evil", b"x")),
    "dot": zip_of(("trainer/main.py", MAIN), ("trainer/./evil", b"x")),
    "empty part": zip_of(("trainer/main.py", MAIN), ("trainer//evil", b"x")),
    "control character": zip_of(("trainer/main.py", MAIN), ("trainer/e\nvil", b"x")),
    "link": zip_of(("trainer/main.py", MAIN), ("trainer/link", b"/etc/passwd", stat.S_IFLNK | 0o777)),
    "link to a folder, then a file in it": zip_of(
        ("trainer/main.py", MAIN), ("trainer/out", b"/tmp", stat.S_IFLNK | 0o777), ("trainer/out/evil", b"x")
    ),
    "device": zip_of(("trainer/main.py", MAIN), ("trainer/null", b"", stat.S_IFCHR | 0o666)),
    "file and folder": zip_of(("trainer/main.py", MAIN), ("trainer/a", b"x"), ("trainer/a/b", b"x")),
    "too long": zip_of(("trainer/main.py", MAIN), ("trainer/" + "x" * 300, b"x")),
    "too deep": zip_of(("trainer/main.py", MAIN), ("trainer/" + "x/" * 60 + "y", b"x")),
    "the role itself a file": zip_of(("trainer", b"x")),
    "nothing": zip_of(),
    "no main": zip_of(("trainer/train.py", MAIN)),
    "no zip": b"PK\x03\x04" + b"\0" * 100,
    "empty bytes": b"",
}


@pytest.mark.parametrize("what", EVIL)
def test_an_evil_bundle_writes_nothing(what: str, tmp_path: Path) -> None:
    into = tmp_path / "inside" / "work"
    into.mkdir(parents=True)
    with pytest.raises(SpecError):
        bundle.extract(EVIL[what], "trainer", into)
    assert list(into.iterdir()) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "work"]


@pytest.mark.parametrize("what", [key for key in EVIL if key not in ("nothing", "no main", "the role itself a file")])
def test_an_evil_bundle_is_refused_at_upload_as_well(what: str) -> None:
    with pytest.raises(SpecError):
        bundle.folders(EVIL[what])
    with pytest.raises(SpecError):
        bundle.repack(EVIL[what])


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("trainer/main.py", MAIN)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("trainer/main.py", b"evil")
    with pytest.raises(SpecError, match=r"trainer/main.py: this name stands in the bundle twice"):
        bundle.extract(buffer.getvalue(), "trainer", tmp_path)


def test_a_name_with_a_nul_is_judged_as_it_was_written(tmp_path: Path) -> None:
    data = zip_of(("trainer/main.py", MAIN), ("trainer/good.py@/evil", b"x")).replace(b"good.py@", b"good.py\0")
    with pytest.raises(SpecError, match="control character"):
        bundle.extract(data, "trainer", tmp_path)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of(("trainer/main.py", MAIN)))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(SpecError, match="encrypted"):
        bundle.extract(bytes(data), "trainer", tmp_path)


def test_a_bomb_is_refused_by_what_it_claims_and_by_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_UNPACKED", 1 << 20)
    honest = zip_of(("trainer/main.py", b"\0" * (2 << 20)))
    with pytest.raises(SpecError, match="unfolds to more than 1 MiB"):
        bundle.extract(honest, "trainer", tmp_path)
    at = honest.index(b"PK\x01\x02") + 24
    lying = honest[:at] + (100).to_bytes(4, "little") + honest[at + 4 :]
    with pytest.raises(SpecError):
        bundle.extract(lying, "trainer", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_FILES", 2)
    with pytest.raises(SpecError, match="the bundle has 3 entries; 2 are allowed"):
        bundle.folders(GOOD)


def test_a_damaged_entry_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    data = bytearray(zip_of(("trainer/main.py", MAIN), compression=zipfile.ZIP_STORED))
    data[data.index(MAIN)] ^= 1
    with pytest.raises(SpecError, match=r"trainer/main.py: this entry cannot be unpacked: Bad CRC-32"):
        bundle.extract(bytes(data), "trainer", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["", ".", "..", "a/b", "/etc", "../x"])
def test_a_role_that_is_no_folders_name_is_refused(role: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        bundle.extract(GOOD, role, tmp_path)


parts = st.sampled_from(
    ["trainer", "main.py", "..", ".", "", "/", "a", "b", "\\", "C:", "~", "x" * 256, ".hidden", "\0", "é", "\ud800"]
)


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("outer")


def test_any_names_stay_inside_or_are_refused(fresh: Callable[[], Path]) -> None:
    @given(st.lists(st.lists(parts, min_size=1, max_size=5).map("/".join), max_size=4, unique=True))
    def check(names: list[str]) -> None:
        outer = fresh()
        into = outer / "a" / "b" / "c"
        into.mkdir(parents=True)
        try:
            data = zip_of(("trainer/main.py", MAIN), *((name, b"x") for name in names if name != "trainer/main.py"))
        except (UnicodeEncodeError, ValueError, UserWarning):
            return
        try:
            bundle.extract(data, "trainer", into)
        except SpecError:
            assert list(into.iterdir()) == []
        outside = [path for path in outer.rglob("*") if path.is_file() and not path.is_relative_to(into / "trainer")]
        assert outside == []

    check()


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 60))
def test_a_damaged_zip_is_read_or_refused(noise: bytes, at: int, cut: int) -> None:
    data = GOOD[:at] + noise + GOOD[at + cut :]
    try:
        bundle.folders(data)
        bundle.repack(data)
    except FlameError:
        pass
