"""What a job leaves behind: processes, files, shared memory and containers, each known by a mark that only one lane's things carry."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
from pathlib import Path

import psutil

from flame.chaos.processes import marked, of_folder

#: Ids, digests and numbers: what is different in the names of files from job to job.
_DIFFERS = re.compile(r"[0-9a-f]{16,}|\d+")
#: What an undisturbed job need not leave, and another may: the logs of tasks that had something to say.
_MAY_BE = {"logs/N/N.N.log"}
_MEMORY_FILE = "/memfd:flame"


@functools.cache
def own_mounts() -> list[str] | None:
    """What a command is put behind to have mounts of its own; None where this system does not let us."""
    for options in (["--mount"], ["--mount", "--user", "--map-root-user"]):
        with contextlib.suppress(FileNotFoundError):
            if not subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode:
                return ["unshare", *options]
    return None


class Leftovers:
    """What may be left in a lane.

    Its processes have the lane's folder as ``FLAME_CHAOS``, temporary files go where ``TMPDIR`` says, and what they see as ``/dev/shm`` is a folder
    of the lane too, where the system lets us mount it there. So nothing of another lane is taken for this one's, and nothing of this one is missed.

    :param home: the lane's folder, for what it makes.
    :param data: the server's data directory.
    :param points: its ``FLAME_CHAOS``.
    :param containers: its workers are containers of this machine's Docker engine.
    """

    def __init__(self, home: Path, data: Path, points: Path, *, containers: bool = False) -> None:
        self._containers = containers
        self._data = data
        self._points = points
        self._temporary = home / "tmp"
        self._memory = home / "shm"
        self._temporary.mkdir()
        self._memory.mkdir()
        self._usual: set[str] | None = None
        #: For the environment of all that is started in the lane.
        self.environment = {"FLAME_CHAOS": str(points), "TMPDIR": str(self._temporary)}
        #: What the server is to be put behind.
        self.through: list[str] = []
        if (unshare := own_mounts()) is not None:
            bound = 'mount --bind "$0" /dev/shm && exec "$@"'
            self.through = [*unshare, "sh", "-c", bound, str(self._memory)]

    def learn(self) -> None:
        """What there is now in the data directory is what an undisturbed job leaves there, and any other may. Nothing else, from now on."""
        self._usual = _MAY_BE | {self._kind(path) for path in self._files()}

    def of(self, job: str) -> list[str]:
        """What a job has left behind, each in words.

        :param job: its id.
        """
        left = [f"process {pid} {_command(pid)}" for pid in marked(job)]
        left += [f"temporary file {path}" for path in self._temporary.iterdir()]
        left += [f"shared memory {path.name}" for path in self._memory.iterdir()]
        left += [f"working directory {path}" for path in self._data.glob("workers/*")]
        if self._usual is not None:
            left += [f"file {path}" for path in self._files() if self._kind(path) not in self._usual]
        left += [
            f"shared memory held by {pid} {_command(pid)}" for pid in of_folder(self._points) if _holds_memory(pid)
        ]
        return left + [f"container {name}" for name in (_containers(job) if self._containers else [])]

    def _files(self) -> list[Path]:
        """The files of the data directory; it takes it that some go while it looks."""
        return [Path(folder, name) for folder, _, names in os.walk(self._data) for name in names]

    def _kind(self, path: Path) -> str:
        return _DIFFERS.sub("N", str(path.relative_to(self._data)))


def _holds_memory(pid: int) -> bool:
    """Whether a process has a segment of :mod:`flame.sdk.backends.shm` open, or mapped."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(f"/proc/{pid}/fd/{number}").startswith(_MEMORY_FILE):
                    return True
        return _MEMORY_FILE in Path(f"/proc/{pid}/maps").read_text()
    return False


def _containers(job: str) -> list[str]:
    listed = ["docker", "ps", "--all", "--format", "{{.Names}} {{.Status}}", "--filter", f"label=flame.job={job}"]
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()


def _command(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""
