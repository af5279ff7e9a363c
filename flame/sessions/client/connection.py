"""The connection of a client: one to a server for all the sessions that it has there, each on a channel.

When it is lost it comes back by itself, as soon as the server is there, and each session says again what was not confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from flame.client import config
from flame.client.http import Session as Http
from flame.errors import FlameError, ServerUnreachable
from flame.sessions import dialing, wire
from flame.sessions.client import refusals
from flame.sessions.client.describing import describe
from flame.sessions.client.session import Session
from flame.sessions.link import Link
from flame.sessions.opening import open_link

#: Seconds that a server may be away.
PATIENCE = 120.0


class Connection:
    """A connection to a server, for any number of sessions. An async context manager.

    :param server: its address. None takes ``FLAME_SERVER``, then what is configured, then the server that runs on this machine; where
        there is none, a private one is started for as long as this lasts.
    :param token: the token. None takes ``FLAME_TOKEN``, then the configured one.
    :param patience: seconds for which a server may be away before everything that waits for it fails.
    :ivar http: requests of the REST API, once it is entered.
    """

    http: Http

    def __init__(self, server: str | None = None, token: str | None = None, *, patience: float = PATIENCE) -> None:
        settings = config.resolve(server, token)
        self.server = settings.server
        self._token = settings.token
        self._patience = patience
        self._stack = contextlib.AsyncExitStack()
        self._link: Link | None = None
        self._sessions: dict[int, Session] = {}
        self._bundles: dict[str, bytes] = {}
        self._next = 1
        self._closed = False
        self._returning: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Connection:
        try:
            if self.server is None:
                # To be attached also keeps a server that runs already, which may be the private one of somebody about to leave.
                from flame.client.attach import attached

                client = await self._stack.enter_async_context(attached(config.data_dir(), token=self._token))
                self.server = client.server
            self._link = await self._dial()
            self.http = await self._stack.enter_async_context(Http(self.server, self._token))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection. Sessions stay as they are."""
        self._closed = True
        if self._returning is not None:
            self._returning.cancel()
        if self._link is not None:
            self._link.close()
        for session in list(self._sessions.values()):
            session.fail(ServerUnreachable("The connection was closed."))
        await self._stack.aclose()

    def open(self, app: Any = None, **options: Any) -> Session:
        """A session on this connection; see :func:`open`."""
        return Session(self, *describe(app, **options))

    def join(self, id: str) -> Session:
        """A session that is open already, by its id."""
        return Session(self, None, {}, id=id)

    # ------------------------------------------------------------------------------------------ for sessions

    def send(self, *message: Any) -> None:
        """Send a message, if there is a connection; whoever needs it says it again when there is one."""
        if self._link is not None:
            self._link.send(*message)

    def add(self, session: Session, bundles: Mapping[str, bytes]) -> int:
        """A channel for a session."""
        number, self._next = self._next, self._next + 1
        self._sessions[number] = session
        self._bundles.update(bundles)
        return number

    def remove(self, number: int) -> None:
        """A channel is not used any more."""
        self._sessions.pop(number, None)

    # ------------------------------------------------------------------------------------------------ pieces

    async def _dial(self) -> Link:
        assert self.server is not None
        link = Link(self._hear, self._lost)
        try:
            await open_link(self.server, "/v1/session-link", self._token, link)
        except dialing.Refused as error:
            raise refusals.of_door(error) from error
        return link

    def _hear(self, message: list[Any]) -> None:
        session = self._sessions.get(message[1])
        if session is None:
            return
        if message[0] == wire.REFUSED and message[4] in self._bundles:
            self.send(wire.CODE, message[4], self._bundles[message[4]])
            session.reopen()
            return
        session.hear(message)

    def _lost(self) -> None:
        self._link = None
        if not self._closed:
            self._returning = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        """Come back to the server, as soon as it is there."""
        from flame.client.follow import Backoff

        backoff = Backoff(patience=self._patience)
        while True:
            try:
                link = await self._dial()
                break
            except ServerUnreachable as error:
                try:
                    await backoff.failed(error)
                except FlameError as final:
                    self._give_up(final)
                    return
            except FlameError as error:
                self._give_up(error)
                return
        self._link = link
        for session in list(self._sessions.values()):
            session.reopen()

    def _give_up(self, error: FlameError) -> None:
        for session in list(self._sessions.values()):
            session.fail(error)


def connect(server: str | None = None, token: str | None = None, *, patience: float = PATIENCE) -> Connection:
    """A connection for several sessions: ``async with flame.sessions.connect() as connection``. See :class:`Connection`."""
    return Connection(server, token, patience=patience)


def open(app: Any = None, *, connection: Connection | None = None, **options: Any) -> Session:  # noqa: A001 - it opens
    """A session, which is opened by entering it: ``async with flame.sessions.open(app) as session``.

    :param app: a class or a function; an :class:`~flame.spec.sessions.Application`; or the name of a registered one.
    :param connection: where; None makes one of its own, to the configured server or else a private one.
    :param options: ``common_data``, and what :class:`~flame.spec.sessions.SessionForm` and, of an inline application,
        :class:`~flame.spec.sessions.Application` take: ``slots``, ``priority``, ``weight``, ``min_instances``, ``max_instances``,
        ``batch_size``, ``timeout``, ``retries``, ``retry_budget``, ``delay_release``, ``id``; ``arguments``, ``environment``,
        ``dependencies``, ``resources``, ``image``; ``code``: a folder whose files all travel.
    :raises flame.errors.UsageError: this is no application, or an option is not known.
    """
    described = describe(app, **options)
    return Session(connection or Connection(), *described, own=connection is None)
