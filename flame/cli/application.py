"""``flame app``: applications, the code that serves the tasks of sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from flame.cli import names, output
from flame.cli.app import CONTEXT, Function, ask, examples, output_option, server_option
from flame.client import Client
from flame.errors import UsageError
from flame.sessions.code import files_below
from flame.spec import bundle
from flame.spec.read import parse
from flame.spec.sessions import Application, AppRecord
from flame.spec.shape import shape


@click.group(
    context_settings=CONTEXT,
    epilog=examples("flame app create pi --code examples/sessions/pi --entry pi:inside", "flame app list"),
)
def app() -> None:
    """Applications: a class or a function that serves the tasks of sessions, kept warm in executors."""


def _field_options(function: Function) -> Function:
    """The fields of an application, as options."""
    options: list[Callable[[Function], Function]] = [
        click.option("--entry", metavar="MODULE:NAME", help="The class or function that serves tasks."),
        click.option(
            "--code",
            type=click.Path(path_type=Path),
            help="The folder, or the one file, with the module. None: it is installed.",
        ),
        click.option("--image", help="The image of executors in containers and pods."),
        click.option("--argument", "arguments", metavar="NAME=VALUE", multiple=True, help="A keyword argument for it."),
        click.option("--env", "environment", metavar="NAME=VALUE", multiple=True, help="A variable of the executors."),
        click.option(
            "--dependency",
            "dependencies",
            metavar="REQUIREMENT",
            multiple=True,
            help="To be installed, as pip takes it.",
        ),
        click.option("--cpu", type=click.FloatRange(min=0, min_open=True), help="Cores of an executor."),
        click.option("--memory", metavar="AMOUNT", help="Memory of an executor, such as 2Gi."),
        click.option("--gpu", type=click.IntRange(min=0), help="GPUs of an executor."),
        click.option("--max-instances", type=click.IntRange(min=1), help="Most executors at once, over all sessions."),
        click.option(
            "--delay-release",
            type=click.FloatRange(min=0),
            help="Seconds that an executor with nothing to do is kept; else 60.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@app.command(
    context_settings=CONTEXT,
    epilog=examples(
        "flame app create pi --code examples/sessions/pi --entry pi:inside",
        "flame app create scorer --code scorer.py --entry scorer:Scorer --argument model=small --dependency torch==2.13.0",
    ),
)
@click.argument("name")
@_field_options
@server_option
@output_option
def create(name: str, server: str | None, how: str, **fields: Any) -> None:
    """Register an application under NAME; sessions are then opened by it, and `flame exec NAME` runs tasks of it."""
    form, data = _form(name, None, fields)

    async def do(client: Client) -> AppRecord:
        if data is not None:
            await client.code.upload(data)
        return await client.apps.create(form)

    _print([ask(server, do)], how, alone=True)


@app.command(name="list", context_settings=CONTEXT, epilog=examples("flame app list"))
@server_option
@output_option
def list_(server: str | None, how: str) -> None:
    """List the applications."""
    _print(ask(server, lambda client: client.apps.list()), how)


@app.command(context_settings=CONTEXT, epilog=examples("flame app get pi"))
@click.argument("name", metavar="APP")
@server_option
@output_option
def get(name: str, server: str | None, how: str) -> None:
    """Print APP, given by its id, the beginning of it, or its name."""

    async def do(client: Client) -> AppRecord:
        return await client.apps.get(await names.app_id(client, name))

    record = ask(server, do)
    one = record.application
    output.show(
        record,
        how,
        lambda: output.facts(
            [
                ("id", record.id),
                ("name", record.name),
                ("entry", one.entry),
                ("code", one.code),
                ("image", one.image),
                ("arguments", "\n".join(f"{key}={value}" for key, value in one.arguments.items())),
                ("environment", "\n".join(sorted(one.environment))),  # names alone: values may be secrets
                ("dependencies", "\n".join(one.dependencies)),
                ("max instances", one.max_instances),
                ("delay release", output.span(one.delay_release)),
                ("project", record.project),
                ("owner", record.owner),
                ("created", output.when(record.created_at)),
            ]
        ),
    )


@app.command(context_settings=CONTEXT, epilog=examples("flame app update pi --max-instances 8"))
@click.argument("name", metavar="APP")
@_field_options
@server_option
@output_option
def update(name: str, server: str | None, how: str, **fields: Any) -> None:
    """Change what the options say of APP; sessions that are open go on with what it was."""

    async def do(client: Client) -> AppRecord:
        record = await client.apps.get(await names.app_id(client, name))
        form, data = _form(record.name, record.application, fields)
        if data is not None:
            await client.code.upload(data)
        return await client.apps.update(record.id, form)

    _print([ask(server, do)], how, alone=True)


@app.command(context_settings=CONTEXT, epilog=examples("flame app delete pi"))
@click.argument("apps", metavar="APP...", nargs=-1, required=True)
@server_option
def delete(apps: tuple[str, ...], server: str | None) -> None:
    """Remove applications; sessions that are open go on."""

    async def do(client: Client) -> None:
        ids = [await names.app_id(client, given) for given in apps]
        await asyncio.gather(*(client.apps.delete(one) for one in ids))

    ask(server, do)
    output.note(f"Deleted {', '.join(apps)}.")


def _form(name: str, before: Application | None, fields: dict[str, Any]) -> tuple[Application, bytes | None]:
    """What the options say of an application, over what it was; and its bundle, where one is to be uploaded."""
    given: dict[str, Any] = msgspec.to_builtins(before) if before is not None else {}
    given["name"] = name
    for key in ("entry", "image"):
        if fields[key] is not None:
            given[key] = fields[key]
    if fields["max_instances"] is not None:
        given["maxInstances"] = fields["max_instances"]
    if fields["delay_release"] is not None:
        given["delayRelease"] = fields["delay_release"]
    if fields["arguments"]:
        given["arguments"] = {key: parse(value, f"--argument {key}") for key, value in map(_pair, fields["arguments"])}
    if fields["environment"]:
        given["environment"] = dict(map(_pair, fields["environment"]))
    if fields["dependencies"]:
        given["dependencies"] = list(fields["dependencies"])
    resources = {key: fields[key] for key in ("cpu", "memory", "gpu") if fields[key] is not None}
    if resources:
        given["resources"] = {**given.get("resources", {}), **resources}
    data = None
    if fields["code"] is not None:
        data = _pack(fields["code"])
        given["code"] = bundle.digest(data)
    if "entry" not in given:
        raise UsageError("Name the class or function that serves tasks: --entry MODULE:NAME.")
    return shape(given, Application), data


def _pack(path: Path) -> bytes:
    try:
        if path.is_file():
            return bundle.pack_files({path.name: path.read_bytes()})
        if path.is_dir():
            return bundle.pack_files(dict(files_below(path, path)))
    except OSError as error:
        raise UsageError(f"The code at {path} cannot be read: {error.strerror}.") from error
    raise UsageError(f"There is no file and no folder {path}.")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is no NAME=VALUE.")
    return key, value


def _print(records: list[AppRecord], how: str, *, alone: bool = False) -> None:
    output.show(
        records[0] if alone else records,
        how,
        lambda: output.table(
            ["ID", "NAME", "ENTRY", "CODE", "MAX", "CREATED"],
            [
                [
                    one.id,
                    one.name,
                    one.application.entry,
                    (one.application.code or "")[:12],
                    one.application.max_instances,
                    output.when(one.created_at),
                ]
                for one in records
            ],
            right=[4],
        ),
    )
