"""``flame job``: jobs, from their creation to their removal."""

from __future__ import annotations

import asyncio

import click

from flame.cli import invites as invite_commands
from flame.cli import logs as log_copy
from flame.cli import names, output, result
from flame.cli.app import CONTEXT, FAILED, ask, examples, output_option, server_option, set_option
from flame.cli.running import Lost
from flame.cli.task import show_all
from flame.client import Client
from flame.client.running import Reading
from flame.errors import FlameError
from flame.spec.load import load_job
from flame.spec.records import CheckpointRecord, Job, JobState, Task


@click.group(
    context_settings=CONTEXT,
    epilog=examples("flame job create examples/digits --start", "flame job list", "flame job logs -f digits"),
)
def job() -> None:
    """Runs of designs. A JOB is given by its id, the beginning of it, or its name; for `create` and `expand` it is a folder or a file."""


@job.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame job create examples/digits", "flame job create job.yaml --set hyperparameters.rounds=5 --start"
    ),
)
@click.argument("source", metavar="JOB")
@set_option
@click.option("--start", is_flag=True, help="Start it, too.")
@server_option
@output_option
def create(source: str, overrides: tuple[str, ...], start: bool, server: str | None, how: str) -> None:
    """Create a job from JOB, a job folder or a job file. It is checked as a whole, and started with `flame job start`."""
    reading = Reading(source, overrides)

    async def do(client: Client) -> Job:
        bundle = await reading.finish(client)
        for text in bundle.notes:
            output.note(f"note: {text}")
        made = await client.jobs.submit(bundle)
        return await client.jobs.start(made.id) if start else made

    _show([ask(server, do)], how, alone=True)


@job.command(name="list", context_settings=CONTEXT, epilog=examples("flame job list", "flame job list --state running"))
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@server_option
@output_option
def list_(state: str | None, server: str | None, how: str) -> None:
    """List the jobs, the oldest first."""
    _show(ask(server, lambda client: client.jobs.list(JobState(state) if state else None)), how)


@job.command(context_settings=CONTEXT, epilog=examples("flame job get digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def get(given: str, server: str | None, how: str) -> None:
    """Print JOB: its state, why it failed, its rounds, where its model is."""

    async def do(client: Client) -> tuple[Job, str | None]:
        found = await client.jobs.get(await names.job_id(client, given))
        return found, await result.registry_of(client, found) if how == "table" else None

    found, registry = ask(server, do)

    def table() -> None:
        output.facts(
            [
                ("created", output.when(found.created_at)),
                ("started", output.when(found.started_at)),
                ("ended", output.when(found.ended_at)),
                ("design", found.design_id),
                ("backend", found.form.backend),
            ]
        )
        result.report(found, registry)

    output.show(found, how, table)


@job.command(context_settings=CONTEXT, epilog=examples("flame job update digits job.yaml"))
@click.argument("given", metavar="JOB")
@click.argument("source")
@set_option
@server_option
@output_option
def update(given: str, source: str, overrides: tuple[str, ...], server: str | None, how: str) -> None:
    """Change JOB, which was not started yet, to what the job folder or file SOURCE says."""
    reading = Reading(source, overrides)

    async def do(client: Client) -> Job:
        bundle = await reading.finish(client)
        if bundle.archive is not None:
            await client.code.upload(bundle.archive)
        return await client.jobs.update(await names.job_id(client, given), bundle.form)

    _show([ask(server, do)], how, alone=True)


@job.command(context_settings=CONTEXT, epilog=examples("flame job start digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def start(given: str, server: str | None, how: str) -> None:
    """Start JOB."""

    async def do(client: Client) -> Job:
        return await client.jobs.start(await names.job_id(client, given))

    _show([ask(server, do)], how, alone=True)


@job.command(context_settings=CONTEXT, epilog=examples("flame job stop digits", "flame job stop digits --wait"))
@click.argument("given", metavar="JOB")
@click.option("--wait", is_flag=True, help="Return when it has stopped and none of its workers is left.")
@server_option
@output_option
def stop(given: str, wait: bool, server: str | None, how: str) -> None:
    """Stop JOB and end its workers."""

    async def do(client: Client) -> Job:
        stopped = await client.jobs.stop(await names.job_id(client, given))
        return await client.jobs.wait(stopped.id, on_lost=Lost(output.note)) if wait else stopped

    _show([ask(server, do)], how, alone=True)


@job.command(context_settings=CONTEXT, epilog=examples("flame job pause digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def pause(given: str, server: str | None, how: str) -> None:
    """Pause JOB: end its workers, and keep what they have reached. Its room is free for other jobs meanwhile."""

    async def do(client: Client) -> Job:
        return await client.jobs.pause(await names.job_id(client, given))

    _show([ask(server, do)], how, alone=True)


@job.command(context_settings=CONTEXT, epilog=examples("flame job resume digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def resume(given: str, server: str | None, how: str) -> None:
    """Let JOB, which is paused, go on from the last round that was kept."""

    async def do(client: Client) -> Job:
        return await client.jobs.resume(await names.job_id(client, given))

    _show([ask(server, do)], how, alone=True)


@job.command(
    context_settings=CONTEXT, epilog=examples("flame job restart digits --from-round 20", "flame job restart digits")
)
@click.argument("given", metavar="JOB")
@click.option(
    "--from-round", type=click.IntRange(min=0), metavar="N", help="Begin behind this round; else behind the last kept."
)
@server_option
@output_option
def restart(given: str, from_round: int | None, server: str | None, how: str) -> None:
    """Let JOB begin again, behind a round that was kept (`flame job checkpoints`). Of one that has ended another one is made."""

    async def do(client: Client) -> Job:
        return await client.jobs.restart(await names.job_id(client, given), from_round)

    _show([ask(server, do)], how, alone=True)


@job.command(context_settings=CONTEXT, epilog=examples("flame job checkpoints digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def checkpoints(given: str, server: str | None, how: str) -> None:
    """List what is kept of the rounds of JOB."""

    async def do(client: Client) -> list[CheckpointRecord]:
        return await client.jobs.checkpoints(await names.job_id(client, given))

    kept = ask(server, do)
    rows = [[str(one.round), one.role, one.task, str(one.size), output.when(one.time)] for one in kept]
    output.show(kept, how, lambda: output.table(["ROUND", "ROLE", "TASK", "BYTES", "KEPT"], rows))


@job.command(context_settings=CONTEXT, epilog=examples("flame job wait digits --timeout 3600"))
@click.argument("given", metavar="JOB")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up after so long.")
@server_option
@output_option
def wait(given: str, timeout: float | None, server: str | None, how: str) -> int:
    """Wait until JOB has ended. The exit status is 0 only if it completed."""

    async def do(client: Client) -> tuple[Job, str | None]:
        found = await names.job_id(client, given)
        try:
            async with asyncio.timeout(timeout):
                ended = await client.jobs.wait(found, on_lost=Lost(output.note))
        except TimeoutError as error:
            raise FlameError(f"The job {given} has not ended within {timeout:g} s.") from error
        return ended, await result.registry_of(client, ended) if how == "table" else None

    ended, registry = ask(server, do)
    output.show(result.document(ended) if how != "table" else None, how, lambda: result.report(ended, registry))
    return 0 if ended.state is JobState.COMPLETED else FAILED


@job.command(context_settings=CONTEXT, epilog=examples("flame job tasks digits"))
@click.argument("given", metavar="JOB")
@server_option
@output_option
def tasks(given: str, server: str | None, how: str) -> None:
    """List the tasks of JOB."""

    async def do(client: Client) -> list[Task]:
        return await client.jobs.tasks(await names.job_id(client, given))

    show_all(ask(server, do), how)


@job.command(
    context_settings=CONTEXT, epilog=examples("flame job logs digits", "flame job logs -f digits --task trainer/0")
)
@click.argument("given", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the tasks have ended.")
@click.option(
    "--task", "wanted", metavar="TASK", help="Only this task, given by its id or its label such as trainer/0."
)
@click.option("--attempt", type=click.IntRange(min=1), help="Which start of the task; else the newest.")
@server_option
def logs(given: str, follow: bool, wanted: str | None, attempt: int | None, server: str | None) -> None:
    """Print what the tasks of JOB have printed."""

    async def do(client: Client) -> None:
        found = await names.job_id(client, given)
        tasks = [await names.task_of(client, wanted, found)] if wanted else await client.jobs.tasks(found)
        await log_copy.copy(client, tasks, follow=follow, attempt=attempt)

    ask(server, do)


@job.command(context_settings=CONTEXT, epilog=examples("flame job events -f digits"))
@click.argument("given", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Begin behind this event.")
@server_option
@output_option
def events(given: str, follow: bool, after: int, server: str | None, how: str) -> None:
    """Print the events of JOB, a line each; with -o json, as one list at the end."""
    from contextlib import aclosing

    import msgspec

    async def do(client: Client) -> list[object]:
        found = await names.job_id(client, given)
        stream = client.jobs.events(found, after=after, follow=follow, on_lost=Lost(output.note))
        kept: list[object] = []
        async with aclosing(stream) as events:
            async for event in events:
                if how == "table":
                    data = msgspec.json.encode(event.data).decode()
                    click.echo(f"{event.seq:5}  {output.when(event.time)}  {event.type:8} {data}")
                else:
                    kept.append(event)
        return kept

    output.show(ask(server, do), how, lambda: None)


@job.command(context_settings=CONTEXT, epilog=examples("flame job artifact digits model.safetensors --to ."))
@click.argument("given", metavar="JOB")
@click.argument("name")
@click.option("--to", default=".", show_default=True, metavar="PATH", help="A file, or a folder.")
@server_option
def artifact(given: str, name: str, to: str, server: str | None) -> None:
    """Download what a task of JOB has handed in, such as the model."""

    async def do(client: Client) -> str:
        return str(await client.jobs.artifact(await names.job_id(client, given), name, to))

    output.note(f"{name} is in {ask(server, do)}.")


@job.command(context_settings=CONTEXT, epilog=examples("flame job delete digits"))
@click.argument("given", metavar="JOB...", nargs=-1, required=True)
@server_option
def delete(given: tuple[str, ...], server: str | None) -> None:
    """Remove jobs that have ended, with their logs and artifacts."""

    async def do(client: Client) -> None:
        ids = [await names.job_id(client, one, only=True) for one in given]
        await asyncio.gather(*(client.jobs.delete(one) for one in ids))

    ask(server, do)
    output.note(f"Deleted {', '.join(given)}.")


@job.command(
    context_settings=CONTEXT, epilog=examples("flame job expand examples/digits", "flame job expand job.yaml -o json")
)
@click.argument("source", metavar="JOB")
@set_option
@output_option
def expand(source: str, overrides: tuple[str, ...], how: str) -> None:
    """Print the tasks that JOB, a job folder or a job file, gives, and draw its topology. Needs no server."""
    from flame.spec.draw import draw_topology
    from flame.spec.expand import expand as expand_form
    from flame.spec.expand import offline_job_id

    bundle = load_job(source, overrides)
    for text in bundle.notes:
        output.note(f"note: {text}")
    configs = expand_form(bundle.form, None, {}, offline_job_id(bundle.form), places=bundle.places)

    def table() -> None:
        rows = [
            [one.taskid, one.role, ", ".join(f"{c}: {g}" for c, g in one.group_association.items()), one.dataset]
            for one in configs
        ]
        output.table(["TASK", "ROLE", "GROUPS", "DATASET"], rows)
        if bundle.form.schema is not None:
            click.echo()
            click.echo(draw_topology(bundle.form.schema, configs, output.width()))

    output.show(configs, how, table)


def _show(jobs: list[Job], how: str, *, alone: bool = False) -> None:
    def table() -> None:
        rows = [
            [
                one.id,
                one.name,
                one.state.value,
                output.when(one.created_at),
                output.span(one.ended_at - one.started_at) if one.ended_at and one.started_at else None,
            ]
            for one in jobs
        ]
        output.table(["ID", "NAME", "STATE", "CREATED", "TOOK"], rows)

    output.show(jobs[0] if alone else jobs, how, table)


for _command in (invite_commands.invite, invite_commands.invites, invite_commands.uninvite):
    job.add_command(_command)
