"""``flame code``: the code of a design's roles."""

from __future__ import annotations

from pathlib import Path

import click

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, server_option
from flame.client import Client
from flame.errors import UsageError
from flame.spec import bundle


@click.group(context_settings=CONTEXT, epilog=examples("flame code create --design digits code/"))
def code() -> None:
    """The code of a design: a folder or a zip with one top-level folder a role, each with a main.py."""


def _design_option(function: click.decorators.FC) -> click.decorators.FC:
    text = "The design, given by its id, the beginning of it, or its name."
    return click.option("--design", required=True, help=text)(function)


@code.command(context_settings=CONTEXT, epilog=examples("flame code create --design digits code.zip"))
@click.argument("source")
@_design_option
@server_option
def create(source: str, design: str, server: str | None) -> None:
    """Give a design the code in SOURCE, a folder or a zip."""
    _put(source, design, server)


@code.command(context_settings=CONTEXT, epilog=examples("flame code update --design digits code/"))
@click.argument("source")
@_design_option
@server_option
def update(source: str, design: str, server: str | None) -> None:
    """Give a design other code, that in SOURCE, a folder or a zip."""
    _put(source, design, server)


@code.command(context_settings=CONTEXT, epilog=examples("flame code get --design digits --to code.zip"))
@_design_option
@click.option("--to", metavar="FILE", help="Where to write the zip; else its folders are listed.")
@server_option
def get(design: str, to: str | None, server: str | None) -> None:
    """Download a design's code as a zip, or list the folders in it."""

    async def do(client: Client) -> bytes:
        return await client.code.get(await names.design_id(client, design))

    data = ask(server, do)
    if to is None:
        rows = [[role, "yes" if runs else "no"] for role, runs in sorted(bundle.folders(data).items())]
        output.table(["FOLDER", "MAIN.PY"], rows)
        return
    try:
        Path(to).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{to} cannot be written: {error.strerror or error}.") from error
    output.note(f"The code of {design} is in {to}.")


@code.command(context_settings=CONTEXT, epilog=examples("flame code delete --design digits"))
@_design_option
@server_option
def delete(design: str, server: str | None) -> None:
    """Take a design's code away."""

    async def do(client: Client) -> None:
        await client.code.delete(await names.design_id(client, design))

    ask(server, do)
    output.note(f"The design {design} has no code any more.")


def _put(source: str, design: str, server: str | None) -> None:
    data = bundle.pack(Path(source))

    async def do(client: Client) -> str:
        return await client.code.put(await names.design_id(client, design), data)

    output.note(f"The design {design} has the code {ask(server, do)[:12]}.")
