"""How workers that are run by hand find each other, with no control plane.

Their configurations name one address, ``brokers: [{sort: p2p, host: "localhost:10104"}]``. Whoever can bind it
hosts a small meeting point in a thread of its process, and everyone, the host included, is a client of it. When
the hosting process ends, another one that can bind the address takes over and all announce themselves again, so
no worker is special and the order in which they are started does not matter. On a network where no worker runs
on the named host, ``python -m flame.sdk.backends.rendezvous`` is the meeting point.

The other side, and what is said, are in :mod:`flame.sdk.backends.rendezvous_server`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import random
import secrets
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from flame.errors import BackendError
from flame.sdk.backends.base import Member
from flame.sdk.backends.hostport import split_hostport
from flame.sdk.backends.rendezvous_server import (
    DEFAULT_PORT,
    HELLO_SECONDS,
    LINE_LIMIT,
    PING_SECONDS,
    SILENCE_SECONDS,
    VERSION,
    RendezvousServer,
    hand_key,
    proof,
    read,
    same,
    write,
)

log = logging.getLogger(__name__)

#: How long members that a new host does not know yet are given to announce themselves there.
GRACE_SECONDS = 5.0
BACKOFF_SECONDS = (0.05, 2.0)

Change = Callable[[list[Member], list[str]], None]


class _Seat:
    """One channel's group that this worker is in: who it is there, whom it knows, whom it tells."""

    def __init__(self, me: Member, on_change: Change) -> None:
        self.me = me
        self.on_change = on_change
        self.known: dict[str, Member] = {}
        self.told = False
        self.missing: set[str] = set()  # known before a reconnection, not announced at the new host so far

    def change(self, joined: list[Member], left: list[str]) -> None:
        """Take in news and pass on what is really new."""
        fresh = [member for member in joined if member.end != self.me.end and self.known.get(member.end) != member]
        gone = [end for end in left if self.known.pop(end, None) is not None]
        self.known.update({member.end: member for member in fresh})
        self.missing -= {member.end for member in joined} | set(gone)
        if fresh or gone or not self.told:
            self.told = True
            self.on_change(fresh, gone)


class TcpRendezvous:
    """A worker's side of the meeting point; hosts it where it can. Implements :class:`flame.sdk.backends.base.Rendezvous`.

    :param address: ``host:port``; the port may be left out (10104).
    :param job: the job's id.
    :param key: the job's secret.
    :param may_host: False for a worker that must not listen.
    :raises flame.errors.SpecError: the address is none.
    """

    def __init__(self, address: str, job: str, key: bytes, *, may_host: bool = True) -> None:
        self._host, self._port = split_hostport(address, DEFAULT_PORT)
        self._address = address
        self._job = job
        self._key = key
        self._may_host = may_host
        self._seats: dict[tuple[str, str], _Seat] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._server: RendezvousServer | None = None
        self._refusal: str | None = None
        self._tried = threading.Event()  # the first attempt to get in has ended, well or not
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="flame-rendezvous", daemon=True)
        self._closing = False
        self._main: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._thread.start()
        self._started.wait()
        atexit.register(self.close)

    @property
    def hosting(self) -> bool:
        """True while this process is the meeting point."""
        return self._server is not None

    def join(self, channel: str, group: str, me: Member, on_change: Change) -> None:
        """Announce ``me``; see :class:`flame.sdk.backends.base.Rendezvous`.

        Returns once the first attempt to reach the meeting point has ended. When nothing answers there yet, the
        attempts go on in the background.

        :raises flame.errors.BackendError: the meeting point does not know the job's key, or does not prove it.
        """
        self._tried.wait(HELLO_SECONDS * 3)
        if self._refusal is not None and self._writer is None:
            raise BackendError(
                f"The meeting point at {self._address} (brokers, sort p2p) turns this worker away: {self._refusal}. "
                "Give all workers of the job the same FLAME_JOB_KEY, or this job an address of its own."
            )
        self._call(self._join, channel, group, me, on_change)

    def leave(self, channel: str, group: str) -> None:
        """Withdraw from the channel's group; unknown ones are passed over."""
        self._call(self._leave, channel, group)

    def close(self) -> None:
        """Withdraw from everything and stop hosting. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        if self._main is not None:
            self._call(self._main.cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nothing left to withdraw from
            self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._main = self._loop.create_task(self._live())
        self._started.set()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._main)
        finally:
            self._tried.set()
            self._loop.close()

    # From here on everything runs on the loop.

    def _join(self, channel: str, group: str, me: Member, on_change: Change) -> None:
        seat = self._seats[channel, group] = _Seat(me, on_change)
        if self._writer is not None:
            self._announce(self._writer, channel, group, seat)

    def _leave(self, channel: str, group: str) -> None:
        if self._seats.pop((channel, group), None) is not None and self._writer is not None:
            write(self._writer, {"type": "leave", "channel": channel, "group": group})

    def _announce(self, writer: asyncio.StreamWriter, channel: str, group: str, seat: _Seat) -> None:
        seat.missing = set(seat.known)
        write(writer, {"type": "join", "channel": channel, "group": group, "member": seat.me})

    def _key_of(self, job: str) -> bytes:
        return self._key if job == self._job else hand_key(job)

    async def _live(self) -> None:
        """Host where possible, connect, follow; again and again until closed."""
        wait, warned = BACKOFF_SECONDS[0], False
        try:
            while True:
                await self._try_to_host()
                try:
                    await self._follow()
                    wait, warned = BACKOFF_SECONDS[0], False
                except (OSError, BackendError) as error:
                    if isinstance(error, BackendError):
                        self._refusal = error.message
                    if not warned and (not self._tried.is_set() or isinstance(error, BackendError)):
                        warned = True
                        log.warning("The meeting point at %s cannot be used yet: %s. Trying on.", self._address, error)
                self._tried.set()
                await asyncio.sleep(wait * random.uniform(0.5, 1.5))
                wait = min(wait * 2, BACKOFF_SECONDS[1])
        finally:
            if self._writer is not None:
                self._writer.close()
            if self._server is not None:
                for (channel, group), seat in self._seats.items():
                    self._server.withdraw((self._job, channel, group), seat.me.end)
                await self._server.close()
            await asyncio.sleep(0)  # closed transports let go of their sockets in the loop's next turn

    async def _try_to_host(self) -> None:
        if self._server is not None or not self._may_host:
            return
        server = RendezvousServer(self._key_of)
        try:
            await server.start(self._host, self._port)
        except OSError as error:
            log.debug("rendezvous: not hosting %s: %s", self._address, error)
            return
        self._server = server
        log.info("Hosting the meeting point of the workers at %s.", self._address)

    async def _follow(self) -> None:
        """One connection, from its opening to its end (which is no error once it was open)."""
        reader, writer = await self._open()
        pinger: asyncio.Task[None] | None = None
        try:
            if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
                raise ConnectionError("nobody listens")  # TCP's simultaneous open: the socket met itself
            await self._prove(reader, writer)
            self._writer, self._refusal = writer, None
            for (channel, group), seat in self._seats.items():
                self._announce(writer, channel, group, seat)
            self._tried.set()
            pinger = self._loop.create_task(self._ping(writer))
            grace = self._loop.call_later(GRACE_SECONDS, self._give_up_missing)
            try:
                while True:
                    self._hear(await read(reader, SILENCE_SECONDS))
            except OSError as error:
                log.debug("rendezvous: the meeting point %s", error)
            finally:
                grace.cancel()
        finally:
            self._writer = None
            if pinger is not None:
                pinger.cancel()
            writer.close()

    async def _prove(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The handshake.

        :raises OSError: it was cut short.
        :raises flame.errors.BackendError: the other side is not of this job.
        """
        hello = await read(reader, HELLO_SECONDS)
        theirs = hello.get("nonce")
        if hello.get("flame") != VERSION or not isinstance(theirs, str):
            raise BackendError("what answers there is no meeting point of this version of Flame")
        mine = secrets.token_hex(16)
        shown = proof(self._key, "client", self._job, theirs, mine)
        write(writer, {"job": self._job, "nonce": mine, "proof": shown})
        answer = await read(reader, HELLO_SECONDS)
        if isinstance(answer.get("error"), str):
            raise BackendError(answer["error"][:200])
        if not same(answer.get("proof"), proof(self._key, "server", self._job, theirs, mine)):
            raise BackendError("what answers there does not hold the job's key")

    async def _ping(self, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await asyncio.sleep(PING_SECONDS)
            write(writer, {"type": "ping"})

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("type") != "peers":
            return
        seat = self._seats.get((message.get("channel", ""), message.get("group", "")))
        if seat is None:
            return
        try:
            joined = msgspec.convert(message.get("joined"), list[Member])
            left = msgspec.convert(message.get("left"), list[str])
        except msgspec.ValidationError as error:
            raise ConnectionError(f"sent peers that are none: {error}") from None
        seat.change(joined, left)

    def _give_up_missing(self) -> None:
        for seat in self._seats.values():
            if seat.missing:
                seat.change([], sorted(seat.missing))

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                return await asyncio.open_connection(self._host, self._port, limit=LINE_LIMIT)
        except TimeoutError:
            raise ConnectionError(f"nothing answers within {HELLO_SECONDS:g} s") from None


def main(argv: list[str] | None = None) -> int:
    """Run the meeting point apart: ``python -m flame.sdk.backends.rendezvous --host 0.0.0.0 --port 10104``."""
    import argparse
    import signal

    parser = argparse.ArgumentParser(
        prog="python -m flame.sdk.backends.rendezvous",
        description="Where workers that are run by hand meet. Set FLAME_JOB_KEY as for the workers.",
    )
    parser.add_argument("--host", default="localhost", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="the port to listen on (default: %(default)s)")
    options = parser.parse_args(argv)

    async def serve() -> None:
        server = RendezvousServer(hand_key)
        await server.start(options.host, options.port)
        print(f"Workers meet at {options.host}:{options.port}. Ctrl-C ends it.", flush=True)
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        await ended.wait()
        await server.close()

    try:
        asyncio.run(serve())
    except OSError as error:
        parser.exit(1, f"Cannot listen on {options.host}:{options.port}: {error.strerror or error}.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
