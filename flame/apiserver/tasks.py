"""Tasks, as users see them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.routes import Access, Call, NoQuery, Query, Route
from flame.spec.records import Task


class LogQuery(Query, frozen=True, kw_only=True):
    """Which attempt (the newest), from which byte on; with ``follow`` also what is still to come."""

    attempt: Annotated[int, msgspec.Meta(ge=1)] | None = None
    offset: Annotated[int, msgspec.Meta(ge=0)] = 0
    follow: bool = False


async def get(call: Call[None, NoQuery]) -> Task:
    """Give a task."""
    return await call.api.controller.task(call.path("id"))


async def delete(call: Call[None, NoQuery]) -> None:
    """End a task's worker."""
    await call.api.controller.end_task(call.path("id"))


async def log(call: Call[None, LogQuery]) -> web.StreamResponse:
    """Give a task's log."""
    query = call.query
    attempt, pieces = await call.api.controller.log(call.path("id"), query.attempt, query.offset, follow=query.follow)
    return await answers.text(call.request, call.stay, pieces, {"Flame-Attempt": str(attempt)})


_ONE = "/v1/tasks/{id}"

ROUTES = [
    Route(
        method="GET", path=_ONE, handler=get, summary="Read a task.", access=Access.SHARED, answer=Task, refusals=(404,)
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="End a running task's worker; its job sees it fail.",
        access=Access.WRITE,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/log",
        handler=log,
        summary="Read what a task has printed; the header Flame-Attempt says in which attempt.",
        access=Access.SHARED,
        query=LogQuery,
        answer=bytes,
        content="text/plain",
        stream=True,
        refusals=(404,),
    ),
]
