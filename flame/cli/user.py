"""``flame user``: who may use a server."""

from __future__ import annotations

import click

from flame.cli import output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.spec.people import User, UserForm, UserRole

_ROLES = click.Choice([role.value for role in UserRole])


@click.group(
    context_settings=CONTEXT,
    epilog=examples(
        "flame user create ada --role admin", "flame user create site-3 --role participant", "flame user list"
    ),
)
def user() -> None:
    """Who may use a server. Once there are users, nobody gets in without a token; the first one must be an admin."""


@user.command(context_settings=CONTEXT, epilog=examples("flame user create ben --role user --project trials"))
@click.argument("name")
@click.option("--role", type=_ROLES, default="user", show_default=True, help="What they may do.")
@click.option("--project", "projects", metavar="NAME", multiple=True, help="Where; can be given several times.")
@server_option
@output_option
def create(name: str, role: str, projects: tuple[str, ...], server: str | None, how: str) -> None:
    """Make a user, and print their first token. It is shown this once: the server keeps only its SHA-256."""
    form = UserForm(name=name, role=UserRole(role), projects=list(projects) or ["default"])
    made = ask(server, lambda client: client.users.create(form))
    output.show(made, how, lambda: _table([made.user]))
    if how == "table":
        output.note("Their token, which is not shown again; `flame login` keeps it:")
        click.echo(made.token.token)


@user.command(name="list", context_settings=CONTEXT, epilog=examples("flame user list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List the users."""
    found = ask(server, lambda client: client.users.list())
    output.show(found, how, lambda: _table(found))


@user.command(context_settings=CONTEXT, epilog=examples("flame user get ben"))
@click.argument("name")
@server_option
@output_option
def get(name: str, server: str | None, how: str) -> None:
    """Print a user."""
    found = ask(server, lambda client: client.users.get(name))
    output.show(found, how, lambda: _table([found]))


@user.command(context_settings=CONTEXT, epilog=examples("flame user update ben --role viewer", "flame user whoami"))
@click.argument("name")
@click.option("--role", type=_ROLES, help="What they may do from now on.")
@click.option("--project", "projects", metavar="NAME", multiple=True, help="Where: all of their projects.")
@server_option
@output_option
def update(name: str, role: str | None, projects: tuple[str, ...], server: str | None, how: str) -> None:
    """Give a user another role or other projects. It holds from their next request on."""
    changed = ask(
        server,
        lambda client: client.users.update(
            name, role=UserRole(role) if role else None, projects=list(projects) if projects else None
        ),
    )
    output.show(changed, how, lambda: _table([changed]))


@user.command(context_settings=CONTEXT, epilog=examples("flame user delete ben"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@server_option
def delete(names: tuple[str, ...], server: str | None) -> None:
    """Remove users with all their tokens. What they own stays."""

    async def do(client: Client) -> None:
        for name in names:
            await client.users.delete(name)

    ask(server, do)
    output.note(f"Deleted {', '.join(names)}.")


@user.command(context_settings=CONTEXT, epilog=examples("flame user whoami"))
@server_option
@output_option
def whoami(server: str | None, how: str) -> None:
    """Print whom the server takes you for."""
    known = ask(server, lambda client: client.whoami())
    output.show(
        known,
        how,
        lambda: output.facts(
            [("name", known.name), ("role", known.role.value), ("projects", ", ".join(known.projects))]
        ),
    )


def _table(users: list[User]) -> None:
    output.table(
        ["NAME", "ROLE", "PROJECTS", "CREATED"],
        [[one.name, one.role.value, ", ".join(one.projects), output.when(one.created_at)] for one in users],
    )
