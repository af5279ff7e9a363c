"""``flame task``: the tasks of jobs."""

from __future__ import annotations

import click

from flame.cli import logs, names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.cli.result import failure
from flame.client import Client
from flame.spec.records import Task

_JOB = "Its job; needed where the task is not given by its whole id and many jobs are there."


@click.group(
    context_settings=CONTEXT, epilog=examples("flame task list digits", "flame task logs trainer/0 --job digits")
)
def task() -> None:
    """The tasks of a job: each is one role with one configuration, executed by a worker."""


@task.command(name="list", context_settings=CONTEXT, epilog=examples("flame task list digits"))
@click.argument("job")
@server_option
@output_option
def list_(job: str, server: str | None, how: str) -> None:
    """List the tasks of JOB."""

    async def do(client: Client) -> list[Task]:
        return await client.jobs.tasks(await names.job_id(client, job))

    show_all(ask(server, do), how)


@task.command(context_settings=CONTEXT, epilog=examples("flame task get trainer/0 --job digits"))
@click.argument("given", metavar="TASK")
@click.option("--job", help=_JOB)
@server_option
@output_option
def get(given: str, job: str | None, server: str | None, how: str) -> None:
    """Print TASK, given by its id, the beginning of it, or its label such as trainer/0."""
    found = ask(server, lambda client: _find(client, given, job))
    facts: list[tuple[str, object]] = [
        ("id", found.id),
        ("job", found.job_id),
        ("role", names.label(found)),
        ("state", found.state.value),
        ("reason", found.reason),
        ("attempt", found.attempt),
        ("compute", found.compute),
        ("worker", found.worker),
        ("dataset", found.config.dataset),
        ("started", output.when(found.started_at)),
        ("ended", output.when(found.ended_at)),
        *failure(found.failure),
    ]
    output.show(found, how, lambda: output.facts(facts))


@task.command(name="logs", context_settings=CONTEXT, epilog=examples("flame task logs -f trainer/0 --job digits"))
@click.argument("given", metavar="TASK")
@click.option("--job", help=_JOB)
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended.")
@click.option("--attempt", type=click.IntRange(min=1), help="Which start of it; else the newest.")
@server_option
def logs_(given: str, job: str | None, follow: bool, attempt: int | None, server: str | None) -> None:
    """Print what TASK has printed."""

    async def do(client: Client) -> None:
        found = await _find(client, given, job)
        await logs.copy(client, [found], follow=follow, attempt=attempt)

    ask(server, do)


@task.command(context_settings=CONTEXT, epilog=examples("flame task delete trainer/0 --job digits"))
@click.argument("given", metavar="TASK")
@click.option("--job", help=_JOB)
@server_option
def delete(given: str, job: str | None, server: str | None) -> None:
    """End the worker of TASK; its job then sees it fail."""

    async def do(client: Client) -> Task:
        found = await _find(client, given, job)
        await client.tasks.delete(found.id)
        return found

    output.note(f"The worker of {names.label(ask(server, do))} is ended.")


def show_all(tasks: list[Task], how: str) -> None:
    """Print tasks."""

    def table() -> None:
        rows = [
            [
                one.id,
                names.label(one),
                one.state.value,
                one.attempt,
                one.compute,
                one.failure.message if one.failure else one.reason,
            ]
            for one in tasks
        ]
        output.table(["ID", "ROLE", "STATE", "ATTEMPT", "COMPUTE", "REASON"], rows)

    output.show(tasks, how, table)


async def _find(client: Client, given: str, job: str | None) -> Task:
    return await names.task_of(client, given, await names.job_id(client, job) if job else None)
