"""Elastic sessions: applications, sessions and their tasks, and the connections of clients and executors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.access import bearer
from flame.apiserver.paging import Limit, Page, PageQuery, page
from flame.apiserver.routes import Access, Call, NewQuery, NoQuery, Ordinal, Query, Route
from flame.apiserver.workers import AttemptQuery
from flame.errors import FlameError, UsageError
from flame.sessions.link import Link
from flame.sessions.manager.clients import Client
from flame.sessions.wire import UPGRADE
from flame.spec.records import Event
from flame.spec.sessions import Application, AppRecord, SessionForm, SessionRecord, SessionState, WorkRecord, WorkState

log = logging.getLogger("flame.apiserver")


class SessionsQuery(PageQuery, frozen=True, kw_only=True):
    """Part of the list, or of the sessions in one state."""

    state: SessionState | None = None


class TasksQuery(Query, frozen=True, kw_only=True):
    """Tasks behind the id ``after``, or those of them in one state."""

    after: Ordinal = 0
    limit: Limit = 100
    state: WorkState | None = None


class CloseQuery(Query, frozen=True, kw_only=True):
    """With ``force`` also while tasks run: they are cancelled."""

    force: bool = False


class _Taken(web.StreamResponse):
    """The answer to a request whose connection was taken over: nothing more is written."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Write nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Write nothing."""


async def _take_over(call: Call[Any, Any], link: Link) -> web.StreamResponse:
    """Let a link have a request's connection, until it is over."""
    request = call.request
    if request.headers.get("Upgrade", "").lower() != UPGRADE:
        raise UsageError(f"This is for clients of sessions: the request must say 'Upgrade: {UPGRADE}'.")
    transport, before = request.transport, request.protocol
    if transport is None:
        raise ConnectionResetError("the caller has gone")
    over = asyncio.Event()
    tell = link.on_lost

    def lost() -> None:
        tell()
        over.set()
        before.connection_lost(None)

    link.on_lost = lost
    head = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"
    transport.write(head.encode())
    transport.set_protocol(link)
    link.connection_made(transport)
    try:
        with call.stay:
            await over.wait()
    except FlameError as error:  # whoever it is comes back, and hears why
        log.info("a session's connection is ended: %s", error)
    finally:
        if not link.lost:
            transport.abort()
    taken = _Taken(status=101)
    taken.force_close()
    return taken


async def connect_client(call: Call[None, NewQuery]) -> web.StreamResponse:
    """Be a client's connection."""
    client = Client(call.api.sessions, sees=call.sees, project=call.project, owner=call.principal.name)
    return await _take_over(call, client.link)


async def connect_executor(call: Call[None, AttemptQuery]) -> web.StreamResponse:
    """Be an executor's connection."""
    executor = call.api.sessions.door.connected(call.path("id"), call.query.attempt, bearer(call.request))
    return await _take_over(call, call.api.sessions.door.attach(executor))


async def create_app(call: Call[Application, NewQuery]) -> AppRecord:
    """Register an application."""
    return await call.api.sessions.apps.create(call.body, project=call.project, owner=call.principal.name)


async def find_apps(call: Call[None, PageQuery]) -> Page[AppRecord]:
    """List applications."""
    return await page(call.api.sessions.apps.list, call.query, lambda app: app.id, call.sees)


async def get_app(call: Call[None, NoQuery]) -> AppRecord:
    """Give an application."""
    return await call.api.sessions.apps.get(call.path("id"))


async def update_app(call: Call[Application, NoQuery]) -> AppRecord:
    """Change an application."""
    return await call.api.sessions.apps.update(call.path("id"), call.body)


async def delete_app(call: Call[None, NoQuery]) -> None:
    """Remove an application."""
    await call.api.sessions.register.delete_app(call.path("id"))


async def create(call: Call[SessionForm, NewQuery]) -> SessionRecord:
    """Open a session."""
    live = await call.api.sessions.register.open(
        call.body, project=call.project, owner=call.principal.name, sees=call.sees
    )
    return live.view()


async def find(call: Call[None, SessionsQuery]) -> Page[SessionRecord]:
    """List sessions."""
    read = partial(call.api.sessions.register.find, call.query.state)
    return await page(read, call.query, lambda session: session.id, call.sees)


async def get(call: Call[None, NoQuery]) -> SessionRecord:
    """Give a session."""
    return await call.api.sessions.register.get(call.path("id"))


async def tasks(call: Call[None, TasksQuery]) -> Page[WorkRecord]:
    """List a session's tasks."""
    query = call.query
    found = await call.api.sessions.tasks.find(call.path("id"), query.after, query.limit + 1, query.state)
    more = len(found) > query.limit
    return Page(items=found[: query.limit], next=str(found[query.limit - 1].id) if more else None)


async def put_object(call: Call[Any, NoQuery]) -> None:
    """Take in an object."""
    await call.api.sessions.register.bring(call.path("id"), call.path("digest"), call.request.content.iter_any())


async def get_object(call: Call[None, NoQuery]) -> web.StreamResponse:
    """Give an object."""
    return await _object(call, call.path("id"))


async def put_object_of_executor(call: Call[Any, AttemptQuery]) -> None:
    """Take in an object that a task has made."""
    session = call.api.sessions.door.session_of(call.path("id"), call.query.attempt, bearer(call.request))
    await call.api.sessions.register.bring(session, call.path("digest"), call.request.content.iter_any())


async def get_object_of_executor(call: Call[None, AttemptQuery]) -> web.StreamResponse:
    """Give an object to an executor that serves its session."""
    return await _object(
        call, call.api.sessions.door.session_of(call.path("id"), call.query.attempt, bearer(call.request))
    )


async def _object(call: Call[None, Any], session: str) -> web.StreamResponse:
    objects = call.api.sessions.objects
    return await answers.artifact(call.request, objects.place, await objects.find(session, call.path("digest")))


async def close(call: Call[None, CloseQuery]) -> SessionRecord:
    """Close a session."""
    return await call.api.sessions.register.close(call.path("id"), force=call.query.force)


async def delete(call: Call[None, NoQuery]) -> None:
    """Remove a closed session."""
    await call.api.sessions.register.delete(call.path("id"))


async def watch(call: Call[None, NoQuery]) -> web.StreamResponse:
    """Stream a session's counts."""
    record = await call.api.sessions.register.get(call.path("id"))
    return await answers.events(call.request, call.stay, _counts(call, record))


async def _counts(call: Call[Any, Any], record: SessionRecord) -> AsyncGenerator[Sequence[Event], None]:
    number = 1
    live = call.api.sessions.register.live(record.id)
    changed = asyncio.Event()
    unwatch = live.watch(changed.set) if live is not None else None
    try:
        while True:
            changed.clear()
            record = await call.api.sessions.register.get(record.id)
            data = {"state": record.state.value, **msgspec.to_builtins(record.counts)}
            yield [Event(seq=number, time=time.time(), type="counts", data=data)]
            if record.state is SessionState.CLOSED:
                return
            number += 1
            await changed.wait()
    finally:
        if unwatch is not None:
            unwatch()


_APP = "/v1/apps/{id}"
_ONE = "/v1/sessions/{id}"
_EXECUTOR = "/v1/executors/{id}"

ROUTES = [
    Route(
        method="GET",
        path="/v1/session-link",
        handler=connect_client,
        summary="Take the connection over for sessions: frames of many tasks in both directions (Upgrade: flame).",
        access=Access.WRITE,
        query=NewQuery,
        answer=bytes,
        content="application/octet-stream",
        status=101,
        stream=True,
        refusals=(422,),
    ),
    Route(
        method="GET",
        path="/v1/executors/{id}/link",
        handler=connect_executor,
        summary="Take the connection over for an executor (Upgrade: flame).",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=bytes,
        content="application/octet-stream",
        status=101,
        stream=True,
        refusals=(401, 403),
    ),
    Route(
        method="POST",
        path="/v1/apps",
        handler=create_app,
        summary="Register an application: the code that serves the tasks of sessions.",
        access=Access.WRITE,
        query=NewQuery,
        body=Application,
        answer=AppRecord,
        status=201,
        refusals=(409, 422),
    ),
    Route(
        method="GET",
        path="/v1/apps",
        handler=find_apps,
        summary="List applications.",
        access=Access.READ,
        query=PageQuery,
        answer=Page[AppRecord],
    ),
    Route(
        method="GET",
        path=_APP,
        handler=get_app,
        summary="Read an application.",
        access=Access.READ,
        answer=AppRecord,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=_APP,
        handler=update_app,
        summary="Change an application; sessions that are open go on with what it was.",
        access=Access.WRITE,
        body=Application,
        answer=AppRecord,
        refusals=(404, 409, 422),
    ),
    Route(
        method="DELETE",
        path=_APP,
        handler=delete_app,
        summary="Remove an application; sessions that are open go on.",
        access=Access.WRITE,
        status=204,
        refusals=(404,),
    ),
    Route(
        method="POST",
        path="/v1/sessions",
        handler=create,
        summary="Open a session, or give the one that is open under this id if it is the same.",
        access=Access.WRITE,
        query=NewQuery,
        body=SessionForm,
        answer=SessionRecord,
        status=201,
        refusals=(404, 409, 422),
    ),
    Route(
        method="GET",
        path="/v1/sessions",
        handler=find,
        summary="List sessions, oldest first.",
        access=Access.READ,
        query=SessionsQuery,
        answer=Page[SessionRecord],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get,
        summary="Read a session, with its counts and executors.",
        access=Access.READ,
        answer=SessionRecord,
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a closed session, with what is known of its tasks.",
        access=Access.WRITE,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/tasks",
        handler=tasks,
        summary="List a session's tasks in the order of their ids.",
        access=Access.READ,
        query=TasksQuery,
        answer=Page[WorkRecord],
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/objects/{{digest}}",
        handler=put_object,
        summary="Bring an object, which is kept once for all tasks of a session; its digest is the SHA-256 of its bytes.",
        access=Access.WRITE,
        body=bytes,
        status=204,
        refusals=(404, 409, 422),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/objects/{{digest}}",
        handler=get_object,
        summary="Read an object of a session.",
        access=Access.READ,
        answer=bytes,
        content="application/octet-stream",
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=f"{_EXECUTOR}/objects/{{digest}}",
        handler=put_object_of_executor,
        summary="Bring an object that a task has made, for the session that the executor serves.",
        access=Access.WORKER,
        query=AttemptQuery,
        body=bytes,
        status=204,
        refusals=(401, 403, 404, 409, 422),
    ),
    Route(
        method="GET",
        path=f"{_EXECUTOR}/objects/{{digest}}",
        handler=get_object_of_executor,
        summary="Read an object of the session that the executor serves.",
        access=Access.WORKER,
        query=AttemptQuery,
        answer=bytes,
        content="application/octet-stream",
        refusals=(401, 403, 404),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/close",
        handler=close,
        summary="Close a session: what waits is cancelled. Refused while tasks run, unless forced.",
        access=Access.WRITE,
        query=CloseQuery,
        answer=SessionRecord,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/events",
        handler=watch,
        summary="Follow a session's counts, until it is closed.",
        access=Access.READ,
        answer=Event,
        content="application/x-ndjson",
        stream=True,
        refusals=(404,),
    ),
]
