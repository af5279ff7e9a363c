"""How the thing that a path names is found, with the scope to which it belongs.

A new resource needs one line in :data:`SCOPES`. Without it no route with such a path can be served.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from flame.apiserver.permissions import Scope, scope_of
from flame.errors import NotFound
from flame.spec.people import Principal, UserRole

if TYPE_CHECKING:
    from flame.controller.controller import Controller
    from flame.store import Document

#: From the thing's id to its scope; None: there is no such thing. Who asks matters only to what it costs to find out.
Finder = Callable[["Controller", str, Principal], Awaitable["Scope | None"]]


async def _design(controller: Controller, id: str, asking: Principal) -> Scope | None:
    saved = await controller.context.designs.get(id)
    return scope_of(saved.record) if saved else None


async def _dataset(controller: Controller, id: str, asking: Principal) -> Scope | None:
    saved = await controller.context.datasets.get(id)
    return scope_of(saved.record) if saved else None


async def _job(controller: Controller, id: str, asking: Principal) -> Scope | None:
    job = await controller.head(id)
    if job is None:
        return None
    people: frozenset[str] = frozenset()
    if asking.role is UserRole.PARTICIPANT:
        people = frozenset(task.owner for task in await controller.tasks(id)) - {""}
    return Scope(job.project, job.owner, people)


async def _task(controller: Controller, id: str, asking: Principal) -> Scope | None:
    try:
        task = await controller.task(id)
    except NotFound:
        return None
    job = await controller.head(task.job_id)
    return None if job is None else Scope(job.project, job.owner, frozenset({task.owner}) - {""})


async def _app(controller: Controller, id: str, asking: Principal) -> Scope | None:
    return _stored(await controller.context.store.get("apps", id))


async def _session(controller: Controller, id: str, asking: Principal) -> Scope | None:
    return _stored(await controller.context.store.get("sessions", id))


def _stored(document: Document | None) -> Scope | None:
    return None if document is None else Scope(document.body["project"], document.body["owner"])


async def _of_server(controller: Controller, id: str, asking: Principal) -> Scope | None:
    """A thing of the server itself; the route's access says all, or its handler looks closer."""
    return Scope(None, public=True)


#: By resource, the word behind ``/v1/``.
SCOPES: dict[str, Finder] = {
    "bundles": _of_server,  # shown by its handler to whoever sees a design or a job with it
    "designs": _design,
    "datasets": _dataset,
    "computes": _of_server,
    "jobs": _job,
    "tasks": _task,
    "apps": _app,
    "sessions": _session,
    "users": _of_server,
    "tokens": _of_server,  # one's own, as its handler says
    "projects": _of_server,
}
