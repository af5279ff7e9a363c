"""A participant's side of a job: look at it, wait until it begins, take a place.

>>> async with Participant("https://flame.example.org", token) as me:
...     invitation = await me.invitation()
...     async for state, reason in me.states(): ...
...     seat = await me.seat(secret, "clinic", None)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from flame.client.follow import OnLost, insist, resumed
from flame.client.http import Session
from flame.client.resources import Noun, Page
from flame.spec.records import Invitation, Invite, JobState, Seat


class Invites(Noun):
    """The invites of jobs, for those whom the jobs belong to."""

    async def create(
        self, job: str, *, uses: int = 1, seconds: float = 7 * 86400.0, realm: str | None = None
    ) -> Invite:
        """Make an invite; its ``token`` is in the answer, and nowhere else.

        :param uses: how many participants may come with it.
        :param seconds: how long it is good for.
        :param realm: where their data must lie; None: anywhere.
        """
        form: dict[str, Any] = {"uses": uses, "seconds": seconds, "realm": realm}
        return await self._session.call("POST", f"/v1/jobs/{job}/invites", body=form, into=Invite)

    async def list(self, job: str) -> list[Invite]:
        """A job's invites, without their tokens."""
        return (await self._session.call("GET", f"/v1/jobs/{job}/invites", into=Page[Invite])).items

    async def revoke(self, job: str, id: str) -> None:
        """Take an invite back; who came with it is sent away."""
        await self._session.call("DELETE", f"/v1/jobs/{job}/invites/{id}")


class Participant:
    """Whoever holds an invite. An async context manager.

    :param server: the server's address.
    :param token: the invite's token.
    """

    def __init__(self, server: str, token: str) -> None:
        self._session = Session(server, token)

    @property
    def server(self) -> str:
        """The server's address."""
        return self._session.server

    async def invitation(self) -> Invitation:
        """What the job is."""
        return await self._session.call("GET", "/v1/join", into=Invitation)

    async def code(self) -> bytes:
        """The bundle with the roles' code, to be read before any of it runs."""
        return await self._session.call("GET", "/v1/join/code", into=bytes)

    async def states(self, on_lost: OnLost | None = None) -> AsyncGenerator[tuple[JobState, str | None], None]:
        """The states that the job goes through from now on, each with what it waits for; the present one comes first.

        :param on_lost: told each time that the server could not be reached.
        """

        async def ended() -> bool:
            return (await self.invitation()).state.ended

        now = await insist(self.invitation)
        yield now.state, now.reason
        stream = resumed(self._session, "/v1/join/events", query={}, on_lost=on_lost, ended=ended)
        async with aclosing(stream) as events:
            async for event in events:
                yield JobState(event.data["state"]), event.data.get("reason")

    async def seat(self, secret: str, name: str, realm: str | None) -> Seat:
        """Take a place in the job, or come back to one's own.

        :param secret: by which one is known again: at least 32 characters that nobody else knows.
        :param name: what to call oneself.
        :param realm: where one's data lie.
        """
        form = {"secret": secret, "name": name, "realm": realm}
        return await self._session.call("POST", "/v1/join", body=form, into=Seat)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Participant:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
