"""Executors of sessions in containers and in pods: they come with the load and go when there is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import flame.sessions
from flame.client import Client
from flame.spec.nouns import Compute
from flame.spec.sessions import Application, SessionRecord


@pytest.mark.timeout(600)  # the first of a run builds the image
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
async def test_executors_come_with_the_load_and_go_when_there_is_none(
    kind: str, serving: Any, three: tuple[Compute, ...]
) -> None:
    async with serving() as client:
        await client.computes.create(next(one for one in three if one.kind == kind))
        await client.computes.drain("local")
        app = Application(name="squares", entry="operator:neg")
        async with (
            flame.sessions.connect(client.server, _token(client)) as connection,
            connection.open(app, max_instances=2, delay_release=1.0) as session,
            asyncio.timeout(200),
        ):
            for _ in range(2):  # the second time from nothing again
                assert [answer async for answer in session.map(range(500))] == [-n for n in range(500)]
                record = await _record(client, session.id)
                assert {one.compute for one in record.executors} == {kind}
                while (await _record(client, session.id)).executors or (await client.computes.get(kind)).used.slots:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        assert (await _record(client, session.id)).counts.succeed == 1000


async def _record(client: Client, session: str) -> SessionRecord:
    return await client._session.call("GET", f"/v1/sessions/{session}", into=SessionRecord)


def _token(client: Client) -> str:
    """With which a client was made."""
    return client._session._headers["Authorization"].removeprefix("Bearer ")
