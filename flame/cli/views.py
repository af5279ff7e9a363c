"""How a job that runs is shown: not at all, or line by line. The live view is in :mod:`flame.cli.live`."""

from __future__ import annotations

from collections.abc import Iterable

import click

from flame.cli import output


class View:
    """Shows a job's course. An async context manager for the time that it runs."""

    async def __aenter__(self) -> View:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def tell(self, lines: Iterable[str]) -> None:
        """The job's progress has changed.

        :param lines: what that is in words.
        """

    def say(self, text: str) -> None:
        """Tell the user something beside the job's course."""
        output.note(text)


class Silent(View):
    """Shows nothing: the result is a document."""


class Lines(View):
    """A line for each change, for logs and pipes."""

    def tell(self, lines: Iterable[str]) -> None:
        """Print them."""
        for line in lines:
            click.echo(line)
