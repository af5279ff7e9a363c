"""Jobs: submitted, started, followed, stopped."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.paging import Page, PageQuery, page
from flame.apiserver.routes import Call, NoQuery, Query, Route
from flame.spec.nouns import JobForm
from flame.spec.records import Event, Job, JobState, Task


class JobQuery(PageQuery, frozen=True, kw_only=True):
    """Part of the list, or of the jobs in one state."""

    state: JobState | None = None


class EventsQuery(Query, frozen=True, kw_only=True):
    """Events behind the number ``after``; with ``follow`` also those to come, until the job has ended."""

    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    follow: bool = False


async def create(call: Call[JobForm, NoQuery]) -> Job:
    """Create a job."""
    return await call.api.controller.create_job(call.body)


async def find(call: Call[None, JobQuery]) -> Page[Job]:
    """List jobs."""
    return await page(partial(call.api.controller.jobs, call.query.state), call.query, lambda job: job.id)


async def get(call: Call[None, NoQuery]) -> Job:
    """Give a job."""
    return await call.api.controller.job(call.path("id"))


async def update(call: Call[JobForm, NoQuery]) -> Job:
    """Change a job."""
    return await call.api.controller.update_job(call.path("id"), call.body)


async def delete(call: Call[None, NoQuery]) -> None:
    """Remove a job."""
    await call.api.controller.delete_job(call.path("id"))


async def start(call: Call[None, NoQuery]) -> Job:
    """Start a job."""
    return await call.api.controller.start_job(call.path("id"))


async def stop(call: Call[None, NoQuery]) -> Job:
    """Stop a job."""
    return await call.api.controller.stop_job(call.path("id"))


async def pause(call: Call[None, NoQuery]) -> Job:
    """Pause a job."""
    return await call.api.controller.pause_job(call.path("id"))


async def resume(call: Call[None, NoQuery]) -> Job:
    """Resume a job."""
    return await call.api.controller.resume_job(call.path("id"))


async def tasks(call: Call[None, NoQuery]) -> Page[Task]:
    """List a job's tasks."""
    return Page(items=await call.api.controller.tasks(call.path("id")))


async def events(call: Call[None, EventsQuery]) -> web.StreamResponse:
    """Stream a job's events."""
    query = call.query
    batches = await call.api.controller.events(call.path("id"), query.after, follow=query.follow)
    return await answers.events(call.request, batches)


async def artifact(call: Call[None, NoQuery]) -> web.StreamResponse:
    """Give what a task has handed in."""
    await call.api.controller.job(call.path("id"))
    path = call.api.controller.context.artifacts.find(call.path("id"), call.path("name"))
    return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})


_ONE = "/v1/jobs/{id}"

ROUTES = [
    Route(
        method="POST",
        path="/v1/jobs",
        handler=create,
        summary="Create a job. Everything is checked before anything is written.",
        body=JobForm,
        answer=Job,
        status=201,
    ),
    Route(
        method="GET",
        path="/v1/jobs",
        handler=find,
        summary="List jobs, oldest first, without their rounds.",
        query=JobQuery,
        answer=Page[Job],
    ),
    Route(method="GET", path=_ONE, handler=get, summary="Read a job, with its rounds.", answer=Job, refusals=(404,)),
    Route(
        method="PUT",
        path=_ONE,
        handler=update,
        summary="Change a job that was not started.",
        body=JobForm,
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a job that is not under way, with its tasks, logs and artifacts.",
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/start",
        handler=start,
        summary="Start a job: it waits for room, then its workers are started.",
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/stop",
        handler=stop,
        summary="Stop a job: its workers are ended, then it is terminated.",
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/pause",
        handler=pause,
        summary="Pause a job: its workers are ended, and what they have reached is kept.",
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/resume",
        handler=resume,
        summary="Resume a paused job: it waits for room, then new workers go on from the last round that was kept.",
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/tasks",
        handler=tasks,
        summary="List a job's tasks in the order of expansion.",
        answer=Page[Task],
        refusals=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/events",
        handler=events,
        summary="Follow what happens in a job, one event a line.",
        query=EventsQuery,
        answer=Event,
        content="application/x-ndjson",
        stream=True,
        refusals=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/artifacts/{{name}}",
        handler=artifact,
        summary="Download what a task has handed in, such as the model.",
        answer=bytes,
        content="application/octet-stream",
        stream=True,
        refusals=(404,),
    ),
]
