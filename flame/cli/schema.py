"""``flame schema``: the topology of a design."""

from __future__ import annotations

from pathlib import Path

import click

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.spec.load import load_job, load_schema
from flame.spec.nouns import Schema


@click.group(
    context_settings=CONTEXT,
    epilog=examples("flame schema draw schema.json", "flame schema create --design digits schema.json"),
)
def schema() -> None:
    """The topology of a design: its roles and the channels between them."""


def _design_option(function: click.decorators.FC) -> click.decorators.FC:
    text = "The design, given by its id, the beginning of it, or its name."
    return click.option("--design", required=True, help=text)(function)


@schema.command(context_settings=CONTEXT, epilog=examples("flame schema create --design digits schema.json"))
@click.argument("source")
@_design_option
@server_option
def create(source: str, design: str, server: str | None) -> None:
    """Give a design the schema in the file SOURCE (- for standard input)."""
    _put(source, design, server)


@schema.command(context_settings=CONTEXT, epilog=examples("flame schema update --design digits schema.json"))
@click.argument("source")
@_design_option
@server_option
def update(source: str, design: str, server: str | None) -> None:
    """Give a design another schema, the one in the file SOURCE (- for standard input)."""
    _put(source, design, server)


@schema.command(context_settings=CONTEXT, epilog=examples("flame schema get --design digits -o json"))
@_design_option
@server_option
@output_option
def get(design: str, server: str | None, how: str) -> None:
    """Print a design's schema; as a table, this is its drawing."""
    held = _get(design, server)
    output.show(held, how, lambda: _draw(held))


@schema.command(
    context_settings=CONTEXT,
    epilog=examples("flame schema draw schema.json", "flame schema draw examples/digits", "flame schema draw digits"),
)
@click.argument("source")
@server_option
def draw(source: str, server: str | None) -> None:
    """Draw a topology in the terminal: that of a schema file, of a job folder, or of a registered design."""
    path = Path(source)
    if path.is_dir():
        found = load_job(path).form.schema
        _draw(found if found is not None else _get(source, server))
    else:
        _draw(load_schema(source) if source == "-" or path.exists() else _get(source, server))


@schema.command(context_settings=CONTEXT, epilog=examples("flame schema delete --design digits"))
@_design_option
@server_option
def delete(design: str, server: str | None) -> None:
    """Take a design's schema away."""

    async def do(client: Client) -> None:
        await client.schemas.delete(await names.design_id(client, design))

    ask(server, do)
    output.note(f"The design {design} has no schema any more.")


def _put(source: str, design: str, server: str | None) -> None:
    form = load_schema(source)

    async def do(client: Client) -> None:
        await client.schemas.put(await names.design_id(client, design), form)

    ask(server, do)
    output.note(f"The design {design} has the schema {form.name}.")


def _get(design: str, server: str | None) -> Schema:
    async def do(client: Client) -> Schema:
        return await client.schemas.get(await names.design_id(client, design))

    return ask(server, do)


def _draw(form: Schema) -> None:
    from flame.spec.draw import draw_topology

    click.echo(draw_topology(form, width=output.width()))
