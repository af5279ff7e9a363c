"""``flame design``: named workflows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from flame.cli import names, output
from flame.cli.app import CONTEXT, ask, examples, output_option, server_option
from flame.client import Client
from flame.errors import UsageError
from flame.spec import bundle
from flame.spec.load import load_design, load_job, load_schema
from flame.spec.nouns import Schema
from flame.spec.records import Design


@click.group(context_settings=CONTEXT, epilog=examples("flame design create examples/digits", "flame design list"))
def design() -> None:
    """Named workflows: a schema and the code of its roles, of which jobs are runs."""


@design.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame design create examples/digits",
        "flame design create --name digits --schema schema.json --code code.zip",
        "flame design create design.json",
    ),
)
@click.argument("source", required=False)
@click.option("--name", help="Its name; else what SOURCE says.")
@click.option("--description", help="What it is for.")
@click.option("--schema", "schema_file", metavar="FILE", help="Its schema; can follow with `flame schema create`.")
@click.option(
    "--code", "code_path", metavar="PATH", help="Its code, a folder or a zip; can follow with `flame code create`."
)
@server_option
@output_option
def create(
    *,
    source: str | None,
    name: str | None,
    description: str | None,
    schema_file: str | None,
    code_path: str | None,
    server: str | None,
    how: str,
) -> None:
    """Register a design.

    SOURCE is a job folder, whose schema and code it gets, or a file {name, description}, or - for standard input.
    """
    schema: Schema | None = None
    archive: bytes | None = None
    words = ""
    if source is not None and Path(source).is_dir():
        job = load_job(source)
        schema, archive, name = job.form.schema, job.archive, name or job.design or job.form.name
    elif source is not None:
        form = load_design(source)
        name, words = name or form.name, form.description
    if name is None:
        raise UsageError("A design needs a name: give --name, or a job folder or file that says it.")
    if schema_file is not None:
        schema = load_schema(schema_file)
    if code_path is not None:
        archive = bundle.pack(Path(code_path))

    async def do(client: Client) -> Design:
        made = await client.designs.create(name, words if description is None else description)
        if schema is not None:
            await client.schemas.put(made.id, schema)
        if archive is not None:
            await client.code.put(made.id, archive)
        return await client.designs.get(made.id)

    _show([ask(server, do)], how, alone=True)


@design.command(name="list", context_settings=CONTEXT, epilog=examples("flame design list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List the designs."""
    _show(ask(server, lambda client: client.designs.list()), how)


@design.command(context_settings=CONTEXT, epilog=examples("flame design get digits"))
@click.argument("given", metavar="DESIGN")
@server_option
@output_option
def get(given: str, server: str | None, how: str) -> None:
    """Print DESIGN, given by its id, the beginning of it, or its name."""

    async def do(client: Client) -> Design:
        return await client.designs.get(await names.design_id(client, given))

    _show([ask(server, do)], how, alone=True)


@design.command(
    context_settings=CONTEXT, epilog=examples("flame design update digits --description 'Handwritten digits'")
)
@click.argument("given", metavar="DESIGN")
@click.option("--name", help="Its new name.")
@click.option("--description", help="Its new description.")
@server_option
@output_option
def update(given: str, name: str | None, description: str | None, server: str | None, how: str) -> None:
    """Change the name or the description of DESIGN."""
    if name is None and description is None:
        raise UsageError("Nothing to change: give --name, --description or both.")

    async def do(client: Client) -> Design:
        held = await client.designs.get(await names.design_id(client, given))
        words = held.description if description is None else description
        return await client.designs.update(held.id, name=name or held.name, description=words)

    _show([ask(server, do)], how, alone=True)


@design.command(context_settings=CONTEXT, epilog=examples("flame design delete digits"))
@click.argument("given", metavar="DESIGN...", nargs=-1, required=True)
@server_option
def delete(given: tuple[str, ...], server: str | None) -> None:
    """Remove designs. Jobs that were made of them keep their own copy of schema and code."""

    async def do(client: Client) -> None:
        ids = [await names.design_id(client, one) for one in given]
        await asyncio.gather(*(client.designs.delete(one) for one in ids))

    ask(server, do)
    output.note(f"Deleted {', '.join(given)}.")


def _show(designs: list[Design], how: str, *, alone: bool = False) -> None:
    def table() -> None:
        rows = [
            [
                one.id,
                one.name,
                one.schema.name if one.schema else None,
                (one.code or "")[:12],
                output.when(one.created_at),
            ]
            for one in designs
        ]
        output.table(["ID", "NAME", "SCHEMA", "CODE", "CREATED"], rows)

    output.show(designs[0] if alone else designs, how, table)
