"""Participants: invites, which users make, and what those who come with one may call."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.paging import Page
from flame.apiserver.permissions import Access
from flame.apiserver.routes import Call, NoQuery, Ordinal, Query, Route
from flame.controller.context import StoredInvite
from flame.controller.shelf import Saved
from flame.spec.nouns import Form, Name
from flame.spec.records import Event, Invitation, Invite, Seat

Realm = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class InviteForm(Form, frozen=True, kw_only=True):
    """How many may come with an invite, for how many seconds, and where their data must lie."""

    uses: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 7 * 86400.0
    realm: Realm | None = None


class SeatForm(Form, frozen=True, kw_only=True):
    """Who wants a place: a secret of its own, by which it is known again, what it is called, and where its data lie."""

    secret: Annotated[str, msgspec.Meta(min_length=32, max_length=200)]
    name: Name
    realm: Realm | None = None


class StatesQuery(Query, frozen=True, kw_only=True):
    """Events behind the number ``after``."""

    after: Ordinal = 0


async def invite(call: Call[InviteForm, NoQuery]) -> Invite:
    """Make an invite."""
    form = call.body
    participants = call.api.controller.participants
    return await participants.invite(call.path("id"), uses=form.uses, seconds=form.seconds, realm=form.realm)


async def invites(call: Call[None, NoQuery]) -> Page[Invite]:
    """List a job's invites."""
    return Page(items=await call.api.controller.participants.invites(call.path("id")))


async def revoke(call: Call[None, NoQuery]) -> None:
    """Take an invite back."""
    await call.api.controller.participants.revoke(call.path("id"), call.path("invite"))


async def invitation(call: Call[None, NoQuery]) -> Invitation:
    """Say what the job is."""
    return await call.api.controller.participants.invitation(_invite(call).record)


async def code(call: Call[None, NoQuery]) -> web.Response:
    """Give the job's code."""
    data = await call.api.controller.participants.code(_invite(call).record)
    return web.Response(body=data, content_type="application/zip")


async def states(call: Call[None, StatesQuery]) -> web.StreamResponse:
    """Stream the job's states."""
    batches = await call.api.controller.participants.states(_invite(call).record, call.query.after)
    return await answers.events(call.request, call.stay, batches)


async def seat(call: Call[SeatForm, NoQuery]) -> Seat:
    """Give a place."""
    form = call.body
    return await call.api.controller.participants.seat(_invite(call), form.secret, form.name, form.realm)


def _invite(call: Call[Any, Any]) -> Saved[StoredInvite]:
    """What the caller came with: it was opened before anything else was read."""
    assert call.invite is not None
    return call.invite


ROUTES = [
    Route(
        method="POST",
        path="/v1/jobs/{id}/invites",
        handler=invite,
        access=Access.WRITE,
        summary="Make an invite for participants; its token is in this answer and nowhere else.",
        body=InviteForm,
        answer=Invite,
        status=201,
        refusals=(404, 409, 422),
    ),
    Route(
        method="GET",
        path="/v1/jobs/{id}/invites",
        handler=invites,
        access=Access.READ,
        summary="List a job's invites, without their tokens.",
        answer=Page[Invite],
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/jobs/{id}/invites/{invite}",
        handler=revoke,
        access=Access.WRITE,
        summary="Take an invite back: nobody comes with it any more, and who came with it goes.",
        status=204,
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/v1/join",
        handler=invitation,
        summary="Read what the job is that an invite is for.",
        access=Access.INVITED,
        answer=Invitation,
    ),
    Route(
        method="GET",
        path="/v1/join/code",
        handler=code,
        summary="Download the code of the job that an invite is for, to read it before anything runs.",
        access=Access.INVITED,
        answer=bytes,
        content="application/zip",
    ),
    Route(
        method="GET",
        path="/v1/join/events",
        handler=states,
        summary="Follow the job's states and what it waits for.",
        access=Access.INVITED,
        query=StatesQuery,
        answer=Event,
        content="application/x-ndjson",
        stream=True,
    ),
    Route(
        method="POST",
        path="/v1/join",
        handler=seat,
        summary="Take a place in the job, or come back to one's own; gives the key of a new attempt of its task.",
        access=Access.INVITED,
        body=SeatForm,
        answer=Seat,
        refusals=(409,),
    ),
]
