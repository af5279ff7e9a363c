"""Connections of clients: one carries all the sessions that a client has open, each on a channel of the client's choice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from flame.errors import FlameError, Forbidden, NotFound, SpecError
from flame.sessions import wire
from flame.sessions.lifecycle import Options
from flame.sessions.link import Link
from flame.sessions.manager.apps import NeedsBundle, Sees
from flame.sessions.manager.journal import Member
from flame.sessions.manager.live import Live
from flame.sessions.manager.manager import Manager
from flame.spec.nesting import check_nesting
from flame.spec.sessions import SessionForm
from flame.spec.shape import shape

log = logging.getLogger("flame.sessions")

#: Bytes of inputs that a client may have under way in one session.
WINDOW = 64 << 20


class _Channel:
    """A session that this client has open."""

    def __init__(self, live: Live, client: str, member: Member) -> None:
        self.live = live
        self.client = client
        self.member = member
        self.unwatch: Callable[[], None] = lambda: None


class Client:
    """A client's connection.

    :param manager: the sessions.
    :param sees: whether this client may see a record.
    :param project: where its new sessions belong.
    :param owner: who it is.
    """

    def __init__(self, manager: Manager, *, sees: Sees, project: str, owner: str) -> None:
        self._manager = manager
        self._sees = sees
        self._project = project
        self._owner = owner
        self._channels: dict[int, _Channel] = {}
        self._works: set[asyncio.Task[None]] = set()
        self._uploads: set[asyncio.Task[None]] = set()
        self.link = Link(self._hear, self._lost)
        manager.join(self.link)

    def _hear(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == wire.SUBMIT:
            _, number, first, payloads, options = message
            self._submit(number, first, payloads, options)
        elif kind == wire.ACK:
            channel = self._channels.get(message[1])
            if channel is not None:
                self._manager.tasks.acknowledge(channel.live, channel.client, message[2])
        elif kind == wire.OPEN:
            self._spawn(message[1], self._open(*message[1:]))
        elif kind == wire.CODE:
            upload = self._spawn(0, self._manager.apps.keep(message[1], message[2]))
            self._uploads.add(upload)
            upload.add_done_callback(self._uploads.discard)
        elif kind == wire.CLOSE:
            self._spawn(message[1], self._close(*message[1:]))
        elif kind == wire.CANCEL:
            _, number, request, numbers, force = message
            channel = self._channels[number]
            taken = self._manager.tasks.cancel(channel.live, channel.client, numbers, force=force)
            self.link.send(wire.CANCELLED, number, request, taken)
        elif kind == wire.WATCH:
            self._watch(message[1], self._channels[message[1]])
        elif kind == wire.LEAVE:
            self._leave(self._channels.pop(message[1], None))
        else:
            raise ValueError(f"a client says {kind}")

    async def _open(self, number: int, form: dict[str, Any] | None, session: str | None, client: str) -> None:
        """Open a session by its form, or join one by its id; with the bundles that came before."""
        if self._uploads:
            await asyncio.wait(set(self._uploads))
        if form is not None:
            wanted = shape(form, SessionForm)
            check_nesting(msgspec.json.encode(wanted))
            live = await self._manager.register.open(wanted, project=self._project, owner=self._owner, sees=self._sees)
        else:
            found = self._manager.register.live(session or "")
            if found is None or not self._sees(found.saved.record):
                record = await self._manager.register.get(session or "")
                if not self._sees(record):
                    raise NotFound(f"There is no session {session!r}.")
                raise Forbidden(f"Session {session} is closed.")
            live = found
        member = live.members.setdefault(client, Member())
        member.link, member.channel = self.link, number
        self._leave(self._channels.pop(number, None))
        self._channels[number] = _Channel(live, client, member)
        self.link.send(wire.OPENED, number, live.id, WINDOW, member.last, list(member.blocks))
        for entry, rows in member.unread.items():
            self.link.send(wire.ANSWERS, number, entry, rows)

    def _submit(self, number: int, first: int, payloads: list[bytes], options: list[Any] | None) -> None:
        channel = self._channels[number]
        chosen = channel.live.options
        if options is not None:
            timeout, retries = options
            chosen = Options(
                chosen.timeout if timeout is None else float(timeout),
                chosen.retries if retries is None else int(retries),
            )
        try:
            for block in self._manager.tasks.submit(channel.live, channel.client, first, payloads, chosen):
                self.link.send(wire.ACCEPTED, number, *block)
        except FlameError as error:
            self._refuse(number, error)

    async def _close(self, number: int, force: bool) -> None:
        channel = self._channels[number]
        await self._manager.register.close(channel.live.id, force=force)
        self.link.send(wire.CLOSED, number)

    def _watch(self, number: int, channel: _Channel) -> None:
        def tell() -> None:
            self.link.send(wire.COUNTS, number, msgspec.to_builtins(channel.live.counts))

        channel.unwatch()
        channel.unwatch = channel.live.watch(tell)
        tell()

    def _leave(self, channel: _Channel | None) -> None:
        if channel is not None:
            channel.unwatch()
            if channel.member.link is self.link:
                channel.member.link = None

    def _lost(self) -> None:
        for channel in self._channels.values():
            self._leave(channel)
        self._channels.clear()
        self._manager.part(self.link)

    def _spawn(self, number: int, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._works.add(task)
        task.add_done_callback(lambda done: self._worked(number, done))
        return task

    def _worked(self, number: int, done: asyncio.Task[None]) -> None:
        self._works.discard(done)
        error = None if done.cancelled() else done.exception()
        if isinstance(error, FlameError):
            self._refuse(number, error)
        elif isinstance(error, msgspec.ValidationError | TypeError | KeyError | RecursionError):
            self._refuse(number, SpecError(f"this does not fit: {error}."))
        elif error is not None:
            log.error("a client's request failed", exc_info=error)
            self.link.close()

    def _refuse(self, number: int, error: FlameError) -> None:
        digest = error.digest if isinstance(error, NeedsBundle) else None
        self.link.send(wire.REFUSED, number, type(error).__name__, error.message, digest)
