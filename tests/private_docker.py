"""A Docker engine of a test's own."""

import asyncio
import os
import random
import shutil
import signal
import uuid
from pathlib import Path

import psutil
import pytest


class PrivateEngine:
    """An engine of a test's own, which may be killed and started again.

    It lives in a namespace of mounts of its own, so that what it mounts goes with it, and has a bridge of its own: one without a bridge removes
    ``docker0``, also where that is another engine's.
    """

    def __init__(self, folder: Path, *, live_restore: bool) -> None:
        if os.geteuid() or not all(shutil.which(program) for program in ("dockerd", "unshare", "nsenter", "ip")):
            pytest.skip("no Docker engine of our own: that takes root, dockerd, unshare and ip")
        self._bridge = f"flame{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self.live_restore = live_restore
        self.socket = folder / "docker.sock"
        self._containerd: asyncio.subprocess.Process | None = None
        self._dockerd: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        if self._containerd is None:  # what holds the containers outlives the engine, as on any system
            (self.folder / "containerd.toml").write_text(
                'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            )
            options = [
                "--config",
                "containerd.toml",
                "--address",
                "containerd.sock",
                "--root",
                "root",
                "--state",
                "state",
            ]
            subnet = random.randrange(256)
            for words in (["link", "add", self._bridge, "type", "bridge"], ["link", "set", self._bridge, "up"]):
                assert await _run("ip", *words) == (0, "")
            assert await _run("ip", "address", "add", f"172.31.{subnet}.1/24", "dev", self._bridge) == (0, "")
            command = ["containerd", *(self._path(option) for option in options)]
            self._containerd = await self._spawn("unshare", "--mount", *command)
            async with asyncio.timeout(40):
                while not (self.folder / "containerd.sock").exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        options = [
            "--host",
            f"unix://{self.socket}",
            "--containerd",
            self._path("containerd.sock"),
            "--bridge",
            self._bridge,
        ]
        options += [
            "--data-root",
            self._path("data"),
            "--exec-root",
            self._path("exec"),
            "--pidfile",
            self._path("pid"),
        ]
        options += ["--iptables=false", *(["--live-restore"] if self.live_restore else [])]
        there = ["nsenter", "--target", str(self._containerd.pid), "--mount"]
        self._dockerd = await self._spawn(*there, "dockerd", *options)
        async with asyncio.timeout(40):
            while (await self.docker("info"))[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def _path(self, name: str) -> str:
        return name if name.startswith("-") else str(self.folder / name)

    async def _spawn(self, *command: str) -> asyncio.subprocess.Process:
        with (self.folder / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)

    async def end(self, number: signal.Signals) -> None:
        assert self._dockerd is not None
        await _end(self._dockerd, number)

    async def load(self, image: str) -> None:
        await _run("sh", "-c", f"docker save {image} | docker --host unix://{self.socket} load")

    async def close(self) -> None:
        _, containers = await self.docker("ps", "--all", "--quiet")
        if containers:
            await self.docker("rm", "--force", *containers.split())
        for process in (self._dockerd, self._containerd):
            if process is not None and process.returncode is None:
                await _end(process, signal.SIGTERM)
        for left in psutil.process_iter(
            ["cmdline"]
        ):  # what holds a container has outlived a killed engine, as it should
            if any(str(self.folder) in word for word in left.info["cmdline"] or ()):
                left.kill()
        await _run("ip", "link", "delete", self._bridge)

    async def docker(self, *arguments: str) -> tuple[int, str]:
        return await _run("docker", "--host", f"unix://{self.socket}", *arguments)


async def _end(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    process.send_signal(number)
    async with asyncio.timeout(30):
        await process.wait()


async def _run(*command: str) -> tuple[int, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()
