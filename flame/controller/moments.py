"""How long ago something was, also for a server that has been started anew since: by a clock that nobody sets.

The time of day may be set in between, forwards or back. The kernel's clock since the machine was started cannot be, and is the same for all
processes of a machine until that is started again. So a moment is noted on both; only where the machine is another one, or was started anew, the
time of day has to do.
"""

from __future__ import annotations

import sys
import time
from functools import lru_cache


def mark() -> str | None:
    """This moment on the clock since the machine's start, and which start that was; None where the system has no such clock."""
    boot = _boot()
    return None if boot is None else f"{boot} {_uptime():.3f}"


def seconds_since(mark: str | None, wall: float) -> float:
    """How many seconds have passed since a moment.

    :param mark: what :func:`mark` gave then.
    :param wall: the time of day then, in seconds since 1970.
    """
    boot, _, at = (mark or "").partition(" ")
    if boot and boot == _boot():
        return max(0.0, _uptime() - float(at))
    return max(0.0, time.time() - wall)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else 0.0


@lru_cache(1)
def _boot() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip() or None
    except OSError:
        return None
