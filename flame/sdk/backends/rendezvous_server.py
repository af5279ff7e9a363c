"""The meeting point of workers that are run by hand: who is there, told to all others of the same job.

Only addresses pass through here, never a model. What is said: lines of JSON, at most 64 KiB each. First both
sides prove that they hold the job's key (challenge and response, HMAC-SHA-256, as in RFC 2195 but mutual and with
nonces of both sides), and only then is anything told; so a stranger learns nothing, and a stranger who hosts
the address is not believed. Members of one job never hear of another's.

=====================  ==============================================================================
server -> client       ``{"flame": "rendezvous/1", "nonce"}``
client -> server       ``{"job", "nonce", "proof"}``
server -> client       ``{"proof"}`` or ``{"error": sentence}``
client -> server       ``{"type": "join", "channel", "group", "member"}``, ``{"type": "leave", ...}``, ``{"type": "ping"}``
server -> client       ``{"type": "peers", "channel", "group", "joined": [member], "left": [end]}``, ``{"type": "pong"}``
=====================  ==============================================================================
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from flame.errors import BackendError
from flame.sdk.backends.base import Member

log = logging.getLogger(__name__)

DEFAULT_PORT = 10104
VERSION = "rendezvous/1"
LINE_LIMIT = 64 * 1024
HELLO_SECONDS = 5.0  # the longest a handshake takes before it is given up
PING_SECONDS = 5.0
#: A peer that says nothing for so long is gone. Long, because a process may be busy in native code and because
#: the backends notice a dead peer by themselves: this is for a machine that vanished.
SILENCE_SECONDS = 30.0
MAX_BACKLOG = 1 << 20  # bytes that a client may leave unread before it is dropped

Room = tuple[str, str, str]  # job, channel, group


def hand_key(job: str) -> bytes:
    """The key of a job that is run by hand: ``FLAME_JOB_KEY`` (hex) where it is set, else made from the job's id.

    The second keeps jobs apart, but keeps nobody out who knows the id; it is for a trusted machine or network.

    :raises flame.errors.BackendError: ``FLAME_JOB_KEY`` is set and is not hex.
    """
    given = os.environ.get("FLAME_JOB_KEY", "").strip()
    if not given:
        return hashlib.sha256(b"flame job by hand\0" + job.encode()).digest()
    try:
        return bytes.fromhex(given)
    except ValueError:
        raise BackendError("FLAME_JOB_KEY is not a key: give an even number of hex digits, best 64 of them.") from None


def proof(key: bytes, side: str, job: str, server_nonce: str, client_nonce: str) -> str:
    """What a side shows to prove that it holds the key: hex of an HMAC over both nonces."""
    text = "\0".join((VERSION, side, job, server_nonce, client_nonce))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def same(given: Any, wanted: str) -> bool:
    """Compare a proof, in constant time."""
    return isinstance(given, str) and hmac.compare_digest(given.encode(), wanted.encode())


async def read(reader: asyncio.StreamReader, seconds: float) -> dict[str, Any]:
    """One message. :raises ConnectionError: the stream ended, was silent too long, or holds something else."""
    try:
        # Not wait_for: in Python 3.11 it loses a cancellation that comes together with a line.
        async with asyncio.timeout(seconds):
            line = await reader.readline()
    except TimeoutError:
        raise ConnectionError(f"said nothing for {seconds:g} s") from None
    except ValueError:
        raise ConnectionError("sent a line that is too long") from None
    if not line.endswith(b"\n"):
        raise ConnectionError("closed the connection")
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConnectionError("sent something that is no message") from None


def write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Send one message without waiting; a peer that does not read is dropped."""
    if writer.transport.get_write_buffer_size() > MAX_BACKLOG:
        writer.transport.abort()
    elif not writer.is_closing():
        writer.write(msgspec.json.encode(message) + b"\n")


def _listen(infos: Sequence[tuple[int, int, int, str, tuple[Any, ...]]]) -> list[socket.socket]:
    """Bind and listen on all of the addresses that are this machine's, or on none when one is in use.

    :raises OSError: one is in use.
    """
    sockets: list[socket.socket] = []
    try:
        for family, kind, proto, _, address in dict.fromkeys(infos):
            try:
                sock = socket.socket(family, kind, proto)
            except OSError:
                continue  # a kernel without IPv6
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind(address)
                sock.listen(1024)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                sockets.pop().close()
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class RendezvousServer:
    """The meeting point itself, on the running event loop.

    :param key_of: gives a job's key, by which its members are known.
    """

    def __init__(self, key_of: Callable[[str], bytes]) -> None:
        self._key_of = key_of
        self._rooms: dict[Room, dict[str, tuple[Member, asyncio.StreamWriter]]] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self, host: str, port: int) -> None:
        """Listen on every address that ``host`` has here.

        :raises OSError: the address is in use, or is none of this machine's.
        """
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sockets = _listen(infos)
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "it is no address of this machine")
        self._servers = [await asyncio.start_server(self._serve, sock=sock, limit=LINE_LIMIT) for sock in sockets]

    async def close(self) -> None:
        """Stop listening and drop everyone. Nobody is reported as left: the members meet again elsewhere."""
        self._rooms.clear()
        for server in self._servers:
            server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def withdraw(self, room: Room, end: str) -> None:
        """Report a member as left, as the hosting worker does for itself before it goes."""
        _, writer = self._rooms.get(room, {}).get(end, (None, None))
        if writer is not None:
            self._remove(room, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a connection is served by a task")
        self._connections.add(task)
        try:
            job = await self._admit(reader, writer)
            while job is not None:
                self._handle(job, await read(reader, SILENCE_SECONDS), writer)
        except (ConnectionError, OSError) as error:
            log.debug("rendezvous: a client %s", error)
        except asyncio.CancelledError:
            pass  # the server closes; as a task of its own, nobody above waits for the news
        finally:
            self._connections.discard(task)
            self._forget(writer)
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """The handshake. Gives the client's job, or None for a stranger."""
        mine = secrets.token_hex(16)
        write(writer, {"flame": VERSION, "nonce": mine})
        hello = await read(reader, HELLO_SECONDS)
        job, theirs = hello.get("job"), hello.get("nonce")
        if not isinstance(job, str) or not isinstance(theirs, str):
            return None
        key = self._key_of(job)
        if not same(hello.get("proof"), proof(key, "client", job, mine, theirs)):
            write(writer, {"error": "the key of the job is another one here"})
            return None
        write(writer, {"proof": proof(key, "server", job, mine, theirs)})
        return job

    def _handle(self, job: str, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        kind = message.get("type")
        if kind == "ping":
            write(writer, {"type": "pong"})
            return
        channel, group = message.get("channel"), message.get("group")
        if kind not in ("join", "leave") or not isinstance(channel, str) or not isinstance(group, str):
            raise ConnectionError("sent a message of no known type")
        room: Room = (job, channel, group)
        if kind == "leave":
            self._remove(room, writer)
            return
        try:
            member = msgspec.convert(message.get("member"), Member)
        except msgspec.ValidationError as error:
            raise ConnectionError(f"sent a member that is none: {error}") from None
        members = self._rooms.setdefault(room, {})
        known = members.get(member.end)
        if known is not None and known[0].attempt > member.attempt:
            raise ConnectionError(f"is an older attempt of {member.end}")
        members[member.end] = (member, writer)
        others = [each for end, (each, _) in members.items() if end != member.end]
        self._tell(room, [writer], joined=others)
        if known is None or known[0] != member:
            self._tell(room, [w for end, (_, w) in members.items() if end != member.end], joined=[member])

    def _tell(
        self,
        room: Room,
        writers: list[asyncio.StreamWriter],
        joined: list[Member] | None = None,
        left: list[str] | None = None,
    ) -> None:
        _, channel, group = room
        message = {"type": "peers", "channel": channel, "group": group, "joined": joined or [], "left": left or []}
        for writer in writers:
            write(writer, message)

    def _remove(self, room: Room, writer: asyncio.StreamWriter) -> None:
        members = self._rooms.get(room, {})
        left = [end for end, (_, its) in members.items() if its is writer]
        for end in left:
            del members[end]
        if not members:
            self._rooms.pop(room, None)
        elif left:
            self._tell(room, [its for _, its in members.values()], left=left)

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        for room in list(self._rooms):
            self._remove(room, writer)
