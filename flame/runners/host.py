"""What this host has for workers: cores, memory, GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from flame.runners.base import Capacity
from flame.runners.cgroups import host_limits

#: Slots a core, where nobody has said how many workers a host takes.
SLOTS_PER_CORE = 8
_NVIDIA = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def host_capacity(slots: int | None = None) -> Capacity:
    """What there is in all, as far as this process may use it.

    :param slots: how many workers the operator allows; None: so many a core.
    """
    limits = host_limits()
    cores = float(_cores())
    if limits.cpu is not None:
        cores = min(cores, limits.cpu)
    memory = psutil.virtual_memory().total
    if limits.memory is not None:
        memory = min(memory, limits.memory)
    return Capacity(slots or SLOTS_PER_CORE * max(1, round(cores)), cores, memory, len(gpus()))


def gpus() -> Sequence[str]:
    """The GPUs that this process may use, by the names that CUDA knows them by."""
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(index) for index, _ in enumerate(sorted(_NVIDIA.iterdir()))]
    except OSError:
        return []


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
