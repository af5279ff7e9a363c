"""Where executors run: the same computes as jobs' workers, and the same room."""

from __future__ import annotations

import os
from collections.abc import Iterable

from flame.controller.computes import Computes
from flame.controller.context import DEFAULT
from flame.controller.placement import Load, total
from flame.runners.base import Runner, WorkerInfo
from flame.sessions.manager.executors import JOB, Executor
from flame.sessions.scheduler import Node

#: Executors that are started at once on the server's own host, a core: more of them only hold each other up.
STARTING_PER_CORE = 1
#: Executors a core that a compute has at most, where nobody has said how many slots it has; and where its cores are not known.
PER_CORE, UNKNOWN = 8, 64
#: Executors of another compute that are started at once.
STARTING = 64


class Ground:
    """The computes, as far as executors need them."""

    def __init__(self, computes: Computes) -> None:
        self._computes = computes

    def nodes(self, executors: Iterable[Executor]) -> list[Node]:
        """What is there for executors: what the computes have, without what jobs have taken."""
        loads: dict[str, list[Load]] = {}
        for one in executors:
            loads.setdefault(one.record.compute, []).append(one.load)
        found: list[Node] = []
        for room in self._computes.rooms():
            if room.closed is not None:
                continue
            own, used, limit = total(loads.get(room.name, ())), room.used, room.capacity
            most = limit.slots
            if most is None:  # a session of a million tasks must not start a million executors
                most = int(PER_CORE * limit.cpu) if limit.cpu else UNKNOWN
            slots = max(0, most - used.workers + own.workers)
            if room.name in self._computes.reserved:  # jobs wait for it: there is what there is
                slots = own.workers
            found.append(
                Node(
                    name=room.name,
                    slots=slots,
                    cpu=None if limit.cpu is None else max(0.0, limit.cpu - used.cpu + own.cpu),
                    memory=None if limit.memory is None else max(0, limit.memory - used.memory + own.memory),
                    gpu=None if limit.gpu is None else max(0, limit.gpu - used.gpu + own.gpu),
                    starting=STARTING_PER_CORE * (os.cpu_count() or 1) if room.name == DEFAULT else STARTING,
                )
            )
        return found

    def wanted(self, executor: Executor) -> bool:
        """Whether jobs wait for the room that an executor takes."""
        return executor.record.compute in self._computes.reserved

    def hold(self, executor: Executor) -> None:
        """Take room for an executor."""
        self._computes.hold(_key(executor), executor.record.compute, executor.load)

    def give(self, executor: Executor) -> None:
        """Give its room back."""
        self._computes.give(_key(executor))

    def runner(self, compute: str) -> Runner:
        """What runs the workers of a compute.

        :raises flame.errors.RunnerError: it cannot be used.
        """
        return self._computes.runner(compute)

    def server(self, compute: str) -> str:
        """Where its workers reach the server."""
        return self._computes.server(compute)

    def here(self, compute: str) -> bool:
        """Whether its workers see the files of the server's host."""
        return self._computes.site(compute).record.kind == "local"

    def reachable(self, compute: str) -> bool:
        """Whether it is known which workers a compute has."""
        return self._computes.reachable(compute)

    def there(self) -> list[tuple[str, WorkerInfo]]:
        """The executors that the computes had when they were reached."""
        return [(name, info) for name, workers in self._computes.there().items() for info in workers if info.job == JOB]


def _key(executor: Executor) -> tuple[str, str]:
    return (JOB, executor.id)
