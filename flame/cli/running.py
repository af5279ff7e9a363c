"""The course of ``flame run``: submit, start, follow, and say how it ended."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable
from contextlib import aclosing

from flame.cli import output
from flame.cli.app import FAILED, INTERRUPTED
from flame.cli.progress import Progress
from flame.cli.result import document, registry_of, report
from flame.cli.views import Lines, Silent, View
from flame.client.attach import serving
from flame.client.config import Settings
from flame.client.local import PrivateServer
from flame.client.running import PATIENCE, Reading
from flame.errors import Conflict, FlameError, ServerUnreachable
from flame.spec.records import Job, JobState


class Run:
    """One ``flame run``.

    :param settings: which server.
    :param private: the private server that was started for it, if one was.
    :param how: ``table``, ``json`` or ``yaml``.
    """

    def __init__(self, settings: Settings, private: PrivateServer | None, how: str) -> None:
        self._settings = settings
        self._private = private
        self._how = how
        self._job: Job | None = None
        self._view: View = Silent()
        self._registry: str | None = None
        self._interrupts = 0
        self._stopping: asyncio.Task[None] | None = None
        self._say_lost = Lost(self._say)

    def go(self, reading: Reading) -> int:
        """Run the job; gives the command's exit status."""
        return asyncio.run(self._go(reading))

    async def _go(self, reading: Reading) -> int:
        following = asyncio.create_task(self._follow(reading))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, following)
        try:
            job = await following
        except asyncio.CancelledError:
            output.note("Interrupted.")
            return INTERRUPTED
        if self._how != "table":
            output.document(document(job), self._how)
        else:
            report(job, self._registry)
        if job.state is JobState.COMPLETED:
            return 0
        return INTERRUPTED if self._interrupts else FAILED

    def _interrupt(self, following: asyncio.Task[Job]) -> None:
        """Ctrl-C: the first one stops the job, the second one leaves at once."""
        self._interrupts += 1
        if self._job is None or self._interrupts > 1:
            following.cancel()
            return
        self._view.say("Stopping the job; Ctrl-C again leaves at once.")
        self._stopping = asyncio.create_task(self._stop(self._job.id))

    def _say(self, text: str) -> None:
        self._view.say(text)

    def _lost(self, error: FlameError) -> None:
        """The server does not answer."""
        if self._private is not None and self._private.lost:
            raise ServerUnreachable(
                f"The private server ended in the middle of the job; its log is {self._private.log}."
            )
        self._say_lost(error)

    async def _stop(self, id: str) -> None:
        try:
            await self._client.jobs.stop(id)
        except Conflict:
            return  # it has just ended
        except FlameError as error:
            self._view.say(f"The job cannot be stopped: {error}")

    async def _follow(self, reading: Reading) -> Job:
        """Submit and start the job and follow it to its end."""
        async with serving(self._settings, self._private) as client:
            self._client = client
            bundle = await reading.finish(client)
            for text in bundle.notes:
                output.note(f"note: {text}")
            self._job = job = await client.jobs.submit(bundle)
            progress = Progress(job)
            if self._how == "table":
                self._view = view_of(progress)
            patience = PATIENCE if self._settings.server is None else None
            async with self._view:
                await client.jobs.start(job.id)
                events = client.jobs.events(job.id, follow=True, patience=patience, on_lost=self._lost)
                async with aclosing(events):
                    async for event in events:
                        self._view.tell(progress.feed(event))
            ended = await client.jobs.get(job.id)
            if self._how == "table":
                self._registry = await registry_of(client, ended)
            return ended


class Lost:
    """Says that the server is away: once each time that it is.

    :param say: how to say it.
    """

    _SAME = 10.0  # seconds between two failures of the same absence, at most

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = -math.inf

    def __call__(self, error: FlameError) -> None:
        """Hear of a failure."""
        now = time.monotonic()
        if now - self._last > self._SAME:
            self._say(f"{error} Waiting for it to come back.")
        self._last = now


def view_of(progress: Progress) -> View:
    """The live view on a terminal, lines elsewhere."""
    if not output.terminal():
        return Lines()
    from flame.cli.live import Live

    return Live(progress)
