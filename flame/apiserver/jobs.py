"""Jobs: submitted, started, followed, stopped."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from flame.apiserver import answers
from flame.apiserver.paging import Page, PageQuery, page
from flame.apiserver.routes import Access, Call, NewQuery, NoQuery, Ordinal, Query, Route
from flame.spec.nouns import JobForm
from flame.spec.people import UserRole
from flame.spec.records import CheckpointRecord, Event, Job, JobState, Task


class JobQuery(PageQuery, frozen=True, kw_only=True):
    """Part of the list, or of the jobs in one state."""

    state: JobState | None = None


class RestartQuery(Query, frozen=True, kw_only=True):
    """Behind which round to begin; without ``fromRound``, behind the last that was kept."""

    from_round: Ordinal | None = None


class EventsQuery(Query, frozen=True, kw_only=True):
    """Events behind the number ``after``; with ``follow`` also those to come, until the job has ended."""

    after: Ordinal = 0
    follow: bool = False


async def create(call: Call[JobForm, NewQuery]) -> Job:
    """Create a job."""
    return await call.api.controller.create_job(call.body, project=call.project, owner=call.principal.name)


async def find(call: Call[None, JobQuery]) -> Page[Job]:
    """List jobs."""
    return await page(partial(call.api.controller.jobs, call.query.state), call.query, lambda job: job.id, call.sees)


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


async def restart(call: Call[None, RestartQuery]) -> Job:
    """Restart a job."""
    return await call.api.controller.restart_job(call.path("id"), call.query.from_round)


async def checkpoints(call: Call[None, NoQuery]) -> Page[CheckpointRecord]:
    """List what is kept of a job's rounds."""
    controller, job = call.api.controller, call.path("id")
    roles = {task.id: task.role for task in await controller.tasks(job)}
    kept = await controller.context.checkpoints.find(job)
    return Page(
        items=[
            CheckpointRecord(task=one.task, role=roles.get(one.task, ""), round=one.round, size=one.size, time=one.time)
            for one in kept
        ]
    )


async def tasks(call: Call[None, NoQuery]) -> Page[Task]:
    """List a job's tasks; a participant sees those that use their data."""
    found = await call.api.controller.tasks(call.path("id"))
    who = call.principal
    return Page(
        items=found if who.role is not UserRole.PARTICIPANT else [one for one in found if one.owner == who.name]
    )


async def events(call: Call[None, EventsQuery]) -> web.StreamResponse:
    """Stream a job's events."""
    query = call.query
    batches = await call.api.controller.events(call.path("id"), query.after, follow=query.follow)
    return await answers.events(call.request, call.stay, batches)


async def artifact(call: Call[None, NoQuery]) -> web.StreamResponse:
    """Give what a task has handed in."""
    await call.api.controller.job(call.path("id"))
    artifacts = call.api.controller.context.artifacts
    found = await artifacts.find(call.path("id"), call.path("name"))
    return await answers.artifact(call.request, artifacts.place, found)


_ONE = "/v1/jobs/{id}"

ROUTES = [
    Route(
        method="POST",
        path="/v1/jobs",
        handler=create,
        summary="Create a job. Everything is checked before anything is written.",
        access=Access.WRITE,
        query=NewQuery,
        body=JobForm,
        answer=Job,
        status=201,
        limit=16 << 20,
    ),
    Route(
        method="GET",
        path="/v1/jobs",
        handler=find,
        summary="List jobs, oldest first, without their rounds.",
        access=Access.READ,
        query=JobQuery,
        answer=Page[Job],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get,
        summary="Read a job, with its rounds.",
        access=Access.READ,
        answer=Job,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=update,
        summary="Change a job that was not started.",
        access=Access.WRITE,
        body=JobForm,
        answer=Job,
        limit=16 << 20,
        refusals=(404, 409),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a job that is not under way, with its tasks, logs and artifacts.",
        access=Access.WRITE,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/start",
        handler=start,
        summary="Start a job: it waits for room, then its workers are started.",
        access=Access.WRITE,
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/stop",
        handler=stop,
        summary="Stop a job: its workers are ended, then it is terminated.",
        access=Access.WRITE,
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/pause",
        handler=pause,
        summary="Pause a job: its workers are ended, and what they have reached is kept.",
        access=Access.WRITE,
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/resume",
        handler=resume,
        summary="Resume a paused job: it waits for room, then new workers go on from the last round that was kept.",
        access=Access.WRITE,
        answer=Job,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/restart",
        handler=restart,
        summary="Restart a job behind a round that was kept; of one that has ended a new one is made, which is answered.",
        access=Access.WRITE,
        query=RestartQuery,
        answer=Job,
        stream=True,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/checkpoints",
        handler=checkpoints,
        summary="List what is kept of a job's rounds, the oldest first.",
        access=Access.READ,
        answer=Page[CheckpointRecord],
        refusals=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/tasks",
        handler=tasks,
        summary="List a job's tasks in the order of expansion.",
        access=Access.SHARED,
        answer=Page[Task],
        refusals=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/events",
        handler=events,
        summary="Follow what happens in a job, one event a line.",
        access=Access.READ,
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
        access=Access.READ,
        answer=bytes,
        content="application/octet-stream",
        stream=True,
        refusals=(404, 422),
    ),
]
