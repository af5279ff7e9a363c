"""A job from its files to its end, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import aclosing
from pathlib import Path

from flame.client import config
from flame.client.attach import serving
from flame.client.client import Client
from flame.errors import JobFailed, SpecError
from flame.spec.load import JobBundle, load_job
from flame.spec.records import Event, Job

#: Seconds that a server on this machine, which nobody may start again, can be away before a job is given up.
PATIENCE = 30.0


class Reading:
    """A JOB being read. What is registered on the server is only asked when it matters; mostly the files say everything.

    :param path: a job folder or a job file.
    :param overrides: ``path=value``, see :func:`flame.spec.load.load_job`.
    :raises flame.errors.UsageError: a file is not there or cannot be read.
    :raises flame.errors.SpecError: the job says something that cannot be, whatever is registered.
    """

    def __init__(self, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> None:
        self._path = Path(path)
        self._overrides = list(overrides)
        registered = _Unasked()
        self._bundle: JobBundle | None = None
        try:
            self._bundle = load_job(self._path, self._overrides, registered=registered)
        except SpecError:
            if not registered.asked:
                raise
        if registered.asked:
            self._bundle = None

    async def finish(self, client: Client) -> JobBundle:
        """The job.

        :param client: whose server is asked about datasets, if need be.
        :raises flame.errors.FlameError: the job says something that cannot be; or the server does not answer.
        """
        if self._bundle is None:
            registered = [record.id for record in await client.datasets.list()]
            self._bundle = load_job(self._path, self._overrides, registered=registered)
        return self._bundle


class _Unasked(frozenset[str]):
    """An empty set that remembers whether it was asked."""

    asked = False

    def __contains__(self, _: object) -> bool:
        self.asked = True
        return False


async def run(
    job: str | os.PathLike[str],
    *,
    overrides: Iterable[str] = (),
    server: str | None = None,
    token: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Job:
    """Run a job to its end, on the configured server or else on a private one.

    >>> job = await flame.client.run("examples/digits", overrides=["hyperparameters.rounds=5"])
    >>> job.rounds[-1].metrics
    {'accuracy': 0.95, ...}

    :param job: a job folder or a job file.
    :param overrides: ``path=value``, as with ``flame run --set``.
    :param server: see :class:`Client`.
    :param token: see :class:`Client`.
    :param on_event: told each event of the job as it happens.
    :returns: the job with its rounds and its model.
    :raises flame.errors.JobFailed: it did not complete; the text is the cause.
    :raises flame.errors.FlameError: it could not be submitted.
    """
    reading = Reading(job, overrides)
    settings = config.resolve(server, token)
    patience = PATIENCE if settings.server is None else None
    async with serving(settings) as client:
        submitted = await client.jobs.submit(await reading.finish(client))
        await client.jobs.start(submitted.id)
        async with aclosing(client.jobs.events(submitted.id, follow=True, patience=patience)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        ended = await client.jobs.get(submitted.id)
    if ended.state != "completed":
        raise JobFailed(f"The job {ended.name} ({ended.id}) is {ended.state.value}: {why(ended)}")
    return ended


def why(job: Job) -> str:
    """Why a job ended as it did, in a sentence."""
    if job.failure is not None:
        return job.failure.message
    return job.reason or "it was stopped."
