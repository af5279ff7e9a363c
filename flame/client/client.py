"""The client itself: one connection to one server, with all that the server has as attributes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from flame.client import config
from flame.client.http import Session
from flame.client.jobs import Jobs, Tasks
from flame.client.local import running
from flame.client.participant import Invites
from flame.client.people import Deed, Projects, Tokens, Users
from flame.client.resources import Codes, Computes, Datasets, Designs, Page, Schemas, ServerInfo
from flame.client.sessions import Apps, Sessions
from flame.client.tls import Tls
from flame.errors import ServerUnreachable
from flame.spec.people import Known


class Client:
    """A Flame server, from Python.

    >>> async with flame.client.Client() as client:
    ...     for job in await client.jobs.list():
    ...         print(job.name, job.state.value)

    :param server: its address. None takes ``FLAME_SERVER``, then what is configured, then the server that runs on this machine.
    :param token: the token. None takes ``FLAME_TOKEN``, then the configured one, if it is for this server.
    :param project: where new things are made. None takes ``FLAME_PROJECT``, then the configured one, then the user's first.
    :raises flame.errors.SpecError: the configuration cannot be read.
    """

    def __init__(self, server: str | None = None, token: str | None = None, project: str | None = None) -> None:
        settings = config.resolve(server, token)
        address = settings.server or running(config.data_dir()) or config.DEFAULT_SERVER
        self._session = Session(address, settings.token, Tls.read(settings.ca))
        self._session.project = project or settings.project
        self.designs = Designs(self._session)
        self.schemas = Schemas(self._session)
        self.code = Codes(self._session)
        self.datasets = Datasets(self._session)
        self.computes = Computes(self._session)
        self.jobs = Jobs(self._session)
        self.tasks = Tasks(self._session)
        self.apps = Apps(self._session)
        self.sessions = Sessions(self._session)
        self.users = Users(self._session)
        self.tokens = Tokens(self._session)
        self.projects = Projects(self._session)
        self.invites = Invites(self._session)

    @property
    def server(self) -> str:
        """The server's address."""
        return self._session.server

    async def info(self) -> ServerInfo:
        """What the server says of itself.

        :raises flame.errors.ServerUnreachable: nothing answers there.
        """
        return await self._session.call("GET", "/v1/server", into=ServerInfo)

    async def whoami(self) -> Known:
        """Whom the server takes this client for."""
        return await self._session.call("GET", "/v1/whoami", into=Known)

    async def audit(self, limit: int = 100, *, who: str | None = None, refused: bool = False) -> list[Deed]:
        """Who did what: changes and refusals, the newest last. For admins.

        :param who: only what this one did.
        :param refused: only what was refused.
        """
        query = {"limit": limit, "who": who, "refused": "true" if refused else None}
        return (await self._session.call("GET", "/v1/audit", query=query, into=Page[Deed])).items

    @contextlib.asynccontextmanager
    async def attach(self) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Keep a private server alive while the context lasts; any other takes no notice.

        The context gives a function that waits until the server has gone.

        :raises flame.errors.ServerUnreachable: nothing answers there.
        """
        async with self._session.open("GET", "/v1/attach") as answer:

            async def over() -> None:
                with contextlib.suppress(ServerUnreachable):
                    async for _ in answer.chunks():
                        pass

            yield over

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
