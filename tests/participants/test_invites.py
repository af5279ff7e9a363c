"""What an invite opens, and for whom."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest
from click.testing import CliRunner

from flame.cli.main import flame as command
from flame.client.participant import Participant
from flame.controller.participants import fits
from flame.errors import Conflict, Forbidden, NotFound, SpecError, Unauthorized
from flame.spec.records import JobState, TaskState

ONE, TWO, THREE = ("x" * 32, "y" * 32, "z" * 32)


async def test_an_invite_is_for_so_many_participants_and_each_keeps_its_place(place: Any) -> None:
    job = await place.job(system=0, brought=3)
    invite = await place.client.invites.create(job.id, uses=2)
    await place.state(job, JobState.DEPLOYING)
    async with Participant(place.server.url, invite.token) as me:
        assert (await me.invitation()).free == 3
        first, second = await me.seat(ONE, "one", None), await me.seat(TWO, "two", None)
        assert first.task != second.task
        again = await me.seat(ONE, "one", None)
        assert (again.task, again.attempt, again.state) == (first.task, 2, TaskState.DEPLOYING)
        with pytest.raises(Forbidden, match="used up"):
            await me.seat(THREE, "three", None)
        assert (await me.invitation()).free == 1
    (shown,) = await place.client.invites.list(job.id)
    assert (shown.names, shown.token) == (["one", "two"], None)


async def test_many_may_come_with_one_invite_at_once(place: Any) -> None:
    job = await place.job(system=0, brought=9)
    invite = await place.client.invites.create(job.id, uses=8)
    await place.state(job, JobState.DEPLOYING)
    async with Participant(place.server.url, invite.token) as me:
        seats = await asyncio.gather(*(me.seat(f"{number:040}", f"p{number}", None) for number in range(8)))
        assert len({seat.task for seat in seats}) == 8
        with pytest.raises(Forbidden, match="used up"):
            await me.seat(ONE, "one", None)


async def test_all_places_taken_is_said(place: Any) -> None:
    job = await place.job(system=0, brought=1)
    invite = await place.client.invites.create(job.id, uses=2)
    await place.state(job, JobState.DEPLOYING)
    async with Participant(place.server.url, invite.token) as me:
        await me.seat(ONE, "one", None)
        with pytest.raises(Conflict, match="All places for participants"):
            await me.seat(TWO, "two", None)


async def test_an_expired_invite_lets_nobody_new_in_but_those_back_who_came_in_time(place: Any) -> None:
    job = await place.job(system=0, brought=2)
    invite = await place.client.invites.create(job.id, uses=2, seconds=1.0)
    await place.state(job, JobState.DEPLOYING)
    async with Participant(place.server.url, invite.token) as me:
        await me.seat(ONE, "one", None)

        await asyncio.sleep(invite.expires_at - invite.created_at)  # it is by the clock alone that it expires
        with pytest.raises(Forbidden, match="expired"):
            await me.seat(TWO, "two", None)
        assert (await me.seat(ONE, "one", None)).attempt == 2


@pytest.mark.parametrize("token", ["", "flame-invite", "flame-invite.0123.secret", "x.y.z"])
async def test_no_other_token_opens_anything(place: Any, token: str) -> None:
    job = await place.job(system=0, brought=1, start=False)
    made = (await place.client.invites.create(job.id)).token
    assert made is not None
    for wrong in (token, made[:-1], made + "x", made.replace("flame-invite", "flame")):
        async with Participant(place.server.url, wrong) as me:
            for call in (me.invitation(), me.code(), me.seat(ONE, "one", None)):
                with pytest.raises(Unauthorized):
                    await call


async def test_of_what_happens_in_the_job_an_invite_shows_its_states_alone(place: Any) -> None:
    job = await place.job(system=1, brought=1)
    invite = await place.client.invites.create(job.id)
    await place.state(job, JobState.DEPLOYING)
    async with Participant(place.server.url, invite.token) as me:
        await me.seat(ONE, "one", None)
        await place.client.jobs.stop(job.id)
        seen = [state async for state, _ in me.states()]
    assert {JobState.STARTING, JobState.STOPPING} < set(seen)
    assert seen[-1] is JobState.TERMINATED


async def test_an_invite_that_is_taken_back_ends_what_was_open_with_it(place: Any) -> None:
    job = await place.job(system=0, brought=1, start=False)
    invite, other = [await place.client.invites.create(job.id) for _ in range(2)]
    async with (
        Participant(place.server.url, invite.token) as me,
        Participant(place.server.url, other.token) as them,
        aclosing(me.states()) as states,
        aclosing(them.states()) as theirs,
    ):
        for stream in (states, theirs):
            assert await anext(stream) == (JobState.READY, None)
        waiting, patient = asyncio.ensure_future(anext(states)), asyncio.ensure_future(anext(theirs))
        await place.client.invites.revoke(job.id, invite.id)
        with pytest.raises(Unauthorized, match="taken back"):
            await asyncio.wait_for(waiting, 10)
        await place.client.jobs.start(job.id)
        assert (await asyncio.wait_for(patient, 10))[0] is JobState.STARTING


async def test_a_job_must_have_places_to_invite_to(place: Any) -> None:
    job = await place.job(system=1, brought=0, start=False)
    with pytest.raises(SpecError, match="has no places for participants"):
        await place.client.invites.create(job.id)
    other = await place.job(system=1, brought=1, start=False)
    invite = await place.client.invites.create(other.id)
    with pytest.raises(NotFound):
        await place.client.invites.revoke(job.id, invite.id)
    async with Participant(place.server.url, invite.token) as me:
        with pytest.raises(Conflict, match="was not started yet"):
            await me.seat(ONE, "one", None)


async def test_deleting_a_job_deletes_its_invites(place: Any) -> None:
    job = await place.job(system=0, brought=1, start=False)
    invite = await place.client.invites.create(job.id)
    await place.client.jobs.delete(job.id)
    async with Participant(place.server.url, invite.token) as me:
        with pytest.raises(Unauthorized):
            await me.invitation()


@pytest.mark.parametrize(
    ("seat", "realm", "fit"),
    [("us", "us", True), ("us", "us/west", True), ("us", "eu", False), ("us", "usa", False), ("default", "eu", True)],
)
def test_a_place_is_for_data_that_lie_in_its_region(seat: str, realm: str, fit: bool) -> None:
    assert fits(seat, realm) is fit


async def test_the_commands_invite_list_and_take_back(place: Any) -> None:
    job = await place.job(system=0, brought=2, start=False)
    runner = CliRunner()

    def call(*words: str) -> str:
        result = runner.invoke(command, [*words, "--server", place.server.url], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    made = json.loads(
        await asyncio.to_thread(call, "job", "invite", job.id, "--uses", "2", "--expires", "2d", "-o", "json")
    )
    assert made["expiresAt"] - made["createdAt"] == pytest.approx(2 * 86400)
    line = await asyncio.to_thread(call, "job", "invite", "digits")
    assert line.startswith(f"flame join --server {place.server.url} --token flame-invite.")
    table = await asyncio.to_thread(call, "job", "invites", "digits")
    assert made["id"] in table
    assert made["token"].split(".")[-1] not in table
    await asyncio.to_thread(call, "job", "uninvite", "digits", made["id"])
    assert "taken back" in await asyncio.to_thread(call, "job", "invites", "digits")
    wrong = await asyncio.to_thread(runner.invoke, command, ["job", "invite", "digits", "--expires", "soon"])
    assert wrong.exit_code == 2
    assert "no length of time" in wrong.output
