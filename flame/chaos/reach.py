"""Whom chaos reaches: workers that are processes of this machine, and workers in containers of Docker engines. Not those in pods."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from flame.chaos import processes
from flame.chaos.target import Target
from flame.errors import UsageError
from flame.spec.records import ComputeStatus, Task

if TYPE_CHECKING:
    from flame.chaos.containers import Containers

_HERE = "It reaches processes of this machine and containers of Docker engines."


class Reach:
    """The workers of a server's jobs, as far as they can be reached from here. To be used as a context.

    :param computes: the server's.
    """

    def __init__(self, computes: Sequence[ComputeStatus] = ()) -> None:
        self._kinds = {compute.id: compute.kind for compute in computes}
        self._engines: dict[str, Containers] = {}
        for compute in computes:
            if compute.kind == "docker":
                from flame.chaos.containers import Containers  # needs the extra `docker`

                self._engines[compute.id] = Containers(compute.config)

    def __enter__(self) -> Reach:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engines."""
        for engine in self._engines.values():
            engine.close()

    @property
    def elsewhere(self) -> bool:
        """Whether some workers may be in containers, where they are other users."""
        return bool(self._engines)

    async def workers(self, job: str) -> list[Target]:
        """The processes of a job's workers, in order of tasks and attempts."""
        found: list[Target] = list(await asyncio.to_thread(processes.workers, job))
        for engine in self._engines.values():
            found += await engine.workers(job)
        return sorted(found, key=lambda target: (target.task, target.attempt, target.flamelet))

    async def remove(self, server: str) -> None:
        """Remove the containers of a server that is no more.

        :param server: its id.
        """
        for engine in self._engines.values():
            await engine.remove(server)

    def check_target(self, who: str, tasks: Sequence[Task]) -> None:
        """Whether a worker can be hit.

        :param who: what to call it.
        :param tasks: those that it may be working on.
        :raises flame.errors.UsageError: all of them are where nothing can be done from here.
        """
        reached = {"local", "docker"}
        far = self._far(tasks, {name for name, kind in self._kinds.items() if kind in reached})
        if far:
            raise UsageError(f"The {who} cannot be hit: it runs on {far}, which flame chaos does not reach. {_HERE}")

    def check_moment(self, moment: str, tasks: Sequence[Task]) -> None:
        """Whether a moment can be met.

        :param moment: what to call it.
        :param tasks: whose workers may come to it.
        :raises flame.errors.UsageError: all of them are where none can be held.
        """
        near = {name for name, kind in self._kinds.items() if kind == "local"}
        near |= {name for name, engine in self._engines.items() if engine.holds}
        far = self._far(tasks, near)
        if far:
            raise UsageError(
                f"Nobody can be held at {moment}: all who come there run on {far}, where they see no files of this machine."
            )

    def _far(self, tasks: Sequence[Task], near: set[str]) -> str | None:
        """The computes of tasks, if all of them are placed, and none of them on one that is near. What is not known here is near."""
        homes = {task.compute for task in tasks}
        if not homes or not homes <= self._kinds.keys() or homes & near:
            return None
        return " and ".join(f"the compute {name} ({self._kinds[name]})" for name in sorted(filter(None, homes)))
