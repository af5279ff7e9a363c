"""``flame exec``: tasks of a registered application, from the command line."""

from __future__ import annotations

import asyncio
import base64
import sys
from typing import Any

import click
import msgspec

from flame.cli import output
from flame.cli.app import CONTEXT, FAILED, examples, server_option
from flame.errors import FlameError, UsageError


@click.command(
    name="exec",
    context_settings=CONTEXT,
    epilog=examples(
        "flame exec pi --input 100000",
        'flame exec scorer --input \'{"text": "good"}\' --input \'{"text": "bad"}\'',
        "seq 100 | flame exec pi --input - -o json",
    ),
)
@click.argument("app", metavar="APP")
@click.option(
    "--input",
    "inputs",
    metavar="JSON|TEXT|-",
    multiple=True,
    help="A task's input; - reads one from each line of standard input.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that a task may run.")
@click.option("--retries", type=click.IntRange(min=0), default=0, help="How often a failed task is tried again.")
@click.option("--max-instances", type=click.IntRange(min=1), help="Most executors.")
@server_option
@click.option(
    "-o",
    "--output",
    "how",
    type=click.Choice(["lines", "json"]),
    default="lines",
    show_default=True,
    help="One line of JSON a task, as they come in order; or one document.",
)
def execute(
    *,
    app: str,
    inputs: tuple[str, ...],
    timeout: float | None,
    retries: int,
    max_instances: int | None,
    server: str | None,
    how: str,
) -> int:
    """Run tasks of the application APP, and print their answers in the order of their inputs.

    The status is 0 only if all of them succeeded.
    """
    if not inputs:
        raise UsageError(
            "Give the tasks' inputs: --input JSON, any number of times, or --input - for lines of standard input."
        )
    values = [_value(text) for given in inputs for text in (sys.stdin if given == "-" else [given]) if text.strip()]
    options: dict[str, Any] = {"timeout": timeout, "retries": retries, "max_instances": max_instances}
    results = asyncio.run(_execute(app, values, options, server, how))
    if how == "json":
        output.document(results, how)
    return FAILED if any("error" in result for result in results) else 0


async def _execute(
    app: str, values: list[Any], options: dict[str, Any], server: str | None, how: str
) -> list[dict[str, Any]]:
    from flame import sessions

    results: list[dict[str, Any]] = []
    async with sessions.connect(server) as connection, connection.open(app, **options) as session:
        for future in session.submit_many(values):
            try:
                results.append({"output": _plain(await future)})
                if how == "lines":
                    click.echo(msgspec.json.encode(results[-1]["output"]))
            except FlameError as error:
                results.append({"error": error.message})
                output.note(f"Error: {error}")
    return results


def _value(text: str) -> Any:
    """JSON where it is, else the text itself."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text.rstrip("\n")


def _plain(value: Any) -> Any:
    """An answer as JSON can say it."""
    return (
        msgspec.to_builtins(value, builtin_types=(), enc_hook=_hook) if not isinstance(value, bytes) else _hook(value)
    )


def _hook(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
