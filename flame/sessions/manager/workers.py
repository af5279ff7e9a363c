"""Executors as workers: how one is started on its compute, and how it is seen to that nothing is left of one."""

from __future__ import annotations

import asyncio
import logging

from flame.errors import RunnerError
from flame.runners.base import WorkerInfo, WorkerSpec
from flame.sessions.manager.executors import JOB, Executor
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.objects import Objects
from flame.spec.sessions import Application

log = logging.getLogger("flame.sessions")


class Workers:
    """Asks runners for executors.

    :param objects: what executors on the server's own host read as files.
    """

    def __init__(self, floor: Floor, objects: Objects) -> None:
        self._floor = floor
        self._objects = objects

    async def start(self, executor: Executor, app: Application) -> None:
        """Start an executor, unless it is let go of already.

        :raises flame.errors.FlameError: it could not be started.
        """
        compute = executor.record.compute
        spec = WorkerSpec(
            task=executor.id,
            job=JOB,
            attempt=1,
            environment={
                **app.environment,
                **self._floor.context.options.worker_environment,
                "FLAME_SERVER": self._floor.ground.server(compute),
                "FLAME_TASK": executor.id,
                "FLAME_TASK_KEY": self._floor.context.keys.task(executor.id, 1),
                "FLAME_ATTEMPT": "1",
                **self._objects_at(compute),
            },
            dependencies=app.dependencies,
            resources=app.resources,
            module="flame.sessions.executor",
            image=app.image,
        )
        try:
            if executor.releasing:  # its session was closed before it came to this
                return
            # Known before it is there: a restarted server ends executors that it does not know.
            executor.saved = await self._floor.records.insert(executor.id, executor.record)
            executor.info = await self._floor.ground.runner(compute).start(spec)
        finally:
            executor.started.set()

    async def end(self, executor: Executor, grace: float) -> None:
        """See to it that nothing of an executor is left.

        :param grace: seconds that it gets to end by itself.
        """
        await executor.started.wait()
        info, pause = executor.info, 0.5
        if info is not None and grace and executor.link is not None:
            try:
                async with asyncio.timeout(grace):
                    await executor.gone.wait()
            except TimeoutError:
                log.warning("executor %s does not leave; it is ended", executor.id)
        while info is not None:
            try:
                runner = self._floor.ground.runner(executor.record.compute)
                await runner.end(info, grace=0.0)
                await runner.clean(info)
                break
            except RunnerError as error:
                log.error("executor %s cannot be ended: %s", executor.id, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)

    async def end_stranger(self, compute: str, info: WorkerInfo) -> None:
        """End an executor that nobody knows."""
        log.warning("executor %s on %s is not known; it is ended", info.task, compute)
        try:
            await self._floor.ground.runner(compute).end(info)
            await self._floor.ground.runner(compute).clean(info)
        except RunnerError as error:
            log.error("executor %s cannot be ended: %s", info.task, error)

    def _objects_at(self, compute: str) -> dict[str, str]:
        """Where executors find the server's objects as files: those on its own host."""
        folder = self._objects.folder()
        if folder is None or not self._floor.ground.here(compute):
            return {}
        return {"FLAME_OBJECTS": str(folder)}
