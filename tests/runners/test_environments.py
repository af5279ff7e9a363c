"""Cached virtual environments, with the real venv and pip, from wheels made on the spot (no network)."""

import asyncio
import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flame.errors import RunnerError
from flame.runners.environments import Environments, _satisfied


def make_wheel(folder: Path, name: str, version: str = "1.0", requires: str = "") -> str:
    """A wheel with one module; gives the requirement that installs it."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {requires}\n" * bool(requires)
    )
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name}-script = {name}:VERSION.title\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name_inside, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(name_inside, content)
    return f"{name} @ {path.as_uri()}"


async def run(python: str, code: str) -> str:
    process = await asyncio.create_subprocess_exec(
        python, "-P", "-c", code, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode().strip()


async def test_what_the_interpreter_has_already_needs_no_environment(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    assert await environments.python([]) == sys.executable
    assert (
        await environments.python(["msgspec>=0.19", "NumPy", "nothing-like-this; python_version < '3'"])
        == sys.executable
    )
    assert await environments.python(["aiohttp", "coverage[toml]; python_version < '3'"]) == sys.executable
    assert not (tmp_path / "environments").exists()


async def test_an_environment_has_what_is_required_on_top_of_what_the_interpreter_has(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    python = await environments.python([make_wheel(tmp_path, "flametestone")])
    assert python != sys.executable
    assert await run(python, "import flametestone, flame.errors, msgspec; print(flametestone.VERSION)") == "1.0"
    assert "No module named" in await run(sys.executable, "import flametestone")
    script = Path(python).parent / "flametestone-script"
    first, second, *_ = script.read_text().splitlines()  # a path too long for a first line stands in the second
    assert first == f"#!{python}" or (first == "#!/bin/sh" and python in second)


async def test_those_who_want_the_same_share_one_installation(tmp_path: Path) -> None:
    one, two = make_wheel(tmp_path, "flametestone"), make_wheel(tmp_path, "flametesttwo")
    first, second = Environments(tmp_path / "environments"), Environments(tmp_path / "environments")  # two servers
    pythons = await asyncio.gather(
        *(environments.python(order) for environments in (first, second) for order in ([one, two], [two, one, one]))
    )
    assert len(set(pythons)) == 1
    assert len(list((tmp_path / "environments").glob("*/complete"))) == 1
    assert await Environments(tmp_path / "environments").python([one, two]) == pythons[0]


async def test_an_installation_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    bad = make_wheel(
        tmp_path, "flametestone", requires=f"flametesttwo @ {(tmp_path / 'flametesttwo-9.9-py3-none-any.whl').as_uri()}"
    )
    with pytest.raises(RunnerError, match=r"flametestone @ .* could not be installed: .*flametesttwo-9\.9"):
        await environments.python([bad])
    assert [path for path in (tmp_path / "environments").iterdir() if path.is_dir()] == []
    make_wheel(tmp_path, "flametestone")
    assert await environments.python([bad]) != sys.executable  # the same requirement, mended


@pytest.mark.parametrize("requirement", ["-r /etc/passwd", "--index-url=evil", "not a requirement", "", "x>=one"])
async def test_what_is_no_requirement_never_reaches_pip(tmp_path: Path, requirement: str) -> None:
    with pytest.raises(RunnerError, match="none that pip would take"):
        await Environments(tmp_path / "environments").python([requirement])


async def test_what_a_killed_server_left_half_installed_is_built_anew(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    python = Path(await environments.python([make_wheel(tmp_path, "flametestone")]))
    folder = python.parents[1]
    (folder / "complete").unlink()
    python.unlink()
    assert await environments.python([make_wheel(tmp_path, "flametestone")]) == str(python)
    assert await run(str(python), "import flametestone; print(flametestone.VERSION)") == "1.0"


def test_extras_are_looked_into() -> None:
    assert _satisfied(Requirement("flame[mqtt]"))
    assert not _satisfied(Requirement("hypothesis[nothing-like-this-extra,redis]"))
    assert not _satisfied(Requirement("msgspec<0.1"))
    assert not _satisfied(Requirement("flame-nothing-like-this"))


async def test_closing_breaks_off_an_installation(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    waiting = asyncio.ensure_future(environments.python([make_wheel(tmp_path, "flametestone")]))
    while not (tmp_path / "environments").exists():  # noqa: ASYNC110 - the installation sets no event
        await asyncio.sleep(0.005)
    environments.close()
    with pytest.raises(RunnerError, match="broken off"):
        await waiting
    assert not list((tmp_path / "environments").glob("*/complete"))
