"""Commands in the containers of pods, through the cluster's API server: the protocol ``v4.channel.k8s.io`` over a websocket."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from flame.runners.kubernetes_cluster import Cluster, Refused
from flame.runners.kubernetes_pod import CONTAINER

_STDIN, _STDOUT, _STDERR, _END = range(4)
_FAILED = "NonZeroExitCode"
_KEPT = 2000  # bytes of what it complains about


class Execution:
    """A command that runs. Made by :func:`execute`.

    :ivar complaint: the last of what it has printed on its standard error.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.complaint = b""

    async def write(self, data: bytes) -> None:
        """Send something to its standard input."""
        await self._socket.send_bytes(bytes([_STDIN]) + data)

    async def output(self) -> AsyncGenerator[bytes, None]:
        """What it prints, as it comes, until it ends. How it ends is its own affair.

        :raises flame.runners.kubernetes_cluster.Refused: it could not be started.
        """
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == _STDOUT:
                yield data
            elif channel == _STDERR:
                self.complaint = (self.complaint + data)[-_KEPT:]
            elif channel == _END:
                status = msgspec.json.decode(data, type=dict[str, object])
                if status.get("status") != "Success" and status.get("reason") != _FAILED:
                    raise Refused(f"The cluster refuses: {status.get('message')}.", 500, str(status.get("reason")))


@asynccontextmanager
async def execute(
    cluster: Cluster, pod: str, command: Sequence[str], *, talk: bool = False
) -> AsyncIterator[Execution]:
    """Run a command in the worker's container of a pod, as its user.

    :param talk: it has a standard input, which ends when the context is left.
    :raises flame.runners.kubernetes_cluster.Refused: there is no such pod, it does not run, or we may not.
    :raises flame.errors.RunnerError: the cluster does not answer.
    """
    query = [("container", CONTAINER), ("stdout", "true"), ("stderr", "true")]
    query += [("stdin", "true")] if talk else []
    query += [("command", word) for word in command]
    async with cluster.websocket(f"{cluster.pods}/{pod}/exec", query) as socket:
        yield Execution(socket)


async def printed(cluster: Cluster, pod: str, script: str) -> str:
    """Run a shell's script in a pod; gives what it prints.

    :raises flame.errors.RunnerError: as :func:`execute`.
    """
    async with execute(cluster, pod, ["sh", "-c", script]) as running:
        return b"".join([piece async for piece in running.output()]).decode("utf-8", "replace")
