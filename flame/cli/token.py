"""``flame token``: with which users say who they are."""

from __future__ import annotations

import time

import click

from flame.cli import output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.spec.people import Token, TokenForm


@click.group(context_settings=CONTEXT, epilog=examples("flame token create --days 30", "flame token list"))
def token() -> None:
    """Tokens with which users say who they are. The server keeps only their SHA-256."""


@token.command(
    context_settings=CONTEXT,
    epilog=examples("flame token create --description laptop", "flame token create --user site-3 --days 30"),
)
@click.option("--user", metavar="NAME", help="Whose; only an admin makes tokens for others.")
@click.option("--description", default="", help="What it is for.")
@click.option(
    "--days", type=click.FloatRange(0, 3650, min_open=True), default=90.0, show_default=True, help="Good for."
)
@server_option
@output_option
def create(user: str | None, description: str, days: float, server: str | None, how: str) -> None:
    """Make a token and print it. It is shown this once."""
    form = TokenForm(user=user, description=description, days=days)
    made = ask(server, lambda client: client.tokens.create(form))
    output.show(made, how, lambda: _table([made]))
    if how == "table":
        output.note("The token, which is not shown again; `flame login` keeps it:")
        click.echo(made.token)


@token.command(name="list", context_settings=CONTEXT, epilog=examples("flame token list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List your tokens, without the secrets; an admin sees all."""
    found = ask(server, lambda client: client.tokens.list())
    output.show(found, how, lambda: _table(found))


@token.command(
    context_settings=CONTEXT,
    epilog=examples("flame token revoke 3f2a9c01d4e8", "flame token revoke 3f2a9c01d4e8 --descendants"),
)
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--descendants", is_flag=True, help="Also the tokens that were made with them, and with those.")
@server_option
def revoke(ids: tuple[str, ...], descendants: bool, server: str | None) -> None:
    """Make tokens worthless, at once. Of one that was stolen, take the descendants, too."""

    async def do(client: Client) -> None:
        for one in ids:
            await client.tokens.revoke(one, descendants=descendants)

    ask(server, do)
    output.note(f"Revoked {', '.join(ids)}.")


def _table(tokens: list[Token]) -> None:
    now = time.time()
    output.table(
        ["ID", "USER", "DESCRIPTION", "MADE BY", "CREATED", "EXPIRES"],
        [
            [
                one.id,
                one.user,
                one.description,
                one.made_by,
                output.when(one.created_at),
                output.when(one.expires_at) if one.expires_at > now else "expired",
            ]
            for one in tokens
        ],
    )
