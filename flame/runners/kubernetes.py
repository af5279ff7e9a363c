"""Workers as pods of a Kubernetes cluster: one pod a worker.

Nothing is asked twice: one watch tells of every change of our pods, from the scheduler's first refusal to the last container's
exit status, and each is judged (:mod:`flame.runners.kubernetes_verdict`) as it comes. What a worker waits for is
told at once; where it waits for longer than the compute's patience, its pod is removed and what it waited for is the cause.

The cluster keeps everything: a restarted server finds its pods by their labels, also those that ended meanwhile, and
tells how they ended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from flame.errors import RunnerError
from flame.runners import kubernetes_pod as pods
from flame.runners.base import Capacity, ExitCallback, Runner, WorkerExit, WorkerInfo, WorkerSpec
from flame.runners.kubernetes_capacity import measure
from flame.runners.kubernetes_cluster import Cluster, Object, Refused, Watch
from flame.runners.kubernetes_config import KubernetesConfig
from flame.runners.kubernetes_verdict import Stage, Verdict, judge

log = logging.getLogger("flame.runners")

_REMOVAL = 15.0  # seconds that a node gets beyond the grace, before the pod is struck off without it
_SECRET = 20.0  # seconds for a container that cannot be made: its Secret is made after it
_TRIES = 4
_UNSEEN = Verdict(Stage.ROOM)
_ROOMLESS = 1000  # tasks, beyond which those are forgotten that found no room longest ago


class _Worker:
    """A pod of ours. ``gone`` is set when the cluster has it no more."""

    def __init__(self, info: WorkerInfo, uid: str) -> None:
        self.info = info
        self.uid = uid
        self.verdict = _UNSEEN
        self.told = False  # its end was reported, or needs no report
        self.gone = asyncio.Event()
        self.patience: asyncio.TimerHandle | None = None
        self.keeping: asyncio.TimerHandle | None = None

    def impatient(self) -> None:
        """Nothing is waited for any more."""
        for timer in (self.patience, self.keeping):
            if timer is not None:
                timer.cancel()


class KubernetesRunner(Runner):
    """Runs workers as pods."""

    kind: ClassVar[str] = "kubernetes"
    Config: ClassVar[type[msgspec.Struct]] = KubernetesConfig

    def __init__(self, config: KubernetesConfig, *, instance: str, data_dir: Path) -> None:
        """See the base class."""
        super().__init__(config, instance=instance, data_dir=data_dir)
        self._config = config
        self._cluster: Cluster | None = None
        self._watch: Watch | None = None
        self._on_exit: ExitCallback | None = None
        self._workers: dict[str, _Worker] = {}
        self._roomless: dict[str, str | None] = {}  # by task, why no node took its last pod
        self._starting: dict[str, asyncio.Task[WorkerInfo]] = {}
        self._background: set[asyncio.Task[None]] = set()
        # Ends that nobody could be told before they have asked what there is: a starting server first learns whose workers these are.
        self._untold: list[tuple[_Worker, WorkerExit]] | None = []

    # -------------------------------------------------------------------------------------------- the interface

    async def open(self, on_exit: ExitCallback) -> None:
        """See the base class. A pod is made on trial: what the cluster would refuse later, it refuses now."""
        cluster = await Cluster.connect(self._config)
        try:
            spec, name = WorkerSpec(f"trial-{secrets.token_hex(4)}", "trial", 1, {}), "trial"
            trial = pods.make_pod(spec, self._config, instance=name, secret=name)
            await cluster.call("POST", cluster.pods, trial, query={"dryRun": "All"})
            self._on_exit = on_exit
            self._watch = Watch(
                cluster, cluster.pods, pods.selector(self.instance), listed=self._listed, changed=self._changed
            )
            await self._watch.refresh()
            self._cluster = cluster
        except BaseException:
            if self._watch is not None:
                await self._watch.close()
            await cluster.close()
            raise

    async def start(self, spec: WorkerSpec) -> WorkerInfo:
        """See the base class. It returns when the pod is made; what then becomes of it is told as it happens."""
        name = pods.pod_name(self.instance, spec)
        there = self._workers.get(name)
        if there is not None and not there.told:
            return there.info
        if name not in self._starting:
            task = self._starting[name] = asyncio.create_task(self._start(spec))
            task.add_done_callback(lambda _: self._starting.pop(name))
        # Shielded: half a start would leave a pod that waits for its Secret.
        return await asyncio.shield(self._starting[name])

    async def list(self) -> Sequence[WorkerInfo]:
        """See the base class."""
        await self._watching.refresh()
        found = [worker.info for worker in self._workers.values() if not worker.told]
        if self._untold is not None:
            found += [worker.info for worker, _ in self._untold]
            for worker, how in self._untold:
                asyncio.get_running_loop().call_soon(self._report, worker, how)
            self._untold = None
        return found

    async def end(self, worker: WorkerInfo, *, grace: float = 5.0) -> None:
        """See the base class."""
        name = pods.pod_name(self.instance, worker)
        if start := self._starting.get(name):
            await asyncio.wait([start])
        if name not in self._workers:
            await self._watching.refresh()
        known = self._workers.get(name)
        if known is not None:
            known.told = True
            await self._remove(known, grace)

    async def logs(self, worker: WorkerInfo) -> AsyncIterator[bytes]:
        """See the base class. Kept with the pod."""
        name = pods.pod_name(self.instance, worker)
        for container in (pods.INSTALLER, pods.CONTAINER):
            try:
                async for piece in self._there.read(f"{self._there.pods}/{name}/log", {"container": container}):
                    yield piece
            except Refused as error:
                if error.code not in (400, 404):  # no such pod, no such container, or it has not begun
                    raise

    async def clean(self, worker: WorkerInfo) -> None:
        """See the base class."""
        known = self._workers.get(pods.pod_name(self.instance, worker))
        if known is not None and known.told:
            await self._delete(known, 0)

    async def capacity(self) -> Capacity:
        """See the base class. What the nodes have that our pods may use, if we may look at nodes; else no limit is known."""
        try:
            nodes = await self._there.call("GET", "/api/v1/nodes")
        except Refused as error:
            if error.code not in (401, 403):
                raise
            return Capacity()
        return measure(nodes.get("items") or [], self._config)

    async def close(self) -> None:
        """See the base class."""
        if self._starting:
            await asyncio.wait(list(self._starting.values()))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for worker in self._workers.values():
            worker.impatient()
        if self._watch is not None:
            await self._watch.close()
        if self._cluster is not None:
            await self._cluster.close()

    # ----------------------------------------------------------------------------------------- how one is made

    async def _start(self, spec: WorkerSpec) -> WorkerInfo:
        body = pods.make_pod(spec, self._config, instance=self.instance, secret=f"flame-{secrets.token_hex(8)}")
        pod = await self._insist(self._make(body))
        environment = {**self._config.environment, **spec.environment}
        secret = pods.make_secret(pods.secret_of(pod), pod, environment)
        worker = self._know(pod)
        try:
            await self._insist(self._make(secret, self._there.secrets))
        except RunnerError:
            worker.told = True
            self._spawn(self._delete(worker, 0))
            raise
        if worker.verdict == _UNSEEN:  # else the watch was faster, and what it says is newer
            self._see(pod)
        return worker.info

    def _make(self, body: Object, path: str | None = None) -> Any:
        """Make something, or find it made: also by ourselves, when the answer to an earlier try was lost."""

        async def make() -> Object:
            where = path or self._there.pods
            try:
                return await self._there.call("POST", where, body)
            except Refused as error:
                if error.reason != "AlreadyExists":
                    raise
            if path is not None:
                return body  # a Secret, which we may make and not read; its name is of chance, so it is ours
            found = await self._there.call("GET", f"{where}/{body['metadata']['name']}")
            if found["metadata"]["labels"].get("flame-instance") != body["metadata"]["labels"]["flame-instance"]:
                raise RunnerError(f"There is a pod {body['metadata']['name']} already, which is not ours.")
            return found

        return make

    async def _insist(self, make: Any) -> Object:
        """Try again where the cluster does not answer, or is too busy to."""
        pause = 0.1
        for left in reversed(range(_TRIES)):
            try:
                made: Object = await make()
                return made
            except Refused as error:
                if not left or (error.code < 500 and error.code != 429):
                    raise
            except RunnerError:
                if not left:
                    raise
            await asyncio.sleep(pause)
            pause *= 4
        raise AssertionError("unreachable")

    # ------------------------------------------------------------------------------------------ what is heard

    def _listed(self, items: Sequence[Object]) -> None:
        for pod in items:
            self._see(pod)
        there = {pod["metadata"]["name"] for pod in items}
        for name, worker in list(self._workers.items()):
            if name not in there and name not in self._starting:
                self._lost(worker)

    def _changed(self, change: str, pod: Object) -> None:
        if change == "DELETED":
            known = self._workers.get(pod["metadata"]["name"])
            if known is not None and known.uid == pod["metadata"]["uid"]:
                known.verdict = judge(pod)
                self._lost(known)
        else:
            self._see(pod)

    def _know(self, pod: Object) -> _Worker:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        known = self._workers.get(name)
        if known is None or known.uid != uid:
            if known is not None:
                known.gone.set()
            known = self._workers[name] = _Worker(pods.read_info(pod), uid)
        return known

    def _see(self, pod: Object) -> None:
        """A pod is there, and this is how it is."""
        worker, verdict = self._know(pod), judge(pod)
        if worker.told:
            return
        before, worker.verdict = worker.verdict, verdict
        if verdict.exit is not None:
            self._over(worker, verdict.exit)
            return
        if verdict.message != before.message or verdict.stage is not before.stage:
            self._say(worker.info, verdict.message)
        if verdict.stage is Stage.ROOM and verdict.judged:
            self._roomless.pop(worker.info.task, None)
            self._roomless[worker.info.task] = verdict.message
            if len(self._roomless) > _ROOMLESS:
                del self._roomless[next(iter(self._roomless))]
        elif verdict.stage is not Stage.ROOM:
            self._roomless.pop(worker.info.task, None)
        if verdict.stage is Stage.DOOMED:
            self._lose_patience(worker)
        elif verdict.stage is not before.stage or worker.patience is None:
            self._wind(worker, verdict.stage)

    def _lost(self, worker: _Worker) -> None:
        """The cluster has the pod no more."""
        worker.gone.set()
        worker.impatient()
        del self._workers[worker.info.handle]
        if not worker.told:
            how = worker.verdict.exit or WorkerExit(None, None, worker.verdict.message)
            if how.message is None:
                how = how._replace(message=f"Its pod {worker.info.handle} was deleted, and not by Flame.")
            self._over(worker, how)

    def _over(self, worker: _Worker, how: WorkerExit) -> None:
        """A worker ended, and not because we wanted it to."""
        worker.told = True
        worker.impatient()
        if self._untold is None:
            self._report(worker, how)
        else:
            self._untold.append((worker, how))

    def _report(self, worker: _Worker, how: WorkerExit) -> None:
        if not worker.gone.is_set():
            keep = 0.0 if how.exit_code == 0 else self._config.keep_ended
            loop = asyncio.get_running_loop()
            worker.keeping = loop.call_later(keep, lambda: self._spawn(self._delete(worker, 0)))
        if self._on_exit is not None:
            self._on_exit(worker.info, how)

    # ------------------------------------------------------------------------------------------------ patience

    def _wind(self, worker: _Worker, stage: Stage) -> None:
        if worker.patience is not None:
            worker.patience.cancel()
        seconds = {
            Stage.ROOM: self._config.room_patience,
            Stage.IMAGE: self._config.pull_patience,
            Stage.REFUSED: _SECRET,
            Stage.STARTING: self._config.start_patience,
        }.get(stage)
        if seconds is not None:
            worker.patience = asyncio.get_running_loop().call_later(seconds, self._lose_patience, worker)

    def _lose_patience(self, worker: _Worker) -> None:
        if not worker.told:
            worker.told = True
            cause = worker.verdict.message
            if worker.verdict.stage is Stage.ROOM and not worker.verdict.judged:
                # The scheduler puts off a pod like one that it could not place; what it said of that one holds for this.
                cause = self._roomless.get(worker.info.task, cause)
            self._spawn(self._give_up(worker, cause))

    async def _give_up(self, worker: _Worker, cause: str | None) -> None:
        """Remove a pod that does not come to run; then say why."""
        try:
            await self._remove(worker, 0)
        except RunnerError as error:
            log.error("pod %s cannot be removed: %s", worker.info.handle, error)
        if self._on_exit is not None:
            self._on_exit(worker.info, WorkerExit(None, None, cause))

    # ------------------------------------------------------------------------------------------------- removal

    async def _remove(self, worker: _Worker, grace: float) -> None:
        """Delete a pod and wait until it is gone; a node that does not answer is not waited for."""
        worker.impatient()
        await self._delete(worker, grace)
        for left in (grace + _REMOVAL, _REMOVAL):
            try:
                async with asyncio.timeout(left):
                    await worker.gone.wait()
                return
            except TimeoutError:
                log.warning("pod %s does not go; it is struck off", worker.info.handle)
                await self._delete(worker, 0)
        raise RunnerError(f"The pod {worker.info.handle} does not go.")

    async def _delete(self, worker: _Worker, grace: float) -> None:
        """Have a pod deleted; one that is gone is no error, and nor is a newer one of its name."""
        if worker.gone.is_set():
            return
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": math.ceil(grace),
            "preconditions": {"uid": worker.uid},
        }
        try:
            await self._there.call("DELETE", f"{self._there.pods}/{worker.info.handle}", body)
        except Refused as error:
            if error.code not in (404, 409):
                raise

    # --------------------------------------------------------------------------------------------- small pieces

    @property
    def _there(self) -> Cluster:
        if self._cluster is None:
            raise RunnerError("The cluster is not connected.")
        return self._cluster

    @property
    def _watching(self) -> Watch:
        if self._watch is None:
            raise RunnerError("The cluster is not connected.")
        return self._watch

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("something about a pod failed: %s", error)
