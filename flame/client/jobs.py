"""Jobs and their tasks: submitted, followed, waited for; logs and artifacts.

Whatever follows (events, a wait, a log) goes on after the server was away: it comes back by itself and resumes
where it was, see :mod:`flame.client.follow`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from flame.client.follow import Backoff, OnLost, insist, resumed, transient
from flame.client.resources import Codes, Noun, Page, pages
from flame.errors import FlameError, ServerError, UsageError
from flame.spec.nouns import JobForm
from flame.spec.records import CheckpointRecord, Event, Job, JobState, Round, Task

if TYPE_CHECKING:
    from flame.spec.load import JobBundle


class Jobs(Noun):
    """Runs of designs."""

    async def submit(self, bundle: JobBundle) -> Job:
        """Bring a JOB to the server with its code; it is checked as a whole there, and not started yet.

        :param bundle: what :func:`flame.client.load_job` has read.
        """
        if bundle.archive is not None:
            await Codes(self._session).upload(bundle.archive)
        return await self.create(bundle.form)

    async def create(self, form: JobForm) -> Job:
        """Create a job whose code, if it names any, is on the server."""
        return await self._session.call(
            "POST", "/v1/jobs", query={"project": self._session.project}, body=form, into=Job
        )

    async def get(self, id: str) -> Job:
        """One job."""
        return await self._session.call("GET", f"/v1/jobs/{id}", into=Job)

    async def update(self, id: str, form: JobForm) -> Job:
        """Change a job that was not started."""
        return await self._session.call("PUT", f"/v1/jobs/{id}", body=form, into=Job)

    async def delete(self, id: str) -> None:
        """Remove a job with its logs and artifacts."""
        await self._session.call("DELETE", f"/v1/jobs/{id}")

    async def start(self, id: str) -> Job:
        """Start a job."""
        return await self._session.call("POST", f"/v1/jobs/{id}/start", into=Job)

    async def stop(self, id: str) -> Job:
        """Ask a job to stop; :meth:`wait` says when it has."""
        return await self._session.call("POST", f"/v1/jobs/{id}/stop", into=Job)

    async def pause(self, id: str) -> Job:
        """Ask a job's workers to end; what the job has reached is kept. Returns at once, the job is ``pausing`` then.

        :raises flame.errors.Conflict: it is not under way.
        """
        return await self._session.call("POST", f"/v1/jobs/{id}/pause", into=Job)

    async def resume(self, id: str) -> Job:
        """Let a paused job go on from the last round that was kept.

        :raises flame.errors.Conflict: it is not paused.
        """
        return await self._session.call("POST", f"/v1/jobs/{id}/resume", into=Job)

    async def restart(self, id: str, from_round: int | None = None) -> Job:
        """Let a job begin again behind a round that was kept; of one that has ended another one is made, which is given.

        :param from_round: behind which round; 0: from the beginning; None: behind the last that was kept.
        :raises flame.errors.Conflict: nothing is kept of this round, or the job was never started.
        """
        return await self._session.call("POST", f"/v1/jobs/{id}/restart", query={"fromRound": from_round}, into=Job)

    async def checkpoints(self, id: str) -> list[CheckpointRecord]:
        """What is kept of a job's rounds."""
        return (await self._session.call("GET", f"/v1/jobs/{id}/checkpoints", into=Page[CheckpointRecord])).items

    async def tasks(self, id: str) -> list[Task]:
        """A job's tasks, in the order of expansion."""
        return (await self._session.call("GET", f"/v1/jobs/{id}/tasks", into=Page[Task])).items

    async def rounds(self, id: str) -> list[Round]:
        """The rounds that are finished."""
        return (await self.get(id)).rounds

    async def events(
        self,
        id: str,
        *,
        after: int = 0,
        follow: bool = False,
        patience: float | None = None,
        on_lost: OnLost | None = None,
    ) -> AsyncGenerator[Event, None]:
        """A job's events in order, see :class:`flame.spec.records.Event`.

        :param after: begin behind this number.
        :param follow: wait for new ones, until the job has ended.
        :param patience: when following, seconds that the server may be away before that is an error; None for ever.
        :param on_lost: when following, told each time that the server could not be reached.
        """

        async def ended() -> bool:
            return not follow or (await self.get(id)).state.ended

        stream = resumed(
            self._session,
            f"/v1/jobs/{id}/events",
            query={"follow": "true" if follow else None},
            after=after,
            patience=patience if follow else 0.0,
            on_lost=on_lost,
            ended=ended,
        )
        async with aclosing(stream) as events:
            async for event in events:
                yield event

    async def wait(self, id: str, *, patience: float | None = None, on_lost: OnLost | None = None) -> Job:
        """Wait until a job has ended, however it did; ``state`` and ``failure`` say how.

        To limit the time, put it into ``asyncio.timeout``. For the parameters see :meth:`events`.
        """
        async with aclosing(self.events(id, follow=True, patience=patience, on_lost=on_lost)) as events:
            async for _ in events:
                pass
        return await insist(lambda: self.get(id), patience=patience)

    async def artifact(self, id: str, name: str, to: str | os.PathLike[str]) -> Path:
        """Download what a task has handed in, such as ``model.safetensors``.

        :param to: a file, or a folder in which it gets its own name.
        :raises flame.errors.UsageError: the file cannot be written.
        """
        path = Path(to)
        if path.is_dir():
            path /= Path(name).name
        partial = path.with_name(f"{path.name}.part")
        async with self._session.open("GET", f"/v1/jobs/{id}/artifacts/{name}") as answer:
            try:
                with partial.open("wb") as file:
                    async for piece in answer.chunks():
                        file.write(piece)
                partial.replace(path)
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error
            finally:
                partial.unlink(missing_ok=True)
        return path

    async def list(self, state: JobState | None = None) -> list[Job]:
        """All jobs, or those in a state, from the oldest to the newest."""
        return await pages(self._session, "/v1/jobs", Job, state=state.value if state else None)


class Tasks(Noun):
    """The tasks of jobs."""

    async def get(self, id: str) -> Task:
        """One task."""
        return await self._session.call("GET", f"/v1/tasks/{id}", into=Task)

    async def delete(self, id: str) -> None:
        """End a running task's worker; its job then sees it fail."""
        await self._session.call("DELETE", f"/v1/tasks/{id}")

    async def log(
        self, id: str, *, attempt: int | None = None, follow: bool = False, on_lost: OnLost | None = None
    ) -> AsyncGenerator[bytes, None]:
        """What a task has printed, whole and in order.

        :param attempt: which start of it; None for the newest.
        :param follow: wait for more, until that attempt has ended.
        :param on_lost: when following, told each time that the server could not be reached.
        """
        path = f"/v1/tasks/{id}/log"
        offset = 0
        backoff = Backoff(patience=None if follow else 0.0)
        while True:
            query = {"attempt": attempt, "offset": offset, "follow": "true" if follow else None}
            try:
                async with self._session.open("GET", path, query=query) as answer:
                    if (named := answer.headers.get("flame-attempt", "")).isdigit():
                        attempt = int(named)
                    # A quiet task is no fault, and text has no signs of life: a dead server resets the connection.
                    async for piece in answer.chunks(idle=3600.0 if follow else 30.0):
                        backoff.succeeded()
                        offset += len(piece)
                        yield piece
                task = await self.get(id) if follow else None
                if task is None or task.state.ended or (attempt is not None and task.attempt > attempt):
                    return
                raise ServerError(f"{self._session.server} closed the log of task {id}.")
            except FlameError as error:
                if on_lost is not None and transient(error):
                    on_lost(error)
                await backoff.failed(error)
