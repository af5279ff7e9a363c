"""What a flamelet calls, for its own task and attempt alone. Every call renews the lease of its worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import msgspec
from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.access import bearer
from flame.apiserver.routes import Access, Call, Ordinal, Query, Route
from flame.controller.supervisor import Supervisor
from flame.errors import SpecError
from flame.spec.records import Event, Manifest, Record, Report

#: The largest piece of a log in one call, in bytes.
MAX_PIECE = 8 << 20


class AttemptQuery(Query, frozen=True, kw_only=True):
    """Which attempt of the task speaks."""

    attempt: Annotated[int, msgspec.Meta(ge=1)]


class OrdersQuery(AttemptQuery, frozen=True, kw_only=True):
    """Events behind the number ``after``."""

    after: Ordinal = 0


class AppendQuery(AttemptQuery, frozen=True, kw_only=True):
    """Where in the log the bytes belong."""

    offset: Annotated[int, msgspec.Meta(ge=0)]


class Acked(Record, kw_only=True):
    """The number of the last report that was taken in."""

    acked: int


class Size(Record, kw_only=True):
    """The size of the log in bytes."""

    size: int


class Kept(Record, kw_only=True):
    """Where an artifact is kept: a path, or a URL in a bucket."""

    path: str


class Offer(Record, kw_only=True, forbid_unknown_fields=True):
    """A checkpoint that lies in the worker's own directory: the file's name there, and its size in bytes."""

    file: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    size: Annotated[int, msgspec.Meta(ge=0)]


class Adopted(Record, kw_only=True):
    """Whether the server has found the file, and kept it; else it must be sent."""

    kept: bool


class Lease(Record, kw_only=True):
    """For how many seconds the worker counts as alive without another word."""

    seconds: float


def _enter(call: Call[Any, AttemptQuery]) -> tuple[Supervisor, str, int]:
    """Check the key of the task, or refuse."""
    task, attempt = call.path("id"), call.query.attempt
    return call.api.controller.door.enter(task, attempt, bearer(call.request)), task, attempt


async def orders(call: Call[None, OrdersQuery]) -> web.StreamResponse:
    """Stream a task's events to its flamelet."""
    supervisor, task, attempt = _enter(call)
    batches = await call.api.controller.door.orders(supervisor, task, attempt, call.query.after)
    return await answers.events(call.request, call.stay, batches)


async def manifest(call: Call[None, AttemptQuery]) -> Manifest:
    """Give a task's manifest."""
    return await call.api.controller.door.manifest(*_enter(call))


async def code(call: Call[None, AttemptQuery]) -> web.Response:
    """Give the job's code."""
    supervisor, _, _ = _enter(call)
    digest = supervisor.job.code
    assert digest is not None
    data = await call.api.controller.catalog.bundle(digest)
    return web.Response(body=data, content_type="application/zip")


async def reports(call: Call[list[Report], AttemptQuery]) -> Acked:
    """Take in what a flamelet reports."""
    supervisor, task, attempt = _enter(call)
    return Acked(acked=await supervisor.hearing.report(task, attempt, call.body))


async def log(call: Call[Any, AppendQuery]) -> Size:
    """Take in a piece of a task's log."""
    supervisor, task, attempt = _enter(call)
    data = bytearray()
    async for piece in call.request.content.iter_any():
        data += piece
        if len(data) > MAX_PIECE:
            raise SpecError(f"a piece of a log may have {MAX_PIECE} bytes at most; send it in parts.")
    logs = call.api.controller.context.logs
    return Size(size=await logs.append(supervisor.id, task, attempt, call.query.offset, bytes(data)))


async def artifact(call: Call[Any, AttemptQuery]) -> Kept:
    """Take in an artifact; the worker lives while it sends."""
    supervisor, task, _ = _enter(call)
    artifacts, name = call.api.controller.context.artifacts, call.path("name")
    artifacts.name(supervisor.id, name)  # one that can be
    await supervisor.hand_in(task, name)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in call.request.content.iter_any():
            _enter(call)  # what an older attempt sends must not take the place of what the next one does
            supervisor.check_artifact(task, name)  # others may have handed theirs in meanwhile
            yield piece

    return Kept(path=await artifacts.put(supervisor.id, name, pieces()))


def _round(call: Call[Any, Any]) -> int:
    text = call.path("round")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SpecError(f"{text[:50]!r} is no number of a round.", "round")
    return int(text)


async def keep(call: Call[Any, AttemptQuery]) -> Adopted:
    """Take in a checkpoint; the worker lives while it sends."""
    supervisor, task, _ = _enter(call)
    controller, number = call.api.controller, _round(call)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in call.request.content.iter_any():
            _enter(call)  # what an older attempt sends must not take the place of what the next one does
            yield piece

    most = supervisor.job.form.policy.checkpoint.keep
    await controller.context.checkpoints.put(supervisor.id, task, number, pieces(), most)
    return Adopted(kept=True)


async def adopt(call: Call[Offer, AttemptQuery]) -> Adopted:
    """Look for a checkpoint in the worker's directory."""
    supervisor, task, attempt = _enter(call)
    most = supervisor.job.form.policy.checkpoint.keep
    kept = await call.api.controller.context.checkpoints.adopt(
        supervisor.id, task, _round(call), most, attempt=attempt, file=call.body.file, size=call.body.size
    )
    return Adopted(kept=kept)


async def checkpoint(call: Call[None, AttemptQuery]) -> web.StreamResponse:
    """Give what an earlier attempt has reached."""
    supervisor, task, _ = _enter(call)
    kept, number = call.api.controller.context.checkpoints, _round(call)
    size = await kept.size(supervisor.id, task, number)
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)})
    with answers.lasting(call.request, call.stay):
        await response.prepare(call.request)
        async for piece in kept.read(supervisor.id, task, number):
            await response.write(piece)
        await response.write_eof()
    return response


async def lease(call: Call[None, AttemptQuery]) -> Lease:
    """Renew the lease, which every call does."""
    _enter(call)
    return Lease(seconds=call.api.controller.context.options.lease)


_ONE = "/v1/tasks/{id}"

ROUTES = [
    Route(
        method="GET",
        path=f"{_ONE}/events",
        handler=orders,
        summary="Follow what the server tells a task's worker: start, stop, peers.",
        access=Access.WORKER,
        query=OrdersQuery,
        answer=Event,
        content="application/x-ndjson",
        stream=True,
    ),
    Route(
        method="GET",
        path=f"{_ONE}/manifest",
        handler=manifest,
        summary="Read what a worker needs to run its task.",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=Manifest,
    ),
    Route(
        method="GET",
        path=f"{_ONE}/code",
        handler=code,
        summary="Download the code of the task's job.",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=bytes,
        content="application/zip",
    ),
    Route(
        method="POST",
        path=f"{_ONE}/reports",
        handler=reports,
        summary="Report on a task; reports that were heard before are passed over.",
        access=Access.WORKER,
        query=AttemptQuery,
        body=list[Report],
        answer=Acked,
        limit=16 << 20,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/log",
        handler=log,
        summary="Append to a task's log; a wrong offset writes nothing and answers the true size.",
        access=Access.WORKER,
        query=AppendQuery,
        body=bytes,
        answer=Size,
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/artifacts/{{name}}",
        handler=artifact,
        summary="Hand in an artifact, such as the model.",
        access=Access.WORKER,
        query=AttemptQuery,
        body=bytes,
        answer=Kept,
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/checkpoints/{{round}}",
        handler=keep,
        summary="Hand in what the worker has reached after a round.",
        access=Access.WORKER,
        query=AttemptQuery,
        body=bytes,
        answer=Adopted,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/checkpoints/{{round}}",
        handler=adopt,
        summary="Say in which file of the worker's directory what it has reached lies, if the server can see it.",
        access=Access.WORKER,
        query=AttemptQuery,
        body=Offer,
        answer=Adopted,
    ),
    Route(
        method="GET",
        path=f"{_ONE}/checkpoints/{{round}}",
        handler=checkpoint,
        summary="Download what an earlier worker of the task has reached.",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=bytes,
        content="application/octet-stream",
        stream=True,
        refusals=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/lease",
        handler=lease,
        summary="Renew the worker's lease.",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=Lease,
    ),
]
