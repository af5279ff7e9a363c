"""The child: the process group that runs a role's code, and the link to it.

The group is what is ended, not the process: a role's code may start processes of its own (data loaders), and none of
them may stay. The group is killed while its leader is dead but not yet reaped, because until then the system cannot give its
number to anyone else. Should the flamelet itself be killed, the child's launcher has asked the kernel to be told
(``FLAME_PARENT_PID``, see :mod:`flame.sdk.launch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

_LONGEST_LINE = 64 * 1024 * 1024
_READ = 256 * 1024


class Child:
    """A running child. Made by :meth:`start`."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self._process = process
        self._link = link
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._speaking = asyncio.create_task(self._speak())
        self._exit = asyncio.create_task(self._wait())

    @classmethod
    async def start(cls, command: Sequence[str], *, folder: Path, environment: Mapping[str, str], output: int) -> Child:
        """Start a command in a process group of its own.

        :param folder: its working directory.
        :param environment: its environment, to which ``FLAME_LINK_FD`` and ``FLAME_PARENT_PID`` are added.
        :param output: the file descriptor for what it prints.
        :raises OSError: it could not be started.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                process = subprocess.Popen(  # noqa: ASYNC220
                    command,
                    cwd=folder,
                    env={**environment, "FLAME_LINK_FD": str(theirs.fileno()), "FLAME_PARENT_PID": str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
            except OSError:
                ours.close()
                raise
        return cls(process, ours)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What the child says on the link, until everyone who had the link has closed it.

        The socket is read by itself, not through a transport of asyncio: a child that exits before it has read all that it was
        sent resets the connection, or breaks it for a message under way, and a transport then drops the child's last words.
        """
        rest = b""
        while len(rest) <= _LONGEST_LINE:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._link, _READ)
            except OSError:
                return
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(msgspec.MsgspecError):  # not of the SDK: a role's code may write here too
                    yield msgspec.json.decode(line, type=dict[str, Any])

    def send(self, message: dict[str, Any]) -> None:
        """Say something on the link; passed over when the child has gone."""
        self._outgoing.put_nowait(msgspec.json.encode(message) + b"\n")

    async def _speak(self) -> None:
        with contextlib.suppress(OSError):  # the child has gone
            while True:
                await asyncio.get_running_loop().sock_sendall(self._link, await self._outgoing.get())

    async def wait(self) -> int:
        """Wait until the child has ended and nothing of its group is left.

        :returns: its exit code, or the negative number of the signal that killed it.
        """
        return await asyncio.shield(self._exit)

    async def _wait(self) -> int:
        if hasattr(os, "waitid"):
            await asyncio.to_thread(os.waitid, os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            self._kill(signal.SIGKILL)
            return self._process.wait()
        status = await asyncio.to_thread(self._process.wait)  # macOS has no waitid before Python 3.13
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return status

    async def end(self, grace: float) -> int:
        """Ask the group to end, wait up to ``grace`` seconds, then kill it. Returns as :meth:`wait` does."""
        self._kill(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                return await self.wait()
        self._kill(signal.SIGKILL)
        return await self.wait()

    def _kill(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, unless it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def close(self) -> None:
        """Close the link. Nobody may be reading :meth:`messages` any more."""
        self._speaking.cancel()
        await asyncio.wait([self._speaking])
        self._link.close()
