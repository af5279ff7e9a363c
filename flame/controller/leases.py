"""Leases: how a worker that has fallen silent is noticed.

Each worker holds a lease that every call of it renews. Renewing is one assignment, because calls are many; one timer
looks at all leases a few times within a lease's length. If the timer itself comes late, the process was held up
(stopped, or its machine asleep), and so were the calls of the workers: then nobody's silence means anything, and every
lease is prolonged by that much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable


class Leases:
    """All leases of a server. ``lost`` is called once, in the event loop, for each one that runs out.

    :param seconds: how long a lease is.
    :param lost: told the key of a lease that ran out. It is no longer held then.
    """

    def __init__(self, seconds: float, lost: Callable[[Hashable], None]) -> None:
        self.seconds = seconds
        self._lost = lost
        self._ends: dict[Hashable, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def begin(self, key: Hashable, seconds: float | None = None) -> None:
        """Hold a lease from now on, for its usual length or, the first time, for a longer one."""
        loop = asyncio.get_running_loop()
        self._ends[key] = loop.time() + (self.seconds if seconds is None else seconds)
        if self._timer is None:
            self._wait(loop)

    def renew(self, key: Hashable) -> None:
        """Prolong a lease that is held, never shortening it; one that is not held stays so."""
        end = self._ends.get(key)
        if end is not None:
            self._ends[key] = max(end, asyncio.get_running_loop().time() + self.seconds)

    def prolong(self, seconds: float) -> None:
        """Hold every lease for at least so long from now on: until now nobody could call."""
        end = asyncio.get_running_loop().time() + seconds
        self._ends = {key: max(end, until) for key, until in self._ends.items()}

    def drop(self, key: Hashable) -> None:
        """No longer watch; one that is not held is no error."""
        self._ends.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ends

    def close(self) -> None:
        """Watch nothing any more."""
        self._ends.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + self.seconds / 4
        self._timer = loop.call_at(self._due, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        late = now - self._due
        if late > self.seconds / 4:
            self._ends = {key: end + late for key, end in self._ends.items()}
        ended = [key for key, end in self._ends.items() if end <= now]
        for key in ended:
            self._ends.pop(key, None)
            self._lost(key)
        self._timer = None
        if self._ends:
            self._wait(loop)
