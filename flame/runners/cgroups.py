"""Control groups of local workers: how much memory and processor time all of a worker's processes together may use.

A worker with limits gets a group of its own below the server's, where the server may make one: as root, in a container
of its own, or in a delegated unit of systemd. Both layouts are served, version 2 and the older one with a tree for each controller.
A restarted server finds a worker's group by the worker's process. Where no group can be made, :func:`limit` holds each
process to a limit instead, which is weaker: it counts each process for itself, and leaves the processor alone.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("/sys/fs/cgroup")
_PREFIX = "flame-"
#: Microseconds over which processor time is shared out.
_PERIOD = 100_000
#: The older layout's word for no limit is the largest number of pages there can be.
_UNLIMITED = 1 << 60


class Limits(NamedTuple):
    """What a worker may use: cores, and bytes of memory; None for no limit."""

    cpu: float | None = None
    memory: int | None = None

    def __bool__(self) -> bool:
        return self.cpu is not None or self.memory is not None


class Group:
    """A worker's control group: one folder, or one for each controller.

    :param folders: by controller, ``memory`` or ``cpu``; in version 2 both are the same folder.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)

    @property
    def kills(self) -> int:
        """How many of its processes were killed for want of memory."""
        folder = self._folders.get("memory")
        if folder is None:
            return 0
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split(maxsplit=1) for line in (folder / name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
        return 0

    @property
    def memory(self) -> int | None:
        """How much memory its processes may use together; None for no limit."""
        folder = self._folders.get("memory")
        return None if folder is None else _limit_in(folder)

    def take(self, pid: int) -> None:
        """Put a process into the group; what it starts from now on is in it, too.

        :raises OSError: the process is gone, or may not be moved.
        """
        for folder in set(self._folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Remove the group, whose processes have ended."""
        for folder in set(self._folders.values()):
            with contextlib.suppress(OSError):  # somebody who is not ours is in it; it costs nothing
                folder.rmdir()


def make_group(name: str, limits: Limits, *, groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> Group:
    """Make a group for a worker.

    :param name: tells it from others'.
    :param groups: where control groups are mounted.
    :param own: says in which groups the server is.
    :raises OSError: none can be made here, or not with these limits.
    """
    above = _groups_of(own.read_text(), groups)
    wanted = [word for word, limit in (("memory", limits.memory), ("cpu", limits.cpu)) if limit is not None]
    group = Group({word: above[word] / f"{_PREFIX}{name}" for word in wanted if word in above})
    if len(group._folders) < len(wanted):
        raise OSError(f"there is no control group for {', '.join(wanted)}")
    try:
        for word, folder in group._folders.items():
            _enable(folder.parent, word)
            folder.mkdir(exist_ok=True)
            for file, value in _settings(folder, word, limits):
                (folder / file).write_text(value)
    except OSError:
        group.remove()
        raise
    return group


def group_of(pid: int, *, groups: Path = GROUPS) -> Group | None:
    """The group that was made for a worker, by its process; None where it has none of its own."""
    try:
        found = _groups_of(Path(f"/proc/{pid}/cgroup").read_text(), groups)
    except OSError:
        return None
    made = {word: folder for word, folder in found.items() if folder.name.startswith(_PREFIX)}
    return Group(made) if made else None


def limit(pid: int, limits: Limits) -> None:
    """Hold a process, and each one that it starts, to a limit of its own: where there are no groups.

    :raises OSError: the process is gone.
    """
    if (
        limits.memory is not None and sys.platform == "linux"
    ):  # what it asks for as its own, not what it maps: libraries map far more than they use
        resource.prlimit(pid, resource.RLIMIT_DATA, (limits.memory, limits.memory))


def host_limits(*, groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> Limits:
    """What the server's own control groups, and those around them, leave of this host."""
    try:
        found = _groups_of(own.read_text(), groups)
    except OSError:
        return Limits()
    memory = [_limit_in(folder) for folder in _upwards(found.get("memory"), groups)]
    cpu = [_cores_in(folder) for folder in _upwards(found.get("cpu"), groups)]
    return Limits(
        min((one for one in cpu if one is not None), default=None),
        min((one for one in memory if one is not None), default=None),
    )


def _groups_of(text: str, groups: Path) -> dict[str, Path]:
    """From the lines of a process's ``cgroup`` file to folders, by controller; only those that are there."""
    found: dict[str, Path] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers:
            for word in {"memory", "cpu"} & set(controllers.split(",")):
                # A container finds its own group at the top, under whatever name the host knows it.
                places = (groups / word / path.lstrip("/"), groups / word)
                if here := next((place for place in places if place.is_dir()), None):
                    found[word] = here
        elif (groups / "cgroup.controllers").exists():
            places = (groups / path.lstrip("/"), groups)
            here = next(place for place in places if place.is_dir())
            found = {word: found.get(word, here) for word in ("memory", "cpu")}
    return found


def _enable(folder: Path, controller: str) -> None:
    """In version 2, a folder says which controllers the groups in it have, and cannot while processes are in itself."""
    control = folder / "cgroup.subtree_control"
    if not control.exists() or controller in control.read_text().split():
        return
    try:
        control.write_text(f"+{controller}")
    except OSError:
        pids = (folder / "cgroup.procs").read_text().split()
        if len(pids) != 1:  # others than the server are not ours to move
            raise
        home = folder / f"{_PREFIX}server"
        home.mkdir(exist_ok=True)
        (home / "cgroup.procs").write_text(pids[0])
        control.write_text(f"+{controller}")


def _settings(folder: Path, controller: str, limits: Limits) -> list[tuple[str, str]]:
    """The files of a group to write, with their texts."""
    second = (folder / "cgroup.controllers").exists()
    if controller == "memory":
        settings = [("memory.max" if second else "memory.limit_in_bytes", str(limits.memory))]
        swap = "memory.swap.max" if second else "memory.memsw.limit_in_bytes"
        if (folder / swap).exists():
            settings.append((swap, "0" if second else str(limits.memory)))
        return settings
    quota = max(1000, round((limits.cpu or 0) * _PERIOD))
    if second:
        return [("cpu.max", f"{quota} {_PERIOD}")]
    return [("cpu.cfs_period_us", str(_PERIOD)), ("cpu.cfs_quota_us", str(quota))]


def _upwards(folder: Path | None, groups: Path) -> list[Path]:
    return [] if folder is None else [one for one in (folder, *folder.parents) if one.is_relative_to(groups)]


def _limit_in(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # `max`, which is no number, means that there is none
            found = int((folder / name).read_text())
            return found if found < _UNLIMITED else None
    return None


def _cores_in(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    return None
