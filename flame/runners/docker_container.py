"""From a worker to its container and back: how one is made, found, judged when it has ended, and removed.

What a worker is told, its key among it, is copied into the container before the start as a file, which the first thing that runs there
reads and removes, ahead of the task's code. ``docker inspect`` shows a container's environment and command to whoever may ask the
engine anything, and tools write them into logs; the key is in neither.
"""

from __future__ import annotations

import asyncio
import io
import re
import shlex
import signal
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flame.errors import RunnerError
from flame.runners.base import WorkerExit, WorkerInfo, WorkerSpec
from flame.runners.docker_config import DockerConfig
from flame.runners.docker_engine import Engine, Refused
from flame.runners.docker_images import PACKAGES, Packages
from flame.runners.docker_network import HOST
from flame.spec.quantities import parse_bytes, show_bytes

#: The folder that a worker may write to, and the file with what it is told.
_HOME = "/flame"
_TOLD = f"{_HOME}/environment"
_FIRST = f'set -ae; . {_TOLD}; rm {_TOLD}; exec "$@"'
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: What the kernel calls it when a signal has ended a process: 128 and its number.
_SIGNALS = 128
_ENDING = {str(int(number)): number.name for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGQUIT)}
_PATIENCE = 30.0
_LAST_LINES = 200


class Found(NamedTuple):
    """A container of this server. ``info`` is None for one that was to install something."""

    id: str
    info: WorkerInfo | None
    state: str

    @property
    def ended(self) -> bool:
        """It has run, and does not any more."""
        return self.state in ("exited", "dead")


class Containers:
    """The containers of one server on one engine.

    :param instance: the server's id.
    """

    def __init__(self, engine: Engine, config: DockerConfig, instance: str) -> None:
        self._engine = engine
        self._config = config
        self._instance = instance
        self._label = f"flame.instance={instance}"
        self._installing: set[str] = set()
        #: Which events of the engine tell that a container of this server ends, or has ended.
        self.ends = {"type": "container", "label": self._label, "event": ["kill", "die", "destroy"]}

    def name(self, worker: WorkerSpec | WorkerInfo) -> str:
        """The name of a worker's container.

        :raises flame.errors.RunnerError: no container can be called so.
        """
        for part in (worker.task, worker.job):
            if not _NAME.fullmatch(part):
                raise RunnerError(f"{part!r} cannot name a task or a job of a worker in a container.")
        return f"flame-{self._instance[:12]}-{worker.task}-{worker.attempt}"

    async def all(self) -> list[Found]:
        """Those that there are. What an earlier process of the server had begun to make, and nobody will end, is removed."""
        found = []
        for entry in await self._engine.call("containers", all=True, filters={"label": self._label}):
            labels, container = entry["Labels"], entry["Id"]
            if "flame.task" in labels:
                info = WorkerInfo(labels["flame.task"], labels["flame.job"], int(labels["flame.attempt"]), container)
                found.append(Found(container, info, entry["State"]))
            elif container not in self._installing:
                await self.remove(container)
        return found

    async def start(self, spec: WorkerSpec, image: str, packages: Packages, environment: Mapping[str, str]) -> str:
        """Make and start a worker's container; gives its id. One that runs already is that one.

        :param environment: what the worker is told.
        """
        config, resources = self._config, spec.resources
        memory = resources.memory_bytes or (parse_bytes(config.memory) if config.memory is not None else None)
        cpu, gpu = resources.cpu or config.cpu, resources.gpu or config.gpu
        limits: dict[str, Any] = {
            "nano_cpus": round(cpu * 1e9) if cpu else None,
            "mem_limit": memory,
            "memswap_limit": memory,  # as much: none of it is swap
            "shm_size": parse_bytes(config.shared_memory) if config.shared_memory is not None else None,
            "pids_limit": config.processes,
        }
        if gpu:
            limits["device_requests"] = [{"Driver": "", "Count": gpu, "Capabilities": [["gpu"]]}]
        labels = {"flame.task": spec.task, "flame.job": spec.job, "flame.attempt": str(spec.attempt)}
        making: dict[str, Any] = {
            "command": [packages.python, "-P", "-m", spec.module],
            "labels": labels,
            "environment": {**environment, "FLAME_WORK_DIR": f"{_HOME}/work"},
            "binds": [
                *config.volumes,
                *([f"{packages.volume}:{PACKAGES}:ro"] if packages.volume else []),
                *self._trial(environment),
            ],
            "cap_add": config.capabilities,
            **limits,
        }
        name = self.name(spec)
        made = await self._make(name, image, **making)
        if made is None:
            there = await self._engine.find("inspect_container", name)
            if there is not None and there["State"]["Running"]:
                return str(there["Id"])
            await self.remove(name)
            made = await self._make(name, image, **making)
        if made is None:
            raise RunnerError(f"Somebody else makes containers called {name!r}.")
        await self._begin(made)
        return made

    def _trial(self, environment: Mapping[str, str]) -> list[str]:
        """Where crashes are tried, a worker sees the folder in which it is told where (:mod:`flame.sdk.chaospoints`)."""
        folder = environment.get("FLAME_CHAOS")
        return [f"{folder}:{folder}"] if folder and self._engine.local else []

    async def run(self, image: str, command: Sequence[str], volume: str) -> tuple[int, str]:
        """Run something to its end, as root, with a volume at :data:`~flame.runners.docker_images.PACKAGES`.

        :returns: the exit code, and the last of what it has printed.
        """
        binds = [*self._config.volumes, f"{volume}:{PACKAGES}"]
        made = await self._make(None, image, command=command, labels={}, environment={}, user="0:0", binds=binds)
        assert made is not None
        self._installing.add(made)
        try:
            await self._begin(made)
            code = (await self._engine.call("wait", made, timeout=None))["StatusCode"]
            return int(code), (await self.printed(made) or b"").decode(errors="replace")
        finally:
            await self.remove(made)
            self._installing.discard(made)

    async def verdict(self, container: str, *, asked: str | None, away: bool) -> WorkerExit:
        """How a container has ended, with a sentence where the exit code alone does not say why.

        :param asked: the signal that somebody else has sent it through the engine before.
        :param away: it ended while the engine did not answer.
        """
        found = await self._engine.find("inspect_container", container)
        if found is None or found["State"]["Status"] == "removing":
            when = " while the Docker engine did not answer" if away else ""
            return WorkerExit(None, None, f"Its container was removed by somebody{when}.")
        state = found["State"]
        if state["Status"] in ("running", "restarting"):
            return WorkerExit(None, None, "Its container was started anew by somebody; an attempt is never run twice.")
        code = int(state["ExitCode"])
        how = _how(code)
        if state["OOMKilled"] and code:
            limit = found["HostConfig"]["Memory"]
            most = f", of which it may use {show_bytes(limit)}" if limit else ""
            return how._replace(message=f"Its container was killed: it was out of memory{most}.")
        if away:
            return how._replace(
                message="Its container ended while the Docker engine was away; the engine was restarted, perhaps "
                f"({f'killed by {how.signal}' if how.signal else f'exit code {code}'})."
            )
        if asked is not None:
            return how._replace(
                message=f"Its container was ended by {asked}: by somebody, or by the Docker engine as that shut down."
            )
        return how

    async def printed(self, container: str) -> bytes | None:
        """The end of what a container has printed; None where there is none any more."""
        try:
            return bytes(await self._engine.call("logs", container, tail=_LAST_LINES))
        except Refused as refusal:
            if refusal.code in (404, 409):  # it is gone, or about to be
                return None
            raise

    async def remove(self, container: str) -> None:
        """Kill and remove a container; one that is gone is no error. Returns when nothing of it is left.

        :raises flame.errors.RunnerError: it cannot be removed.
        """
        try:
            await self._engine.find("remove_container", container, force=True, v=True)
        except Refused as refusal:
            if refusal.code != 409:  # another one removes it already
                raise
            await self._wait_until_gone(container)

    async def _wait_until_gone(self, container: str) -> None:
        pause = 0.01
        async with asyncio.timeout(_PATIENCE):
            while await self._engine.find("inspect_container", container) is not None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.5)

    async def _make(
        self,
        name: str | None,
        image: str,
        *,
        command: Sequence[str],
        labels: Mapping[str, str],
        environment: Mapping[str, str],
        user: str | None = None,
        **host: Any,
    ) -> str | None:
        """Make a container, not started yet, with what it is told in it. None: the name is taken."""
        config = self._config
        host_config = await self._engine.call(
            "create_host_config",
            network_mode=config.network,
            extra_hosts={HOST: "host-gateway"},
            init=True,  # reaps what is left behind, and passes signals on
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            **host,
        )
        try:
            made = await self._engine.call(
                "create_container",
                image,
                name=name,
                entrypoint=["sh", "-c", _FIRST, "sh"],
                command=list(command),
                user=user or config.user or None,
                working_dir=_HOME,
                labels={**config.labels, "flame.instance": self._instance, **labels},
                host_config=host_config,
            )
        except Refused as refusal:
            if refusal.code == 409:
                return None
            raise
        container = str(made["Id"])
        secrets = {name: secret.reveal() for name, secret in config.secrets.items()}
        try:
            await self._engine.call(
                "put_archive", container, "/", _letter({**config.environment, **secrets, **environment})
            )
        except BaseException:
            await self.remove(container)
            raise
        return container

    async def _begin(self, container: str) -> None:
        try:
            await self._engine.call("start", container)
        except BaseException:
            await self.remove(container)
            raise


def _letter(environment: Mapping[str, str]) -> bytes:
    """The file with what a worker is told, in a folder that it may write to, as a tape archive."""
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items()).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo(_HOME.strip("/"))
        folder.type, folder.mode = tarfile.DIRTYPE, 0o777
        archive.addfile(folder)
        file = tarfile.TarInfo(_TOLD.strip("/"))
        file.size, file.mode = len(text), 0o444  # nobody else is in there, and who the user is the image may know alone
        archive.addfile(file, io.BytesIO(text))
    return buffer.getvalue()


def signal_of(event: Mapping[str, Any]) -> str | None:
    """The signal that an event of the kind ``kill`` tells of; None for one by which nothing ends."""
    return _ENDING.get(event["Actor"]["Attributes"].get("signal", ""))


def _how(code: int) -> WorkerExit:
    if code > _SIGNALS:
        try:
            return WorkerExit(None, signal.Signals(code - _SIGNALS).name)
        except ValueError:
            pass
    return WorkerExit(code, None)
