"""How commands print: tables for people, one document for programs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click


def show(value: Any, how: str, table: Callable[[], None]) -> None:
    """Print a value as was asked.

    :param value: a record or a list of records, for the documents.
    :param how: ``table``, ``json`` or ``yaml``.
    :param table: prints it for people.
    """
    if how == "table":
        table()
    else:
        document(value, how)


def document(value: Any, how: str) -> None:
    """Print one document of JSON or YAML."""
    import msgspec

    plain = msgspec.to_builtins(value)
    if how == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2))
    else:
        import yaml

        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Print an aligned table.

    :param rows: cells; None is an empty one.
    :param right: the columns that are aligned to the right: numbers.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [headers, *cells]) for i in range(len(headers))]
    for number, line in enumerate([headers, *cells]):
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text = "  ".join(padded).rstrip()
        click.echo(click.style(text, bold=True) if number == 0 else text)


def facts(pairs: Sequence[tuple[str, object]]) -> None:
    """Print names and values, one a line; those without a value are left out."""
    given = [(name, str(value)) for name, value in pairs if value not in (None, "", [])]
    width = max((len(name) for name, _ in given), default=0)
    for name, value in given:
        first, *rest = value.splitlines()
        click.echo(f"{name.ljust(width)}  {first}")
        for line in rest:
            click.echo(f"{' ' * width}  {line}")


def when(seconds: float | None) -> str | None:
    """A time for people, in local time."""
    return None if not seconds else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def span(seconds: float) -> str:
    """A length of time for people."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def number(value: float) -> str:
    """A metric's value for people: four digits that say something."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    click.echo(text, err=True)


def terminal() -> bool:
    """True if a person is looking."""
    return sys.stdout.isatty()


def width() -> int:
    """The terminal's width in columns."""
    return shutil.get_terminal_size().columns
