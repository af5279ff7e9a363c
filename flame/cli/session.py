"""``flame session``: elastic sessions, seen from outside."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import click
import msgspec

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.cli.counts import CountsView
from flame.client import Client
from flame.spec.sessions import SessionRecord, SessionState, WorkRecord, WorkState


@click.group(context_settings=CONTEXT, epilog=examples("flame session list", "flame session watch 0192f3"))
def session() -> None:
    """Elastic sessions: streams of short tasks on warm executors."""


@session.command(
    name="list", context_settings=CONTEXT, epilog=examples("flame session list", "flame session list --state open")
)
@click.option("--state", type=click.Choice([state.value for state in SessionState]), help="Only those in this state.")
@server_option
@output_option
def list_(state: str | None, server: str | None, how: str) -> None:
    """List the sessions, oldest first."""
    records = ask(server, lambda client: client.sessions.list(SessionState(state) if state else None))
    output.show(
        records,
        how,
        lambda: output.table(
            ["ID", "APP", "STATE", "EXECUTORS", "TOTAL", "SUCCEED", "FAILED", "PENDING", "RUNNING", "CREATED"],
            [
                [
                    one.id,
                    one.application.name or one.application.entry,
                    one.state.value,
                    len(one.executors),
                    one.counts.total,
                    one.counts.succeed,
                    one.counts.failed,
                    one.counts.pending,
                    one.counts.running,
                    output.when(one.created_at),
                ]
                for one in records
            ],
            right=range(3, 9),
        ),
    )


@session.command(context_settings=CONTEXT, epilog=examples("flame session get 0192f3"))
@click.argument("session", metavar="SESSION")
@server_option
@output_option
def get(session: str, server: str | None, how: str) -> None:
    """Print SESSION, given by its id or the beginning of it: its counts, its executors, and why it gets none."""

    async def do(client: Client) -> SessionRecord:
        return await client.sessions.get(await names.session_id(client, session))

    record = ask(server, do)
    output.show(record, how, lambda: _show(record))


def _show(record: SessionRecord) -> None:
    form, counts = record.form, record.counts
    output.facts(
        [
            ("id", record.id),
            ("application", record.application.name or record.application.entry),
            ("state", record.state.value),
            ("reason", record.reason),
            ("tasks", ", ".join(f"{value} {name}" for name, value in msgspec.to_builtins(counts).items())),
            ("priority", form.priority or None),
            ("weight", f"{form.weight:g}"),
            ("instances", f"{form.min_instances} to {form.max_instances or 'as many as there is room for'}"),
            ("batch size", form.batch_size if form.batch_size > 1 else None),
            ("project", record.project),
            ("owner", record.owner),
            ("created", output.when(record.created_at)),
            ("closed", output.when(record.closed_at)),
        ]
    )
    if record.executors:
        click.echo()
        output.table(
            ["EXECUTOR", "COMPUTE", "STATE", "SINCE"],
            [[one.id, one.compute, one.state.value, output.when(one.created_at)] for one in record.executors],
        )


@session.command(context_settings=CONTEXT, epilog=examples("flame session watch 0192f3"))
@click.argument("session", metavar="SESSION")
@server_option
def watch(session: str, server: str | None) -> None:
    """Show the tasks of SESSION by state, as they change, until it is closed."""

    async def do(client: Client) -> None:
        one = await names.session_id(client, session)
        with CountsView() as view:
            async with aclosing(client.sessions.watch(one, on_lost=lambda error: output.note(str(error)))) as news:
                async for _, counts in news:
                    view.show(counts)

    ask(server, do)


@session.command(
    context_settings=CONTEXT, epilog=examples("flame session close 0192f3", "flame session close --force 0192f3")
)
@click.argument("sessions", metavar="SESSION...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also while tasks run; they are cancelled.")
@server_option
@output_option
def close(sessions: tuple[str, ...], force: bool, server: str | None, how: str) -> None:
    """Close sessions: tasks that wait are cancelled. Refused while tasks run, unless forced."""

    async def do(client: Client) -> list[SessionRecord]:
        ids = [await names.session_id(client, given) for given in sessions]
        return list(await asyncio.gather(*(client.sessions.close(one, force=force) for one in ids)))

    records = ask(server, do)
    output.show(records, how, lambda: output.note(f"Closed {', '.join(one.id for one in records)}."))


@session.command(
    context_settings=CONTEXT,
    epilog=examples("flame session tasks 0192f3", "flame session tasks 0192f3 --state failed --after 1000"),
)
@click.argument("session", metavar="SESSION")
@click.option("--state", type=click.Choice([state.value for state in WorkState]), help="Only those in this state.")
@click.option("--after", type=click.IntRange(min=0), default=0, help="Begin behind this id.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="How many at most.")
@server_option
@output_option
def tasks(session: str, *, state: str | None, after: int, limit: int, server: str | None, how: str) -> None:
    """List tasks of SESSION in the order of their ids, with what made them fail."""

    async def do(client: Client) -> tuple[list[WorkRecord], bool]:
        one = await names.session_id(client, session)
        return await client.sessions.tasks(one, after=after, limit=limit, state=WorkState(state) if state else None)

    records, more = ask(server, do)

    def show() -> None:
        output.table(
            ["ID", "STATE", "ATTEMPT", "FAILURE"],
            [
                [
                    one.id,
                    one.state.value,
                    one.attempt,
                    f"{one.failure.type}: {one.failure.message}" if one.failure else None,
                ]
                for one in records
            ],
            right=[0, 2],
        )
        if more:
            output.note(f"There are more: --after {records[-1].id}.")

    output.show(records, how, show)
