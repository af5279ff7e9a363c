"""``flame project``: what keeps teams' things apart."""

from __future__ import annotations

import click

from flame.cli import output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.spec.people import Project


@click.group(
    context_settings=CONTEXT, epilog=examples("flame project create trials", "flame config set project trials")
)
def project() -> None:
    """Projects keep teams' designs, datasets, jobs and computes apart. `flame config set project NAME` chooses one."""


@project.command(context_settings=CONTEXT, epilog=examples("flame project create trials"))
@click.argument("name")
@click.option("--description", default="", help="What it is for.")
@server_option
@output_option
def create(name: str, description: str, server: str | None, how: str) -> None:
    """Make a project."""
    made = ask(server, lambda client: client.projects.create(name, description))
    output.show(made, how, lambda: _table([made]))


@project.command(name="list", context_settings=CONTEXT, epilog=examples("flame project list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List your projects; an admin sees all."""
    found = ask(server, lambda client: client.projects.list())
    output.show(found, how, lambda: _table(found))


@project.command(context_settings=CONTEXT, epilog=examples("flame project delete trials"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@server_option
def delete(names: tuple[str, ...], server: str | None) -> None:
    """Remove projects that have neither users nor things."""

    async def do(client: Client) -> None:
        for name in names:
            await client.projects.delete(name)

    ask(server, do)
    output.note(f"Deleted {', '.join(names)}.")


def _table(projects: list[Project]) -> None:
    output.table(
        ["NAME", "DESCRIPTION", "CREATED"],
        [[one.name, one.description, output.when(one.created_at)] for one in projects],
    )
