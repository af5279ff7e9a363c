"""What the worker's control group says about memory: its limit, and how often the kernel has killed for want of it.

A process that is killed so gets SIGKILL like any other; only the group's counter tells which it was. Both layouts of control
groups are read, as a host sees them and as a container does, which finds its own group at the top.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_GROUPS = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")
#: A version 1 group without a limit says the largest number of pages there can be.
_UNLIMITED = 1 << 60


class Memory(NamedTuple):
    """What is known of a control group: how many of its processes were killed for want of memory, and its limit in bytes."""

    kills: int | None = None
    limit: int | None = None


def read_memory(groups: Path = _GROUPS, own: Path = _SELF) -> Memory:
    """What the control group of this process says; None for what it does not say."""
    for folder, counter, limit in _places(groups, own):
        kills = _field(folder / counter, "oom_kill")
        if kills is not None:
            most = _number(folder / limit)
            return Memory(kills, most if most is not None and most < _UNLIMITED else None)
    return Memory()


def _places(groups: Path, own: Path) -> list[tuple[Path, str, str]]:
    """Where to look, best first: folder, file with the counter, file with the limit."""
    first = ("memory.oom_control", "memory.limit_in_bytes")
    second = ("memory.events", "memory.max")
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found.append((groups / path.lstrip("/"), *second))
        elif "memory" in controllers.split(","):
            found.append((groups / "memory" / path.lstrip("/"), *first))
    return [*found, (groups, *second), (groups / "memory", *first)]


def _field(path: Path, name: str) -> int | None:
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
        return int(fields[name])
    except (OSError, ValueError, KeyError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())  # `max`, which is none, means that there is no limit
    except (OSError, ValueError):
        return None
