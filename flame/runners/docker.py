"""Workers as containers of a Docker engine, one container a worker.

The engine is what knows: containers carry labels by which a restarted server finds its own, and one that has ended is removed only
after its end was told. So a container of ours that exists and has ended is an end that nobody has heard of yet, also
after the server or the engine were away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from flame.errors import RunnerError
from flame.runners.base import Capacity, ExitCallback, Runner, WorkerInfo, WorkerSpec
from flame.runners.docker_config import DockerConfig
from flame.runners.docker_container import Containers, signal_of
from flame.runners.docker_engine import Engine, Refused, log
from flame.runners.docker_images import Dependencies, Images, Once
from flame.runners.docker_network import Route


class _Worker:
    """A worker whose container runs, or whose end was not told yet."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.ending = False  # on our own demand, so nobody needs to be told
        self.asked: str | None = None  # a signal that was sent to it through the engine
        self.watch: asyncio.Task[None] | None = None  # sees it off, once its container has ended
        self.gone = asyncio.Event()


class DockerRunner(Runner):
    """Runs workers as containers."""

    kind: ClassVar[str] = "docker"
    Config: ClassVar[type[msgspec.Struct]] = DockerConfig

    def __init__(self, config: DockerConfig, *, instance: str, data_dir: Path) -> None:
        """See the base class."""
        super().__init__(config, instance=instance, data_dir=data_dir)
        self._config = config
        self._engine = Engine(config.host, config.tls)
        self._containers = Containers(self._engine, config, instance)
        self._images = Images(self._engine, config)
        self._dependencies = Dependencies(self._engine, config.python, self._containers.run)
        self._route = Route(self._engine, config.network)
        self._output = data_dir / "containers"
        self._workers: dict[str, _Worker] = {}
        self._start_once: Once[WorkerInfo] = Once()
        self._looking = 0  # starts and lists under way: ends of containers that nobody knows yet may be theirs
        self._ended_early: set[str] = set()
        #: Containers that have ended, which everybody knows, and that are about to be removed.
        self._told: set[str] = set()
        #: Those of them that are removed, while a list that is still read may have them.
        self._removed: set[str] = set()
        self._on_exit: ExitCallback | None = None
        self._follower: asyncio.Task[None] | None = None
        self._away: str | None = None

    async def open(self, on_exit: ExitCallback) -> None:
        """See the base class."""
        self._on_exit = on_exit
        await self._engine.call("ping")
        self._follower = asyncio.create_task(self._follow())

    async def start(self, spec: WorkerSpec) -> WorkerInfo:
        """See the base class. The first start with an image or new dependencies takes as long as pulling or installing takes."""
        if spec.name in self._workers:
            return self._workers[spec.name].info
        return await self._start_once(spec.name, lambda: self._start(spec))

    async def list(self) -> Sequence[WorkerInfo]:
        """See the base class. One that has ended and was not told of is still among them, and its end is told right after."""
        with self._look():
            for container in await self._containers.all():
                info = container.info
                if info is None or _name(info) in self._workers or _name(info) in self._start_once:
                    continue
                if container.id in self._told or container.state == "created":  # never begun: its server was killed
                    await self._discard(container.id)
                elif container.state != "removing":
                    self._adopt(info, ended=container.ended)
        return [worker.info for worker in self._workers.values()]

    async def end(self, worker: WorkerInfo, *, grace: float = 5.0) -> None:
        """See the base class."""
        await self._start_once.settled(_name(worker))
        running = self._workers.get(_name(worker))
        if running is not None:
            running.ending = True
            with contextlib.suppress(TimeoutError, Refused):  # it does not leave; or it has left already
                await self._engine.call("kill", running.info.handle, "SIGTERM")
                async with asyncio.timeout(grace):
                    await running.gone.wait()
            await self._keep_output(running.info)
        await self._containers.remove(self._containers.name(worker))
        if running is not None:
            self._see_off(running)
            await running.gone.wait()

    async def logs(self, worker: WorkerInfo) -> AsyncIterator[bytes]:
        """See the base class. The end of what an ended one has printed is kept until :meth:`clean`."""
        running = self._workers.get(_name(worker))
        if running is not None:
            printed = await self._containers.printed(running.info.handle)
            if printed is not None:
                yield printed
                return
        with contextlib.suppress(FileNotFoundError):
            yield await asyncio.to_thread(self._kept(worker).read_bytes)

    async def clean(self, worker: WorkerInfo) -> None:
        """See the base class. Containers are removed when they have ended, so little is left."""
        await asyncio.to_thread(self._kept(worker).unlink, missing_ok=True)

    async def capacity(self) -> Capacity:
        """See the base class: the engine's cores and memory. It does not say what GPUs it has."""
        info = await self._engine.call("info")
        return Capacity(cpu=float(info["NCPU"]), memory=int(info["MemTotal"]))

    async def close(self) -> None:
        """See the base class."""
        await self._start_once.settled()
        await self._images.close()
        await self._dependencies.close()
        tasks = [self._follower, *(worker.watch for worker in self._workers.values())]
        under_way = [task for task in tasks if task is not None]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        self._engine.close()

    # ------------------------------------------------------------------------------------------------ beginning

    async def _start(self, spec: WorkerSpec) -> WorkerInfo:
        info = WorkerInfo(spec.task, spec.job, spec.attempt, "")
        image = spec.image or self._config.image
        try:
            image_id = await self._before(info, f"Its image {image} is being pulled.", self._images.have(image))
            packages = await self._before(
                info,
                f"Its dependencies are being installed: {', '.join(spec.dependencies)}.",
                self._dependencies.have(image, image_id, spec.dependencies),
            )
            environment = await self._route.lead(spec.environment)
            with self._look():
                container = await self._containers.start(spec, image, packages, environment)
                return self._adopt(info._replace(handle=container)).info
        except Refused as refusal:
            raise RunnerError(f"The container of {spec.name} could not be started: {refusal.reason}") from refusal

    def _adopt(self, info: WorkerInfo, *, ended: bool = False) -> _Worker:
        worker = self._workers[_name(info)] = _Worker(info)
        if ended or info.handle in self._ended_early:
            self._see_off(worker)
        return worker

    @contextlib.contextmanager
    def _look(self) -> Iterator[None]:
        """While workers are sought or made, remember which containers end."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1
            self._forget()

    def _forget(self) -> None:
        if not self._looking:
            self._ended_early.clear()
            self._told -= self._removed
            self._removed.clear()

    # ---------------------------------------------------------------------------------------------------- end

    async def _follow(self) -> None:
        """Heed the ends of containers, as they happen."""
        events = self._engine.events(self._containers.ends, opened=self._compare, away=self._lose)
        async with contextlib.aclosing(events):
            async for event in events:
                worker = next((one for one in self._workers.values() if one.info.handle == event["id"]), None)
                if event["Action"] == "kill":
                    self._warn(worker, signal_of(event))
                elif worker is not None:
                    self._see_off(worker)
                elif self._looking:
                    self._ended_early.add(event["id"])

    def _warn(self, worker: _Worker | None, asked: str | None) -> None:
        """A container is sent a signal by which it ends, perhaps not by us. Its flamelet will say farewell without knowing why."""
        if worker is None or worker.ending or asked is None:
            return
        worker.asked = asked
        self._say(
            worker.info, f"Its container gets {asked}: from somebody, or from the Docker engine as that shuts down."
        )

    def _lose(self, error: RunnerError) -> None:
        if self._away is None:
            self._away = error.message
            log.warning("%s Workers there may go on; it is asked again until it answers.", error.message)
            for worker in self._workers.values():
                self._say(worker.info, error.message)

    async def _compare(self) -> None:
        """The engine answers, for the first time or again: see what has become of the workers meanwhile."""
        away, known = self._away is not None, list(self._workers.values())
        there = {container.id: container for container in await self._containers.all()}
        if away:
            log.info("%s answers again", self._engine.name)
        self._away = None
        for worker in known:
            container = there.get(worker.info.handle)
            if container is None or container.ended:
                self._see_off(worker, away=away)
            elif away:
                self._say(worker.info, None)

    def _see_off(self, worker: _Worker, *, away: bool = False) -> None:
        if worker.watch is None or (worker.watch.done() and not worker.gone.is_set()):
            worker.watch = asyncio.create_task(self._seeing_off(worker, away))

    async def _seeing_off(self, worker: _Worker, away: bool) -> None:
        """A worker's container has ended: find out how, keep what it has printed, tell, and remove it."""
        try:
            how = await self._containers.verdict(worker.info.handle, asked=worker.asked, away=away)
            await self._keep_output(worker.info)
        except RunnerError as error:  # the engine has gone; once it is back, this is done again
            log.debug("how the worker %s has ended cannot be told yet: %s", _name(worker.info), error)
            return
        del self._workers[_name(worker.info)]
        self._told.add(worker.info.handle)
        if not worker.ending and self._on_exit:
            self._on_exit(worker.info, how)
        try:
            await self._discard(worker.info.handle)
        except RunnerError as error:
            log.warning("the container of %s, which has ended, cannot be removed: %s", _name(worker.info), error)
        finally:
            worker.gone.set()

    async def _discard(self, container: str) -> None:
        await self._containers.remove(container)
        self._removed.add(container)
        self._forget()

    async def _keep_output(self, info: WorkerInfo) -> None:
        printed = await self._containers.printed(info.handle)
        if printed:
            await asyncio.to_thread(self._write, self._kept(info), printed)

    def _write(self, path: Path, printed: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(printed)

    def _kept(self, info: WorkerInfo) -> Path:
        self._containers.name(info)  # refuses what could lead out of the folder
        return self._output / f"{_name(info)}.log"


def _name(worker: WorkerInfo) -> str:
    return f"{worker.task}.{worker.attempt}"
