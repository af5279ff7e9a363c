"""A session's tasks by state, as they change: one line that is redrawn on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

import click

from flame.cli import output
from flame.spec.sessions import Counts

_HEAD = ("Total", "Succeed", "Failed", "Pending", "Running")
_WIDTH = 10
#: Seconds between two lines where nobody can redraw them.
_PAUSE = 1.0


class CountsView:
    """Prints counts. A context manager: at its end the last ones stand there."""

    def __init__(self) -> None:
        self._live = output.terminal()
        self._last: Counts | None = None
        self._shown: Counts | None = None
        self._when = 0.0

    def __enter__(self) -> CountsView:
        click.echo(click.style("".join(word.rjust(_WIDTH) for word in _HEAD), bold=True))
        return self

    def show(self, counts: Counts) -> None:
        """These are the counts now."""
        self._last = counts
        if self._live:
            click.echo(f"\r{_line(counts)}", nl=False)
        elif time.monotonic() - self._when >= _PAUSE:
            self._print(counts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            click.echo()
        elif self._last is not None and self._last != self._shown:
            self._print(self._last)

    def _print(self, counts: Counts) -> None:
        self._shown, self._when = counts, time.monotonic()
        click.echo(_line(counts))


def _line(counts: Counts) -> str:
    values = (counts.total, counts.succeed, counts.failed, counts.pending, counts.running)
    return "".join(str(value).rjust(_WIDTH) for value in values)
