"""Workers in pods of a cluster: found by the labels that the runner gives them, and reached through its API server.

A pod sees no files of this machine, so its worker would never come to a moment of a trial: in each pod of the job a small program
(:mod:`flame.chaos.far_points`) keeps a folder there like the one here. What is wished for here is wished for there; what is taken
there is taken here, unless another worker was faster, and then the one that came late is let go at once.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flame.chaos import far_points
from flame.chaos.execution import Execution, execute, printed
from flame.chaos.inside import LIST, Inside, read
from flame.chaos.target import Target
from flame.errors import RunnerError, UsageError
from flame.runners import kubernetes_pod
from flame.runners.kubernetes_cluster import Cluster, Object, Refused, Watch
from flame.runners.kubernetes_config import KubernetesConfig

_LOOK = 0.02  # seconds between two looks at the folder here
_AGAIN = 0.05  # seconds until a pod is asked again whose container does not run yet
_PATIENCE = 20.0  # seconds for which a pod may run and let no command be run in it
_FORBIDDEN = (401, 403)
_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class InPod(Inside):
    """A process in the worker's container of a pod.

    :ivar pod: its name.
    """

    cluster: Cluster
    pod: str

    @property
    def place(self) -> str:
        """See the base class."""
        return f"{self.pid} in pod {self.pod}"

    async def run(self, script: str) -> str:
        """See the base class."""
        return await _run(self.cluster, self.pod, script)

    async def cut(self) -> int:
        """See the base class. They are the node's, which lends nobody their descriptors."""
        raise UsageError("The connections of a process in a pod cannot be cut. Kill or pause it instead.")


class Pods:
    """The workers that one cluster runs, in one namespace. Made by :meth:`connect`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @classmethod
    async def connect(cls, config: Mapping[str, Any]) -> Pods:
        """Read the credentials; nothing is sent.

        :param config: of the compute, as the server shows it.
        :raises flame.errors.FlameError: they cannot be read here.
        """
        if config.get("credentials") is not None:
            raise UsageError("its credentials are known to the server alone; give the compute a kubeconfig instead")
        return cls(await Cluster.connect(msgspec.convert(config, KubernetesConfig)))

    async def workers(self, job: str) -> list[Target]:
        """The flamelets of a job and what they run.

        :param job: its id.
        :raises flame.errors.RunnerError: the cluster does not answer.
        """
        there = await self._list(kubernetes_pod.selector_of_job(job))
        found = await asyncio.gather(*(self._inside(pod) for pod in there if pod["status"].get("phase") == "Running"))
        return [target for each in found for target in each]

    async def mirror(self, job: str, folder: Path) -> None:
        """Have the workers of a job come to the moments of a folder here. It ends only when it is cancelled; then whoever is held goes on.

        :param job: its id.
        :raises flame.errors.UsageError: that is not allowed here, or fails in a pod that runs.
        """
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mirrors: dict[str, _Mirror] = {}

        def see(pod: Object) -> None:
            uid, status = pod["metadata"]["uid"], pod["status"]
            if uid not in mirrors and pod["spec"].get("nodeName"):
                mirrors[uid] = _Mirror(self._cluster, pod["metadata"]["name"], folder, failed)
            if uid in mirrors:
                mirrors[uid].see(status.get("phase", ""))

        def listed(items: Sequence[Object]) -> None:
            for pod in items:
                see(pod)

        def changed(change: str, pod: Object) -> None:
            if change != "DELETED":
                see(pod)
            elif gone := mirrors.get(pod["metadata"]["uid"]):
                gone.see("Failed")

        selector = kubernetes_pod.selector_of_job(job)
        watch = Watch(self._cluster, self._cluster.pods, selector, listed=listed, changed=changed)
        try:
            await failed
        finally:
            await watch.close()
            await asyncio.gather(*(mirror.close() for mirror in mirrors.values()))

    async def remove(self, server: str) -> None:
        """Remove all pods of a server, whatever they are doing.

        :param server: its id.
        """
        for pod in await self._list("flame-instance"):
            meta = pod["metadata"]
            if (
                meta["labels"]["flame-instance"].partition("-")[0] == server
            ):  # a hyphen, and which compute of the server
                body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
                try:
                    await self._cluster.call("DELETE", f"{self._cluster.pods}/{meta['name']}", body)
                except Refused as refusal:
                    if refusal.code != 404:
                        raise

    async def close(self) -> None:
        """Let go of the cluster."""
        await self._cluster.close()

    async def _list(self, selector: str) -> list[Object]:
        listing = await self._cluster.call("GET", self._cluster.pods, query={"labelSelector": selector})
        return listing.get("items") or []

    async def _inside(self, pod: Object) -> list[Target]:
        info = kubernetes_pod.read_info(pod)
        return [
            InPod(info.task, info.attempt, flamelet, pid, self._cluster, info.handle)
            for pid, flamelet in read(await _run(self._cluster, info.handle, LIST))
        ]


async def _run(cluster: Cluster, pod: str, script: str) -> str:
    """Run a script in a pod; one that is gone has nothing to say. The cluster takes a moment to see that a container has ended."""
    until = asyncio.get_running_loop().time() + _PATIENCE
    while True:
        try:
            return await printed(cluster, pod, script)
        except Refused as refusal:
            if refusal.code in _FORBIDDEN or asyncio.get_running_loop().time() > until:
                raise
        if not await _runs(cluster, pod):
            return ""
        await asyncio.sleep(_AGAIN)


async def _runs(cluster: Cluster, pod: str) -> bool:
    try:
        found = await cluster.call("GET", f"{cluster.pods}/{pod}")
    except Refused as refusal:
        if refusal.code == 404:
            return False
        raise
    return bool(found["status"].get("phase") == "Running")


class _Mirror:
    """The folder of one pod, kept like the one here until the pod ends.

    :param failed: gets the error, if it cannot be done.
    """

    _wished: set[str]  # what the pod's folder has been told of
    _held: set[str]  # what was taken there, and counts here
    _late: set[str]  # what was taken there when another had been faster

    def __init__(self, cluster: Cluster, pod: str, folder: Path, failed: asyncio.Future[None]) -> None:
        self._cluster = cluster
        self._pod = pod
        self._folder = folder
        self._failed = failed
        self._running = False
        self._work = asyncio.create_task(self._keep())
        self._work.add_done_callback(self._ended)

    def see(self, phase: str) -> None:
        """What the cluster says of the pod."""
        if phase in _ENDED:
            self._work.cancel()
        self._running = phase == "Running"

    async def close(self) -> None:
        """End it."""
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)

    async def _keep(self) -> None:
        command = ["python", "-c", inspect.getsource(far_points), kubernetes_pod.POINTS]
        loop, since = asyncio.get_running_loop(), None
        while True:
            try:
                async with execute(self._cluster, self._pod, command, talk=True) as running:
                    since = None
                    await self._follow(running)
                said = running.complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
            except RunnerError as error:
                said = error.message
                if isinstance(error, Refused) and error.code in _FORBIDDEN:
                    namespace = self._cluster.namespace
                    raise self._unable(
                        f"The credentials lack the right to create pods/exec in the namespace {namespace}."
                    ) from error
            if self._running:
                since = since or loop.time()
                if loop.time() - since > _PATIENCE:
                    raise self._unable(said or "It does not answer.")
            await asyncio.sleep(_AGAIN)

    def _ended(self, work: asyncio.Task[None]) -> None:
        if not work.cancelled() and (error := work.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    def _unable(self, why: str) -> UsageError:
        return UsageError(f"The worker in the pod {self._pod} cannot be held at a moment: {why}")

    async def _follow(self, running: Execution) -> None:
        """Pass on what changes on either side, until the command over there ends."""
        self._wished, self._held, self._late = set(), set(), set()
        hearing = asyncio.create_task(self._hear(running))
        try:
            while not hearing.done():
                await self._tell(running)
                await asyncio.wait([hearing], timeout=_LOOK)
            hearing.result()
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def _hear(self, running: Execution) -> None:
        rest = b""
        async for piece in running.output():
            *lines, rest = (rest + piece).split(b"\n")
            for name in (line.decode() for line in lines):
                try:
                    (self._folder / name.partition(".taken-")[0]).rename(self._folder / name)
                    self._held.add(name)
                except FileNotFoundError:
                    self._late.add(name)

    async def _tell(self, running: Execution) -> None:
        here = set(os.listdir(self._folder))
        wishes = {name for name in here if ".taken-" not in name}
        remove = (self._wished - wishes) | (self._held - here) | self._late
        lines = [f"put {name}\n" for name in wishes - self._wished] + [f"remove {name}\n" for name in remove]
        self._wished, self._held, self._late = wishes, self._held & here, set()
        if lines:
            await running.write("".join(lines).encode())
