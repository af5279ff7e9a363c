"""Whom chaos reaches: workers that are processes of this machine, in containers of Docker engines, and in pods of Kubernetes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from flame.chaos import processes
from flame.chaos.target import Target
from flame.errors import FlameError, UsageError
from flame.spec.records import ComputeStatus, Task

if TYPE_CHECKING:
    from flame.chaos.containers import Containers
    from flame.chaos.pods import Pods


class Reach:
    """The workers of a server's jobs, as far as they can be reached from here. To be used as a context.

    :param computes: the server's.
    """

    def __init__(self, computes: Sequence[ComputeStatus] = ()) -> None:
        self._computes = {compute.id: compute for compute in computes}
        self._engines: dict[str, Containers] = {}
        self._clusters: dict[str, Pods] = {}
        self._lost: dict[str, str] = {}  # computes that cannot be reached, and why
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Reach:
        async with AsyncExitStack() as stack:
            for compute in self._computes.values():
                if compute.kind == "docker":
                    from flame.chaos.containers import Containers  # needs the extra `docker`

                    self._engines[compute.id] = engine = Containers(compute.config)
                    stack.callback(engine.close)
                elif compute.kind == "kubernetes":
                    from flame.chaos.pods import Pods  # needs the extra `kubernetes`

                    try:
                        self._clusters[compute.id] = cluster = await Pods.connect(compute.config)
                    except FlameError as error:  # which matters only to a trial of a job that is there
                        self._lost[compute.id] = error.message
                    else:
                        stack.push_async_callback(cluster.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    @property
    def elsewhere(self) -> bool:
        """Whether some workers may be in containers, where they are other users."""
        return any(compute.kind == "docker" for compute in self._computes.values())

    @property
    def _places(self) -> Sequence[Containers | Pods]:
        return [*self._engines.values(), *self._clusters.values()]

    async def workers(self, job: str) -> list[Target]:
        """The processes of a job's workers, in order of tasks and attempts."""
        found: list[Target] = list(await asyncio.to_thread(processes.workers, job))
        for place in self._places:
            found += await place.workers(job)
        return sorted(found, key=lambda target: (target.task, target.attempt, target.flamelet))

    async def hold(self, job: str, folder: Path) -> None:
        """Have workers that see no files of this machine come to moments all the same, until it is cancelled.

        :param job: its id.
        :param folder: where moments are wished for.
        :raises flame.errors.UsageError: that cannot be done.
        """
        mirrors = [asyncio.create_task(cluster.mirror(job, folder)) for cluster in self._clusters.values()]
        try:
            await asyncio.gather(*mirrors)
        finally:
            for mirror in mirrors:
                mirror.cancel()
            await asyncio.gather(*mirrors, return_exceptions=True)

    async def remove(self, server: str) -> None:
        """Remove the containers and pods of a server that is no more.

        :param server: its id.
        """
        for place in self._places:
            await place.remove(server)

    def check_target(self, who: str, tasks: Sequence[Task]) -> None:
        """Whether a worker can be hit.

        :param who: what to call it.
        :param tasks: those that it may be working on.
        :raises flame.errors.UsageError: all of them are where nothing can be done from here.
        """
        near = {name for name, compute in self._computes.items() if compute.kind in ("local", "docker")}
        far = self._far(tasks, near | self._clusters.keys())
        if far:
            raise UsageError(f"The {who} cannot be hit: it runs on {far}, which flame chaos does not reach.")

    def check_moment(self, moment: str, tasks: Sequence[Task]) -> None:
        """Whether a moment can be met.

        :param moment: what to call it.
        :param tasks: whose workers may come to it.
        :raises flame.errors.UsageError: all of them are where none can be held.
        """
        near = {name for name, compute in self._computes.items() if compute.kind == "local"} | self._clusters.keys()
        near |= {name for name, engine in self._engines.items() if engine.holds}
        far = self._far(tasks, near)
        if far:
            raise UsageError(
                f"Nobody can be held at {moment}: all who come there run on {far}, where they cannot be told."
            )

    def _far(self, tasks: Sequence[Task], near: set[str]) -> str | None:
        """The computes of tasks, if all of them are placed, and none of them on one that is near. What is not known here is near."""
        homes = {task.compute for task in tasks}
        if not homes or not homes <= self._computes.keys() or homes & near:
            return None
        return " and ".join(self._name(home) for home in sorted(filter(None, homes)))

    def _name(self, compute: str) -> str:
        why = f": {self._lost[compute].rstrip('.')}" if compute in self._lost else ""
        return f"the compute {compute} ({self._computes[compute].kind}{why})"
