"""Which thing is meant: an id, a beginning of one that fits only once, or a name that is there only once."""

from __future__ import annotations

from collections.abc import Iterable

from flame.cli.output import note
from flame.client import Client
from flame.errors import NotFound, UsageError
from flame.spec.records import Task

_MOST_SHOWN = 5


def pick(noun: str, given: str, known: Iterable[tuple[str, str]]) -> str:
    """The id that is meant.

    :param noun: what is looked for, such as ``job``.
    :param given: what the user wrote.
    :param known: ids and names.
    :raises flame.errors.NotFound: nothing fits.
    :raises flame.errors.UsageError: several do; the text names them.
    """
    known = list(known)
    if given in dict(known):
        return given
    fitting = [one for one in known if one[1] == given] or [one for one in known if one[0].startswith(given)]
    if not fitting:
        raise NotFound(f"There is no {noun} {given!r}; `flame {noun} list` shows those that there are.")
    if len(fitting) > 1:
        shown = ", ".join(f"{one} ({name})" for one, name in fitting[-_MOST_SHOWN:])
        more = f" and {len(fitting) - _MOST_SHOWN} more" if len(fitting) > _MOST_SHOWN else ""
        raise UsageError(f"{given!r} fits {len(fitting)} {noun}s: {shown}{more}. Write more of the id.")
    return fitting[0][0]


async def job_id(client: Client, given: str, *, only: bool = False) -> str:
    """The id of the job that is meant. A name that several jobs have means the newest one, and that is said.

    :param only: refuse such a name.
    """
    if _whole(given, 24):
        return given
    jobs = [(job.id, job.name) for job in await client.jobs.list()]
    alike = sorted(one for one, name in jobs if name == given)
    if only or len(alike) < 2:
        return pick("job", given, jobs)
    note(f"note: {len(alike)} jobs are called {given!r}; this is about the newest one, {alike[-1]}.")
    return alike[-1]


async def design_id(client: Client, given: str) -> str:
    """The id of the design that is meant."""
    return pick("design", given, [(design.id, design.name) for design in await client.designs.list()])


async def dataset_id(client: Client, given: str) -> str:
    """The id of the dataset that is meant."""
    return pick("dataset", given, [(one.id, one.dataset.name) for one in await client.datasets.list()])


async def compute_id(client: Client, given: str) -> str:
    """The name of the compute that is meant."""
    return pick("compute", given, [(one.id, one.name) for one in await client.computes.list()])


async def task_of(client: Client, given: str, job: str | None = None) -> Task:
    """The task that is meant, by the beginning of its id or by its label such as ``trainer/2``.

    :param job: the id of its job; None looks through all jobs, the newest first.
    """
    if job is None and _whole(given, 40):
        return await client.tasks.get(given)
    jobs = [job] if job is not None else [one.id for one in reversed(await client.jobs.list())]
    for one in jobs:
        tasks = {task.id: task for task in await client.jobs.tasks(one)}
        try:
            return tasks[pick("task", given, [(task.id, label(task)) for task in tasks.values()])]
        except NotFound:
            continue
    where = f"The job {job} has no task {given!r}" if job else f"No job has a task {given!r}"
    raise NotFound(f"{where}; `flame task list JOB` shows a job's tasks.")


def label(task: Task) -> str:
    """What people call a task within its job."""
    return f"{task.role}/{task.index}"


def _whole(given: str, length: int) -> bool:
    return len(given) == length and all(letter in "0123456789abcdef" for letter in given)


async def app_id(client: Client, given: str) -> str:
    """The id of the application that is meant."""
    return pick("app", given, [(one.id, one.name) for one in await client.apps.list()])


async def session_id(client: Client, given: str) -> str:
    """The id of the session that is meant."""
    return pick("session", given, [(one.id, one.application.name) for one in await client.sessions.list()])
