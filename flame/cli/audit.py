"""``flame audit``: who did what."""

from __future__ import annotations

import click

from flame.cli import output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option


@click.command(context_settings=CONTEXT, epilog=examples("flame audit", "flame audit --refused --limit 1000 -o json"))
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="The most lines.")
@click.option("--who", metavar="USER", help="Only what this one did.")
@click.option("--refused", is_flag=True, help="Only what was refused.")
@server_option
@output_option
def audit(limit: int, who: str | None, refused: bool, server: str | None, how: str) -> None:
    """Print who changed what, and what was refused, the newest last. For admins."""
    found = ask(server, lambda client: client.audit(limit, who=who, refused=refused))
    output.show(
        found,
        how,
        lambda: output.table(
            ["TIME", "WHO", "ADDRESS", "STATUS", "WHAT", "REASON"],
            [
                [
                    output.when(one.time),
                    one.who,
                    one.address,
                    one.status,
                    f"{one.what.split()[0]} {one.path}",
                    one.reason,
                ]
                for one in found
            ],
        ),
    )
