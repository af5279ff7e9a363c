"""What may be killed and has to be started again by somebody: a server of one's own; and what is alike, as a broker in a trial."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from flame.client.client import Client
from flame.client.follow import insist
from flame.client.local import address
from flame.errors import ServerUnreachable

_PATIENCE = 120.0


class Part(Protocol):
    """Something that is no worker."""

    @property
    def pid(self) -> int:
        """Its process."""

    def kill(self) -> None:
        """Kill it."""

    async def start(self) -> None:
        """Start it (again), as it was."""


class Server:
    """``flame serve`` in a data directory, on the same port each time.

    :param data_dir: its data directory.
    :param environment: variables in addition to those of this process.
    :param options: of ``flame serve``.
    :param through: a command that it is started through, such as ``nice``; it must become the server, and start no process for it.
    """

    def __init__(
        self,
        data_dir: Path,
        environment: Mapping[str, str],
        options: Sequence[str] = (),
        *,
        through: Sequence[str] = (),
    ) -> None:
        self._data_dir = data_dir
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        self._environment |= {"FLAME_DATA_DIR": str(data_dir), **environment}
        self._command = [*through, sys.executable, "-m", "flame", "serve", "--port", "0", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.log = data_dir / "server.log"
        #: Where it listens.
        self.url = ""

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it (again) and wait until it serves.

        :raises flame.errors.ServerUnreachable: it ended instead.
        """
        self._data_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - its end is waited for without the loop, too
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        async with asyncio.timeout(_PATIENCE):
            while self._said() is None:
                if self._process.poll() is not None:
                    lines = self.log.read_text("utf-8", "replace").strip().splitlines()
                    raise ServerUnreachable(f"The server did not start: {lines[-1] if lines else 'it said nothing'}")
                await asyncio.sleep(0.02)

    def _said(self) -> str | None:
        """Its address, when this process of it has said so."""
        try:
            url, pid = address((self._data_dir / "server.json").read_bytes())
        except (OSError, ValueError):
            return None
        if pid != self.pid:
            return None
        self.url = url
        return url

    def kill(self) -> None:
        """SIGKILL; one that does not run is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def end(self) -> None:
        """End it in order."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, 30)
        except subprocess.TimeoutExpired:
            self.kill()


class Running:
    """A server that somebody else has started, in this machine's data directory; it is started again as it was.

    :param data_dir: its data directory.
    :ivar url: where it listens.
    """

    def __init__(self, data_dir: Path, url: str, pid: int) -> None:
        process = psutil.Process(pid)
        self._data_dir = data_dir
        self.url = url
        self.pid = pid
        self._command = process.cmdline()
        self._environment = process.environ()
        self._folder = process.cwd()

    def kill(self) -> None:
        """SIGKILL."""
        process = psutil.Process(self.pid)
        process.kill()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(10)

    async def start(self) -> None:
        """Start it again, in the background, unless whoever minds it has done so; wait until it serves."""
        subprocess.Popen(  # noqa: ASYNC220
            self._command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        async with asyncio.timeout(_PATIENCE), Client(self.url) as client:
            await insist(client.info)
        _, self.pid = address((self._data_dir / "server.json").read_bytes())
