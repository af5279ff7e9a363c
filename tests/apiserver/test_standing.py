"""What is open ends when the right by which it was opened does: on real servers, with the real clients, of which none tries for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from waiting import until

from flame import sessions
from flame.client import Client
from flame.client.http import Session
from flame.client.participant import Participant
from flame.controller.standing import Standing
from flame.errors import FlameError, Forbidden, NotFound, Unauthorized
from flame.spec.nouns import DatasetGroups
from flame.spec.people import LOCAL, ProjectForm, TokenForm, UserChange, UserForm, UserRole
from flame.spec.records import Event, JobState, TaskState
from flame.spec.sessions import Application, SessionForm

#: Runs until it is stopped.
FOR_EVER = "import threading\nprint('waits', flush=True)\nthreading.Event().wait()\n"


class World:
    """A server with users, and a job of theirs that runs."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.accounts = served.server.controller.accounts
        self.standing: Standing = served.server.controller.context.standing
        self.job = ""
        self.task = ""

    async def user(self, name: str, **fields: Any) -> str:
        return str((await self.accounts.create_user(UserForm(name=name, **fields))).token.token)

    async def token(self, days: float = 1.0) -> tuple[str, str]:
        made = await self.accounts.create_token(TokenForm(user="ben", days=days), LOCAL)
        return made.id, made.token

    async def open(self, count: int, right: tuple[Any, ...]) -> None:
        """Wait until so much is open by a right."""
        await until(lambda: len(self.standing.stays.get(right, ())) == count)


@pytest.fixture
async def world(make_server: Any, make_form: Any, make_code: Any) -> AsyncIterator[World]:
    async with make_server() as served:
        one = World(served)
        controller = served.server.controller
        digest = await served.client.code.upload(make_code(FOR_EVER, FOR_EVER))
        for name in ("red", "blue"):
            await one.accounts.create_project(ProjectForm(name=name))
        job = await controller.create_job(make_form(digest, trainers=1), project="red", owner="ben")
        await controller.start_job(job.id)
        one.job, one.task = job.id, (await controller.tasks(job.id))[0].id
        await one.user("ada", role=UserRole.ADMIN)
        await one.user("ben", projects=["red", "blue"])
        async with asyncio.timeout(60), contextlib.aclosing(await controller.events(job.id, follow=True)) as events:
            async for _ in events:
                if all(task.state is TaskState.RUNNING for task in await controller.tasks(job.id)):
                    break
        await controller.register.drain("local")  # tasks of sessions wait
        yield one


async def _last(stream: AsyncGenerator[Any, None]) -> None:
    async with contextlib.aclosing(stream) as things:
        async for _ in things:
            pass


async def follow_events(world: World, client: Client) -> None:
    await _last(client.jobs.events(world.job, follow=True))


async def follow_log(world: World, client: Client) -> None:
    await _last(client.tasks.log(world.task, follow=True))


async def watch_session(world: World, client: Client) -> None:
    app = Application(name="app", entry="json:dumps")
    record = await client.sessions.open(SessionForm(application=app))
    await _last(client.sessions.watch(record.id))


async def wait_for_answer(world: World, client: Client) -> None:
    token = client._session._headers["Authorization"].removeprefix("Bearer ")
    app = Application(name="app", entry="json:dumps")
    async with sessions.connect(client.server, token) as connection, connection.open(app) as session:
        await session.invoke(1)


OPEN: list[Callable[[World, Client], Awaitable[None]]] = [follow_events, follow_log, watch_session, wait_for_answer]


@pytest.mark.parametrize("how", OPEN)
async def test_a_revoked_token_ends_what_is_open_and_says_so(
    world: World, how: Callable[[World, Client], Awaitable[None]]
) -> None:
    number, token = await world.token()
    second, other = await world.token()
    async with Client(world.served.url, token) as client, Client(world.served.url, other) as neighbour:
        following, untouched = asyncio.ensure_future(how(world, client)), asyncio.ensure_future(how(world, neighbour))
        await world.open(1, ("token", number))
        await world.open(1, ("token", second))
        await world.accounts.revoke(number, LOCAL)
        with pytest.raises(Unauthorized, match="revoked"):
            await asyncio.wait_for(following, 10)
        assert not untouched.done()
        await world.accounts.delete_user("ben")
        with pytest.raises(Unauthorized, match="revoked"):
            await asyncio.wait_for(untouched, 10)
    assert not [right for right in world.standing.stays if right[0] == "token"]


@pytest.mark.parametrize("how", OPEN)
async def test_a_token_that_expires_ends_what_is_open(
    world: World, how: Callable[[World, Client], Awaitable[None]]
) -> None:
    number, token = await world.token(days=4 / 86400)
    async with Client(world.served.url, token) as client:
        following = asyncio.ensure_future(how(world, client))
        await world.open(1, ("token", number))
        with pytest.raises(Unauthorized, match="expired"):
            await asyncio.wait_for(following, 15)


async def test_who_is_taken_out_of_a_project_sees_its_things_no_more(world: World) -> None:
    number, token = await world.token()
    async with Client(world.served.url, token) as client:
        following = [asyncio.ensure_future(how(world, client)) for how in (follow_events, follow_log)]
        await world.open(2, ("token", number))
        await world.accounts.update_user("ben", UserChange(projects=["blue"]))
        for one in following:
            with pytest.raises(NotFound):
                await asyncio.wait_for(one, 10)


async def test_with_another_role_one_keeps_what_it_allows_and_no_more(world: World) -> None:
    number, token = await world.token()
    async with Client(world.served.url, token) as client:
        lost: list[FlameError] = []

        async def follow() -> list[Event]:
            return [event async for event in client.jobs.events(world.job, follow=True, on_lost=lost.append)]

        following = asyncio.ensure_future(follow())
        working = asyncio.ensure_future(wait_for_answer(world, client))
        await world.open(2, ("token", number))
        await world.accounts.update_user("ben", UserChange(role=UserRole.VIEWER))
        with pytest.raises(Forbidden, match="viewer"):
            await asyncio.wait_for(working, 10)
        await world.open(1, ("token", number))
        await world.served.server.controller.stop_job(world.job)
        seen = await asyncio.wait_for(following, 60)
        assert [error.message for error in lost] == ["What 'ben' may do here has changed, so the connection was ended."]
        assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].data["state"] == "terminated"


async def test_the_first_user_ends_what_was_open_to_anyone(served: Any, make_form: Any, make_code: Any) -> None:
    digest = await served.client.code.upload(make_code())
    job = await served.client.jobs.create(make_form(digest))
    following = asyncio.ensure_future(_last(served.client.jobs.events(job.id, follow=True)))
    standing = served.server.controller.context.standing
    await until(lambda: ("user", "local") in standing.stays)
    await served.server.controller.accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))
    with pytest.raises(Unauthorized, match="needs a token"):
        await asyncio.wait_for(following, 10)


@contextlib.asynccontextmanager
async def revoked(world: World, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream that any client has opened, with a token that was taken back since."""
    number, token = await world.token()
    url, headers = f"{world.served.url}{path}?follow=true", {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        await world.open(1, ("token", number))
        await world.accounts.revoke(number, LOCAL)
        yield answer


async def test_any_client_is_told_in_the_stream_itself(world: World) -> None:
    async with revoked(world, f"/v1/jobs/{world.job}/events") as answer:
        lines = (await asyncio.wait_for(answer.read(), 10)).splitlines()
    last = msgspec.json.decode(lines[-1])
    assert (last["seq"], last["type"], last["data"]["type"]) == (0, "refused", "Unauthorized")
    assert last["data"]["message"] == "This token is no longer valid: it was revoked."


async def test_a_log_that_is_cut_does_not_look_whole(world: World) -> None:
    async with revoked(world, f"/v1/tasks/{world.task}/log") as answer:
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(answer.read(), 10)


async def test_who_does_not_read_is_cut_off_too(world: World) -> None:
    number, token = await world.token()
    controller = world.served.server.controller
    news = [("warning", {"message": "x" * 100_000})] * 400
    await controller.context.notifier.publish_many(f"job/{world.job}", news)
    port = int(world.served.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 10)
    head = f"GET /v1/jobs/{world.job}/events?follow=true HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"
    writer.write(head.encode())
    await world.open(1, ("token", number))
    await reader.readexactly(1 << 20)  # so much more is on its way that nothing else gets through
    await world.accounts.revoke(number, LOCAL)
    await world.open(0, ("token", number))
    got = 0
    with contextlib.suppress(ConnectionError):
        while piece := await asyncio.wait_for(reader.read(1 << 20), 10):
            got += len(piece)
    assert got < 30_000_000
    writer.close()


# --------------------------------------------------------------------------------------------------- workers


async def test_the_key_of_an_attempt_opens_nothing_when_its_worker_is_gone(world: World) -> None:
    controller = world.served.server.controller
    key = controller.context.keys.task(world.task, 1)
    path, query = f"/v1/tasks/{world.task}", {"attempt": 1}
    async with Session(world.served.url, key) as thief:

        async def listen() -> list[bytes]:
            async with thief.open("GET", f"{path}/events", query=query) as answer:
                return [line async for line in answer.lines() if line]

        await world.open(1, ("task", world.task, 1))  # the worker's own
        following = asyncio.ensure_future(listen())
        await world.open(2, ("task", world.task, 1))
        await controller.end_task(world.task)
        lines = await asyncio.wait_for(following, 60)
        last = msgspec.json.decode(lines[-1])
        assert last["data"] == {
            "type": "Forbidden",
            "message": f"Attempt 1 of task {world.task} is over: its worker has left.",
        }
        for method, what in (("POST", "lease"), ("GET", "manifest"), ("GET", "events")):
            with pytest.raises(Forbidden, match="is over"):
                await thief.call(method, f"{path}/{what}", query=query)


async def test_what_an_older_attempt_sends_is_not_kept(world: World) -> None:
    """An upload that began in time ends with the attempt; a model of the past does not take the place of the next one's."""
    controller = world.served.server.controller
    key = controller.context.keys.task(world.task, 1)
    begun = asyncio.Event()
    go = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"half"
        begun.set()
        await go.wait()
        yield b"other half"

    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as http:
        url = f"{world.served.url}/v1/tasks/{world.task}/artifacts/model.bin?attempt=1"

        async def send() -> tuple[int, bytes]:
            async with http.put(url, data=slowly()) as answer:
                return answer.status, await answer.read()

        sending = asyncio.ensure_future(send())
        await begun.wait()
        await controller.end_task(world.task)
        await until(lambda: controller.supervisor(world.job) is None)
        go.set()
        status, said = await asyncio.wait_for(sending, 20)
        assert status == 403, said
    with pytest.raises(FlameError):
        await controller.context.artifacts.find(world.job, "model.bin")


async def test_a_participant_does_not_replace_the_model_that_the_aggregator_has_handed_in(
    served: Any, make_form: Any, make_code: Any
) -> None:
    controller = served.server.controller
    digest = await served.client.code.upload(make_code(FOR_EVER, FOR_EVER))
    brought = DatasetGroups(role="trainer", dataset_groups={"default": []}, from_user={"default": 1})
    job = await served.client.jobs.create(make_form(digest, datasets=[], data_spec=[brought]))
    await served.client.jobs.start(job.id)
    invite = await served.client.invites.create(job.id)
    async with Participant(served.url, invite.token) as me:
        async with contextlib.aclosing(me.states()) as states:
            async for state, _ in states:
                if state is JobState.DEPLOYING:
                    break
        seat = await me.seat("x" * 32, "site", None)
    top = next(task.id for task in await controller.tasks(job.id) if task.role == "aggregator")
    keys = controller.context.keys

    async def put(task: str, name: str, data: bytes) -> None:
        async with Session(served.url, keys.task(task, 1)) as worker:
            await worker.call("PUT", f"/v1/tasks/{task}/artifacts/{name}", query={"attempt": 1}, data=data)

    await put(seat.task, "model.bin", b"mine, for want of another")
    await put(top, "model.bin", b"the job's")
    with pytest.raises(Forbidden, match="another worker's"):
        await put(seat.task, "model.bin", b"poison")
    await put(seat.task, "notes.txt", b"hello")
    await put(top, "model.bin", b"the job's, later")
    found = await controller.context.artifacts.find(job.id, "model.bin")
    assert found.size == len(b"the job's, later")
