"""Cached virtual environments for the dependencies that jobs name.

The environment of a set of requirements is built once and shared by all workers that name the same set.
It sits on top of the interpreter's own packages: Flame and what is installed beside it are seen, and only what is
missing is added. Nothing is built where the interpreter has it all.

An environment is built where it will stay, since the scripts in it hold its path, and it counts only once the
file ``complete`` is in it. A lock keeps a second server from building the same one; whatever is found without that file
by the holder of the lock was left by a killed one and is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from flame.errors import RunnerError

# A virtual environment made from a virtual environment sees the packages of the interpreter below, not
# of the one it was made from. So those folders are added by name, with what their own .pth files add.
_FOLDERS = """
import json, os, site, sys, sysconfig
own = sysconfig.get_path("purelib", vars={"base": sys.argv[1], "platbase": sys.argv[1]})
above = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
print(json.dumps([own, above]))
"""


class Environments:
    """The virtual environments of one host.

    :param root: the folder that holds them; made at the first use.
    :param python: the interpreter they are based on; None for the running one.
    """

    def __init__(self, root: Path, python: str | None = None) -> None:
        self._root = root.absolute()
        self._python = python or sys.executable
        self._own = python is None or Path(python) == Path(sys.executable)
        self._building: dict[str, asyncio.Task[str]] = {}

    async def python(self, requirements: Sequence[str]) -> str:
        """The path of an interpreter that has what is required. Those who ask for the same wait for one installation.

        :param requirements: as pip takes them, such as ``scikit-learn>=1.4``.
        :raises flame.errors.RunnerError: a requirement is malformed, or cannot be installed; with pip's last lines.
        """
        wanted = sorted({str(_parse(requirement)) for requirement in requirements})
        if not wanted or (self._own and all(_satisfied(Requirement(entry)) for entry in wanted)):
            return self._python
        version = ".".join(map(str, sys.version_info[:3]))
        key = hashlib.sha256(json.dumps([self._python, version, wanted]).encode()).hexdigest()[:32]
        if key not in self._building:
            task = self._building[key] = asyncio.create_task(self._have(self._root / key, wanted))
            task.add_done_callback(lambda _: self._building.pop(key))
        building = self._building[key]
        await asyncio.wait([building])  # a caller that is cancelled does not take the others' installation along
        if building.cancelled():
            raise RunnerError(f"The installation of {', '.join(wanted)} was broken off, since the server ends.")
        return building.result()

    def close(self) -> None:
        """Break off what is being installed; those who wait for it get a RunnerError."""
        for task in self._building.values():
            task.cancel()

    async def _have(self, folder: Path, requirements: Sequence[str]) -> str:
        complete = folder / "complete"
        if not complete.exists():
            try:
                async with _locked(folder.with_suffix(".lock")):
                    if not complete.exists():
                        await self._build(folder, requirements)
                        complete.write_text("\n".join(requirements))
            except OSError as error:
                raise RunnerError(f"The environment {folder} cannot be made: {error}.") from error
        return str(folder / "bin" / "python")

    async def _build(self, folder: Path, requirements: Sequence[str]) -> None:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        names = ", ".join(requirements)
        try:
            await _run(names, self._python, "-m", "venv", "--system-site-packages", "--without-pip", str(folder))
            own, above = json.loads(await _run(names, self._python, "-c", _FOLDERS, str(folder)))
            lines = [f"import site; site.addsitedir({path!r})\n" for path in above]
            (Path(own) / "flame-base.pth").write_text("".join(lines))
            python = str(folder / "bin" / "python")
            options = ["--no-input", "--disable-pip-version-check", "--quiet"]
            await _run(names, python, "-m", "pip", "install", *options, *requirements)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
        yield


async def _run(names: str, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLAME_"))}
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        last = " / ".join((errors or output).decode(errors="replace").strip().splitlines()[-5:])
        raise RunnerError(f"The dependencies {names} could not be installed: {last}")
    return output.decode()


def _parse(requirement: str) -> Requirement:
    try:  # also keeps options out of pip's command line
        return Requirement(requirement)
    except InvalidRequirement as error:
        raise RunnerError(f"The dependency {requirement!r} is none that pip would take: {error}.") from error


def _satisfied(requirement: Requirement) -> bool:
    """True if the running interpreter has it, with what its extras need."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    if requirement.url is not None:
        return False
    try:
        distribution = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return False
    for extra in requirement.extras:
        for entry in distribution.requires or ():
            needed = Requirement(entry)
            if needed.marker is None or not needed.marker.evaluate({"extra": extra}):
                continue
            needed.marker = None
            if not _satisfied(needed):
                return False
    return True


def main(arguments: Sequence[str]) -> int:
    """Install in a container, before its worker starts: ``python -m flame.runners.environments FOLDER REQUIREMENT...``.

    The path of the interpreter that has it all is written to ``FOLDER/python``, and printed.

    :returns: the exit status.
    """
    root = Path(arguments[0])
    try:
        python = asyncio.run(Environments(root).python(arguments[1:]))
        root.mkdir(parents=True, exist_ok=True)
        (root / "python").write_text(python)
    except (RunnerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
