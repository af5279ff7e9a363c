"""``flame login``: keep a token, once it is known to be good."""

from __future__ import annotations

import sys

import click

from flame.cli import output
from flame.cli.app import CONTEXT, examples, output_option
from flame.client import Client
from flame.client import config as settings
from flame.spec.people import Known


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame login --server https://flame.example.org:10100 --ca ca.pem",
        "flame login --server https://flame.example.org:10100 < token.txt",
    ),
)
@click.option("--server", metavar="URL", help="The server's address; else FLAME_SERVER, else the configured one.")
@click.option(
    "--ca", metavar="FILE", help="The authority that vouches for the server (PEM), where the system has it not."
)
@click.option("--project", metavar="NAME", help="The project in which new things are made.")
@output_option
def login(server: str | None, ca: str | None, project: str | None, how: str) -> None:
    """Ask for a token, try it, and keep it with the server's address in the configuration file, which you alone can read.

    The token is typed without being shown, or read from standard input; it is no argument, as a process list shows those.
    """
    import asyncio
    import os

    held = settings.resolve(server)
    if ca is not None:
        os.environ["FLAME_CA"] = os.path.abspath(ca)
    address = held.server or settings.DEFAULT_SERVER
    token = (
        click.prompt(f"Token for {address}", hide_input=True, err=True)
        if sys.stdin.isatty()
        else sys.stdin.readline().strip()
    )

    async def ask() -> Known:
        async with Client(address, token) as client:
            return await client.whoami()

    known = asyncio.run(ask())
    kept = settings.Settings(address, token, project or held.project, os.environ.get("FLAME_CA") or held.ca)
    path = settings.write(kept)
    output.show(known, how, lambda: click.echo(f"You are {known.name} ({known.role.value}); kept in {path}."))
