"""``flame db``: the state moves from one database to another, while no server runs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flame.cli import output
from flame.cli.app import CONTEXT, examples, output_option

if TYPE_CHECKING:
    from flame.maintenance import Moved

Function = TypeVar("Function", bound=Callable[..., Any])


@click.group(
    context_settings=CONTEXT,
    epilog=examples(
        "flame db export state.zip",
        "flame db import state.zip --db mongodb://db.example.org/flame",
    ),
)
def db() -> None:
    """Move the state to another database: export it to a file, import the file there. No server may run meanwhile."""


def _state_options(function: Function) -> Function:
    url = click.option(
        "--db", "url", metavar="URL", help="The database; else flame.db in the data directory. As for `flame serve`."
    )
    folder = click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        help="The server's data directory; else FLAME_DATA_DIR, else ~/.flame/data.",
    )
    return url(folder(function))


@db.command(
    name="export",
    context_settings=CONTEXT,
    epilog=examples(
        "flame db export state.zip", "flame db export state.zip --db mongodb://db.example.org/flame -o json"
    ),
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_state_options
@output_option
def export(file: Path, url: str | None, data_dir: Path | None, how: str) -> None:
    """Write the whole state to FILE: users, designs, datasets, jobs, their events, code. Keep it as safe as the database itself."""
    from flame.maintenance import export_state

    with _Counting("exported") as counting:
        moved = asyncio.run(export_state(_folder(data_dir), url, file, counting))
    _print(moved, how, f"The state is in {file}")


@db.command(
    name="import",
    context_settings=CONTEXT,
    epilog=examples(
        "flame db import state.zip --db mongodb://db.example.org/flame",
        "flame db import state.zip --data-dir /srv/flame",
    ),
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@_state_options
@output_option
def import_(file: Path, url: str | None, data_dir: Path | None, how: str) -> None:
    """Read the state from FILE, which `flame db export` wrote, into a database that is empty."""
    from flame.maintenance import import_state

    with _Counting("imported") as counting:
        moved = asyncio.run(import_state(_folder(data_dir), url, file, counting))
    _print(moved, how, f"The state of {file} is in the database")


def _folder(data_dir: Path | None) -> Path:
    from flame.client.config import data_dir as default_dir

    return (data_dir or default_dir()).expanduser().absolute()


def _print(moved: Moved, how: str, done: str) -> None:
    def table() -> None:
        click.echo(
            f"{done}: {moved.documents:,} documents, {moved.events:,} events, {moved.records:,} records, {moved.bundles:,} code bundles."
        )

    output.show(moved, how, table)


class _Counting:
    """A line on the terminal that says how far it is, if there is one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = 0.0

    def __enter__(self) -> _Counting:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\033[K", nl=False, err=True)

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown > 0.2:
            self._shown = now
            click.echo(f"\r{count:,} {self._what}", nl=False, err=True)
