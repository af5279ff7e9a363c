"""The client itself: one connection to one server, with all that the server has as attributes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from flame.client import config
from flame.client.http import Session
from flame.client.jobs import Jobs, Tasks
from flame.client.local import running
from flame.client.resources import Codes, Datasets, Designs, Schemas, ServerInfo


class Client:
    """A Flame server, from Python.

    >>> async with flame.client.Client() as client:
    ...     for job in await client.jobs.list():
    ...         print(job.name, job.state.value)

    :param server: its address. None takes ``FLAME_SERVER``, then what is configured, then the server that runs on this machine.
    :param token: the token. None takes ``FLAME_TOKEN``, then the configured one, if it is for this server.
    :raises flame.errors.SpecError: the configuration cannot be read.
    """

    def __init__(self, server: str | None = None, token: str | None = None) -> None:
        settings = config.resolve(server, token)
        self._session = Session(settings.server or running(config.data_dir()) or config.DEFAULT_SERVER, settings.token)
        self.designs = Designs(self._session)
        self.schemas = Schemas(self._session)
        self.code = Codes(self._session)
        self.datasets = Datasets(self._session)
        self.jobs = Jobs(self._session)
        self.tasks = Tasks(self._session)

    @property
    def server(self) -> str:
        """The server's address."""
        return self._session.server

    async def info(self) -> ServerInfo:
        """What the server says of itself.

        :raises flame.errors.ServerUnreachable: nothing answers there.
        """
        return await self._session.call("GET", "/v1/server", into=ServerInfo)

    @contextlib.asynccontextmanager
    async def attach(self) -> AsyncIterator[None]:
        """Keep a private server alive while the context lasts; any other takes no notice.

        :raises flame.errors.ServerUnreachable: nothing answers there.
        """
        async with self._session.open("GET", "/v1/attach"):
            yield

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
