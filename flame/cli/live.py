"""The live view of a job on a terminal: a few lines that are drawn anew when something happens, ten times a second at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flame.cli.output import number, span
from flame.cli.progress import Progress
from flame.cli.views import View

_SHORTEST = 0.1  # seconds between two drawings
_LONGEST = 1.0  # the elapsed time goes on even if nothing happens
_COLOURS = {"completed": "green", "failed": "red", "terminated": "yellow", "stopping": "yellow", "paused": "yellow"}


class Live(View):
    """Draws what a :class:`Progress` holds.

    :param progress: the job's course, which somebody else feeds.
    :param console: where to draw; None takes the terminal.
    """

    def __init__(self, progress: Progress, console: Console | None = None) -> None:
        self._progress = progress
        self._began = time.monotonic()
        self._said: list[str] = []
        self._screen = Screen(console=console, auto_refresh=False, transient=True)
        self._news = asyncio.Event()
        self._drawing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Live:
        self._screen.start()
        self._drawing = asyncio.create_task(self._draw())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._drawing is not None:
            self._drawing.cancel()
        self._screen.stop()

    def tell(self, lines: Iterable[str]) -> None:
        """Have it drawn anew."""
        self._news.set()

    def say(self, text: str) -> None:
        """Show something below the job, until it ends."""
        self._said.append(text)
        self._news.set()

    async def _draw(self) -> None:
        while True:
            self._screen.update(self.picture(), refresh=True)
            await asyncio.sleep(_SHORTEST)
            try:
                async with asyncio.timeout(_LONGEST - _SHORTEST):
                    await self._news.wait()
            except TimeoutError:
                continue
            self._news.clear()

    def picture(self) -> RenderableType:
        """What is drawn."""
        progress = self._progress
        state = progress.state.value
        head = Text.assemble(
            (progress.job.name, "bold"),
            f"  {progress.job.id}  ",
            (state, _COLOURS.get(state, "cyan")),
            f"  {span(round(time.monotonic() - self._began, 1))}",
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        grid.add_row("rounds", self._rounds())
        if progress.latest:
            grid.add_row(
                "metrics", Text("  ".join(f"{name} {number(value)}" for name, value in progress.latest.items()))
            )
        workers = "  ".join(f"{role} {up}/{there}" for role, (up, there) in sorted(progress.standing().items()))
        if workers:
            grid.add_row("workers", Text(workers))
        for name, lines in (
            ("waits", progress.waiting()[:3]),
            ("warning", progress.warnings[-2:]),
            ("", self._said[-2:]),
        ):
            for line in lines:
                grid.add_row(name, Text(line, style="yellow"))
        return Group(head, grid)

    def _rounds(self) -> RenderableType:
        rounds, expected = self._progress.rounds, self._progress.expected
        pace = f"{span(sum(one.seconds for one in rounds[-10:]) / len(rounds[-10:]))} a round" if rounds else ""
        if expected is None:
            return Text(f"{len(rounds)}  {pace}")
        line = Table.grid(padding=(0, 2))
        expected *= len({one.group for one in rounds}) or 1
        line.add_row(_bar(len(rounds), expected), f"{len(rounds)}/{expected}", pace)
        return line


def _bar(done: int, of: int) -> ProgressBar:
    return ProgressBar(total=of, completed=done, width=30, style="dim", complete_style="cyan", finished_style="green")
