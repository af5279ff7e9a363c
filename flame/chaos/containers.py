"""Workers in containers of a Docker engine: found by the labels that the runner gives them, and reached through the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flame.chaos import acts
from flame.chaos.inside import LIST, Inside, read
from flame.chaos.target import Target
from flame.errors import UsageError
from flame.runners.docker_engine import Engine, Refused, Tls

#: The container is gone, or ends just now.
_GONE = (404, 409)


@dataclass(frozen=True)
class InContainer(Inside):
    """A process in a container of a Docker engine.

    :ivar container: the engine's id of it.
    """

    engine: Engine
    container: str

    @property
    def place(self) -> str:
        """See the base class."""
        return f"{self.pid} in container {self.container[:12]}"

    async def run(self, script: str) -> str:
        """See the base class."""
        return await _run(self.engine, self.container, script)

    async def cut(self) -> int:
        """See the base class. The kernel must lend us its descriptors, so the engine has to be on this machine, and we root."""
        found = await self.engine.find("inspect_container", self.container)
        if found is None:
            return 0
        pid = await asyncio.to_thread(_outside, int(found["State"]["Pid"]), self.pid) if self.engine.local else None
        if pid is None:
            raise UsageError(
                "The connections of a process in a container can be cut only on the machine of its Docker engine, and by root. "
                "Kill or pause it instead."
            )
        return await asyncio.to_thread(acts.cut, pid)


class Containers:
    """The workers that one engine runs.

    :param config: of the compute, as the server shows it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        tls = config.get("tls")
        self._engine = Engine(config.get("host", ""), None if tls is None else msgspec.convert(tls, Tls))

    @property
    def holds(self) -> bool:
        """Whether its workers come to points: they see this machine's files."""
        return self._engine.local

    async def workers(self, job: str) -> list[Target]:
        """The flamelets of a job and what they run.

        :param job: its id.
        :raises flame.errors.RunnerError: the engine does not answer.
        """
        there = await self._engine.call("containers", filters={"label": [f"flame.job={job}", "flame.attempt"]})
        found = await asyncio.gather(*(self._inside(entry["Id"], entry["Labels"]) for entry in there))
        return [target for each in found for target in each]

    async def remove(self, server: str) -> None:
        """Remove all containers of a server, whatever they are doing.

        :param server: its id.
        """
        for entry in await self._engine.call("containers", all=True, filters={"label": "flame.instance"}):
            if (
                entry["Labels"]["flame.instance"].partition("-")[0] == server
            ):  # a hyphen, and which compute of the server
                await self._engine.find("remove_container", entry["Id"], force=True, v=True)

    def close(self) -> None:
        """Let go of the engine."""
        self._engine.close()

    async def _inside(self, container: str, labels: Mapping[str, str]) -> list[Target]:
        return [
            InContainer(labels["flame.task"], int(labels["flame.attempt"]), flamelet, pid, self._engine, container)
            for pid, flamelet in read(await _run(self._engine, container, LIST))
        ]


async def _run(engine: Engine, container: str, script: str) -> str:
    """Run a script in a container, as its user; gives what it prints. One that is gone has nothing to say."""
    try:
        made = await engine.call("exec_create", container, ["sh", "-c", script], stderr=False)
        return bytes(await engine.call("exec_start", made["Id"])).decode("utf-8", "replace")
    except Refused as refusal:
        # One that ends between the making of the command and its start is an internal error to the engine.
        if refusal.code in _GONE or "is not running" in refusal.reason:
            return ""
        raise


def _outside(first: int, pid: int) -> int | None:
    """The number that a process of a container has on this host; None where that cannot be seen.

    :param first: of the container's first process, on this host.
    :param pid: in the container.
    """
    with suppress(OSError):
        space = os.readlink(f"/proc/{first}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile, or nobody may look at it
                if os.readlink(folder / "ns/pid") == space and _numbers(folder)[-1:] == [pid]:
                    return int(folder.name)
    return None


def _numbers(folder: Path) -> list[int]:
    """The numbers of a process, from the outermost to the innermost."""
    lines = (folder / "status").read_text().splitlines()
    return next(([int(word) for word in line.split()[1:]] for line in lines if line.startswith("NSpid:")), [])
