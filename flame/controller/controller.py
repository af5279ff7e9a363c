"""The controller: what happens next to every job.

It keeps a :class:`~flame.controller.supervisor.Supervisor` for each job that is under way, admits waiting jobs when
there is room, hands news of runners to the supervisor they concern, and, when a server starts, takes up again what an
earlier process has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from flame.artifacts import Artifacts, open_artifacts
from flame.controller.accounts import Accounts
from flame.controller.bookkeeping import ends, job_news, job_stream, rounds_stream, task_stream
from flame.controller.catalog import Catalog
from flame.controller.checkpoints import rounds_of
from flame.controller.computes import clean
from flame.controller.context import Context, Options, public
from flame.controller.door import Door
from flame.controller.events import Kill, Pause, Restart, Resume, Start, Stop
from flame.controller.keys import Keys
from flame.controller.participants import Participants
from flame.controller.placement import Decision, Waiting, admit, priority
from flame.controller.recovery import recover
from flame.controller.register import Register
from flame.controller.shelf import Saved
from flame.controller.submission import Submission
from flame.controller.supervisor import Supervisor
from flame.errors import Conflict, NotFound
from flame.notifier import Notifier
from flame.runners.base import Runner, WorkerExit, WorkerInfo
from flame.spec.nouns import Compute, JobForm
from flame.spec.people import DEFAULT_PROJECT
from flame.spec.records import ComputeRecord, Event, Job, JobState, Round, Task
from flame.store import Store


class Controller:
    """All jobs of a server. Made by :meth:`open`, let go of by :meth:`close`; the workers outlive it.

    :param store: the state.
    :param notifier: the event streams.
    :param make: makes the runner of a compute.
    :param keys: what makes the workers' keys.
    :param options: what the operator has chosen.
    :param artifacts: where artifacts are kept; None: in the data directory.
    """

    def __init__(
        self,
        store: Store,
        notifier: Notifier,
        make: Callable[[ComputeRecord], Runner],
        keys: Keys,
        options: Options,
        *,
        artifacts: Artifacts | None = None,
    ) -> None:
        place = artifacts or open_artifacts(None, options.data_dir)
        self.context = Context(store, notifier, make, keys, options, artifacts=place, lost=self._lease_lost)
        self.computes = self.context.computes
        self.computes.add_tenant(self)
        self.register = Register(self.context)
        self.accounts = Accounts(store, self.context.standing)
        self.catalog = Catalog(self.context)
        self._submission = Submission(self.context, self.catalog)
        self.participants = Participants(self)
        self._active: dict[str, Supervisor] = {}
        self._of_task: dict[str, Supervisor] = {}
        self.door = Door(self.context, self._of_task.get)
        self._beginning: set[asyncio.Future[Job]] = set()
        self._waking = asyncio.Lock()
        self._looking = False
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.draining = False
        self.drained = asyncio.Event()

    async def open(self, computes: Sequence[Compute] = ()) -> None:
        """Connect to the computes and take up what an earlier process of the server has left.

        :param computes: those that the operator declares: registered now, or brought up to date.
        :raises flame.errors.SpecError: the configuration of one does not fit its kind.
        """
        await self.register.declare(computes)
        await self.register.ensure_default()
        await recover(self.context, self._watch)
        for job in self.context.logs.jobs():
            if job not in self._active:
                self.context.background.spawn(self.context.logs.archive(job))
        self.computes.settle()
        self.freed()

    def drain(self) -> None:
        """Start no jobs any more; :attr:`drained` is set when none is left that has workers. Those in the queue stay there."""
        self.draining = True
        self.freed()

    async def close(self) -> None:
        """Let go. Workers go on; whatever was about to be done is done by the next process."""
        self.context.leases.close()
        await self.context.background.close()
        await self.computes.close()

    # -------------------------------------------------------------------------------------------------- jobs

    async def create_job(self, form: JobForm, *, project: str = DEFAULT_PROJECT, owner: str = "") -> Job:
        """Check a job and keep it, ``ready`` to be started.

        :param project: whose it is; it may use what this project has.
        :param owner: who has made it.
        :raises flame.errors.SpecError: something in it cannot be; nothing was written.
        """
        return (await self._submission.create(form, project, owner)).record

    async def update_job(self, id: str, form: JobForm) -> Job:
        """Write a job anew that was not started.

        :raises flame.errors.Conflict: it was started.
        """
        async with self._waking:
            saved = await self._saved(id)
            if saved.record.state is not JobState.READY:
                raise Conflict(
                    f"Job {saved.record.name!r} is {saved.record.state.value}; only a ready one can be changed."
                )
            await self._submission.replace(saved, form)
        return saved.record

    async def jobs(self, state: JobState | None = None, after: str | None = None, limit: int = 100) -> list[Job]:
        """The jobs, oldest first, without their rounds."""
        where = {"state": state.value} if state is not None else None
        found = await self.context.jobs.find(where, after=after, limit=limit)
        return [saved.record for saved in found]

    async def head(self, id: str) -> Job | None:
        """A job without its rounds, or None."""
        supervisor = self._active.get(id)
        if supervisor is not None:
            return supervisor.job
        saved = await self.context.jobs.get(id)
        return saved.record if saved is not None else None

    async def things_of(self, project: str) -> str:
        """What is in a project, in words; empty when nothing is."""
        context, within = self.context, {"project": project}
        counts = {
            "jobs": len(await context.jobs.all(within)),
            "designs": len(await context.designs.all(within)),
            "datasets": len(await context.datasets.all(within)),
        }
        return ", ".join(f"{count} {noun}" for noun, count in counts.items() if count)

    async def job(self, id: str) -> Job:
        """A job, with its rounds."""
        supervisor = self._active.get(id)
        if supervisor is not None:
            return supervisor.job
        saved = await self._saved(id)
        if saved.record.state.ended:
            saved.record.rounds = [
                msgspec.convert(event.data, Round)
                for event in await self.context.store.read(rounds_stream(id), limit=1_000_000)
            ]
        return saved.record

    async def start_job(self, id: str) -> Job:
        """Put a job in the queue.

        :raises flame.errors.Conflict: it was started before.
        """
        if self.draining:
            raise Conflict("This server is about to end and starts no jobs any more (flame serve --drain).")
        supervisor = await self._supervise(id)
        try:
            await supervisor.handle(Start())
        finally:
            if supervisor.state is JobState.READY:
                self._forget(supervisor)
        self.freed()
        return supervisor.job

    async def stop_job(self, id: str) -> Job:
        """End a job's workers, and the job.

        :raises flame.errors.Conflict: it was not started, or has ended.
        """
        supervisor = await self._supervise(id)
        try:
            await supervisor.handle(Stop())
        finally:
            if supervisor.state is JobState.READY:
                self._forget(supervisor)
        return supervisor.job

    async def pause_job(self, id: str) -> Job:
        """End a job's workers, and keep what they have reached.

        :raises flame.errors.Conflict: it is not under way.
        """
        supervisor = await self._supervise(id)
        try:
            await supervisor.handle(Pause())
        finally:
            if supervisor.state is JobState.READY:
                self._forget(supervisor)
        return supervisor.job

    async def resume_job(self, id: str) -> Job:
        """Put a paused job in the queue again.

        :raises flame.errors.Conflict: it is not paused.
        """
        supervisor = await self._supervise(id)
        try:
            await supervisor.handle(Resume())
        finally:
            if supervisor.state is JobState.READY:
                self._forget(supervisor)
        self.freed()
        return supervisor.job

    async def restart_job(self, id: str, from_round: int | None) -> Job:
        """Let a job begin again, from what it had kept.

        One that is under way is paused, set back and resumed; that is written down first, and goes on whoever still waits for it. One that has
        ended stays as it is: another one is made of it.

        :param from_round: behind which round; 0: from the beginning; None: behind the last that was kept.
        :raises flame.errors.Conflict: it was never started, or nothing was kept of this round, or it was paused or stopped before it could go on.
        """
        saved = await self._saved(id)
        if saved.record.state is JobState.READY:
            raise Conflict(
                f"Job {saved.record.name!r} is ready: it has not been started, so there is nothing to restart."
            )
        kept = rounds_of(await self.context.checkpoints.find(id))
        if from_round is not None and from_round not in (0, *kept):
            has = f"there are rounds {', '.join(map(str, kept))}" if kept else "there is none of it"
            raise Conflict(f"No checkpoint of round {from_round} of job {saved.record.name!r} is kept; {has}.")
        upto = max(kept, default=0) if from_round is None else from_round
        supervisor = self._active.get(id)
        if supervisor is None or supervisor.state.ended:
            # To its end, or there would be a job that nobody has started.
            beginning = asyncio.ensure_future(self._begin_anew(saved.record, upto))
            self._beginning.add(beginning)
            beginning.add_done_callback(self._beginning.discard)
            return await asyncio.shield(beginning)
        supervisor.restarted.clear()
        await supervisor.handle(Restart(upto))
        await supervisor.restarted.wait()
        if supervisor.state not in (JobState.STARTING, JobState.DEPLOYING, JobState.RUNNING, JobState.COMPLETED):
            raise Conflict(f"Job {saved.record.name!r} was paused or stopped before it could go on.")
        return supervisor.job

    async def _begin_anew(self, job: Job, upto: int) -> Job:
        """A job like one that has ended, which goes on behind a round of it."""
        made = (await self._submission.create(job.form, job.project, job.owner)).record
        before = {task.index: task.id for task in await self.tasks(job.id)}
        heirs = {task.id: before[task.index] for task in await self.tasks(made.id) if task.index in before}
        await self.context.checkpoints.inherit(made.id, heirs, job.id, upto)
        return await self.start_job(made.id)

    async def delete_job(self, id: str) -> None:
        """Remove a job with all that belongs to it.

        :raises flame.errors.Conflict: it is under way.
        """
        async with self._waking:
            saved = await self._saved(id)
            state = saved.record.state
            if id in self._active or not (state.ended or state is JobState.READY):
                raise Conflict(f"Job {saved.record.name!r} is {state.value}; stop it before you delete it.")
            context = self.context
            for task in await context.tasks.all({"jobId": id}):
                for attempt in range(1, task.record.attempt + 1):
                    await context.notifier.drop(task_stream(task.id, attempt))
                    info = WorkerInfo(task.id, id, attempt, task.record.worker or "")
                    await clean(context.computes, task.record.compute, info)
                await context.tasks.delete(task.id)
            await context.notifier.drop(job_stream(id))
            await context.store.drop(rounds_stream(id))
            await context.logs.remove(id)
            await context.artifacts.remove(id)
            await self.participants.forget(id)
            await context.checkpoints.remove(id)
            await context.jobs.delete(id)
        await self.catalog.release(saved.record.code)

    async def tasks(self, job: str) -> list[Task]:
        """A job's tasks, in the order of expansion."""
        supervisor = self._active.get(job)
        if supervisor is not None:
            return [public(task) for task in supervisor.tasks]
        await self._saved(job)
        found = sorted(await self.context.tasks.all({"jobId": job}), key=lambda saved: saved.record.index)
        return [public(saved.record) for saved in found]

    async def events(self, job: str, after: int = 0, *, follow: bool = False) -> AsyncGenerator[Sequence[Event], None]:
        """What happens in a job: what there is, and when following what comes, to its end.

        :raises flame.errors.NotFound: there is no such job.
        """
        saved = await self._saved(job)
        supervisor = self._active.get(job)
        over = saved.record.state.ended and (supervisor is None or supervisor.over.is_set())
        if follow and not over:
            return self.context.notifier.batches(job_stream(job), after, ends)
        return self._past(saved.record, after)

    async def _past(self, job: Job, after: int) -> AsyncGenerator[Sequence[Event], None]:
        """What has happened in a job so far."""
        stream = job_stream(job.id)
        last: Event | None = None
        while events := await self.context.store.read(stream, after=after):
            after, last = events[-1].seq, events[-1]
            yield events
        if (
            job.state.ended and last is not None and not ends(last)
        ):  # the server was killed before it could tell the end
            yield await self.context.notifier.publish_many(stream, [job_news(job)])

    @property
    def used(self) -> int:
        """How many workers there are, or have been promised room."""
        return self.computes.used

    def supervisor(self, job: str) -> Supervisor | None:
        """What sees to a job that is under way; None for any other."""
        return self._active.get(job)

    def active(self) -> list[Job]:
        """The jobs that are under way."""
        return [supervisor.job for supervisor in self._active.values()]

    async def stop_all(self) -> None:
        """Stop every job that is under way, and wait until all have ended and tidied up."""
        for supervisor in list(self._active.values()):
            try:
                await supervisor.handle(Stop())
            except Conflict:
                continue
        await self._quiet.wait()
        await self.context.background.drain()

    # ------------------------------------------------------------------------------------------------- tasks

    async def task(self, id: str) -> Task:
        """A task."""
        supervisor = self._of_task.get(id)
        if supervisor is not None:
            return public(supervisor.task(id))
        saved = await self.context.tasks.get(id)
        if saved is None:
            raise NotFound(f"There is no task {id!r}.")
        return public(saved.record)

    async def log(
        self, id: str, attempt: int | None, offset: int, *, follow: bool
    ) -> tuple[int, AsyncGenerator[bytes, None]]:
        """A task's log from a byte on.

        :param attempt: which start of the task; None: the newest, and when following, the first if there is none yet.
        :returns: the attempt, and its log; when following until its worker is gone. An empty piece means no news yet.
        :raises flame.errors.NotFound: the task was not started that often, or the offset is behind the end.
        """
        task = await self.task(id)
        if follow and task.attempt == 0 and attempt is None and not task.state.ended:
            async with aclosing(await self.events(task.job_id, follow=True)) as events:
                async for _ in events:
                    task = await self.task(id)
                    if task.attempt:
                        break
        attempt = max(task.attempt, 1) if attempt is None else attempt
        if not 1 <= attempt <= max(task.attempt, 1):
            raise NotFound(f"Task {id} has no attempt {attempt}; the newest is {task.attempt}.")
        size = await self.context.logs.size(task.job_id, id, attempt)
        if offset > size:
            raise NotFound(f"The log of task {id} has {size} bytes; there is nothing at {offset}.")
        return attempt, self.context.logs.read(task.job_id, id, attempt, offset=offset, follow=follow)

    async def end_task(self, id: str) -> Task:
        """End a task's worker; its job sees it fail.

        :raises flame.errors.Conflict: it has no worker.
        """
        supervisor = self._of_task.get(id)
        if supervisor is None:
            task = await self.task(id)
            raise Conflict(f"Task {id} has no worker to end: it is {task.state.value}.")
        await supervisor.handle(Kill(id))
        return public(supervisor.task(id))

    # ----------------------------------------------------------------------------------------------- the rest

    async def _saved(self, id: str) -> Saved[Job]:
        saved = await self.context.jobs.get(id)
        if saved is None:
            raise NotFound(f"There is no job {id!r}.")
        return saved

    async def _supervise(self, id: str) -> Supervisor:
        """The supervisor of a job; a job that has ended gets one for the moment, which refuses everything."""
        async with self._waking:
            supervisor = self._active.get(id)
            if supervisor is None:
                saved = await self._saved(id)
                tasks = sorted(await self.context.tasks.all({"jobId": id}), key=lambda task: task.record.index)
                supervisor = Supervisor(self.context, saved, tasks)
                if not saved.record.state.ended:
                    self._watch(supervisor)
            return supervisor

    def _watch(self, supervisor: Supervisor) -> None:
        self._quiet.clear()
        self._active[supervisor.id] = supervisor
        self._of_task.update(dict.fromkeys((task.id for task in supervisor.tasks), supervisor))

    def _forget(self, supervisor: Supervisor) -> None:
        self._active.pop(supervisor.id, None)
        for task in supervisor.tasks:
            self._of_task.pop(task.id, None)
        if not self._active:
            self._quiet.set()

    def _lease_lost(self, key: Any) -> None:
        job, task, attempt = key
        if job in self._active:
            self._active[job].silent(task, attempt)

    # ---------------------------------------------------------------------- as a tenant of computes

    def owns(self, worker: WorkerInfo) -> bool:
        """Whether a worker is one of a job that is under way."""
        supervisor = self._active.get(worker.job)
        return supervisor is not None and supervisor.owns(worker)

    def exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        """The runner has seen the end of a worker that nobody asked to end."""
        self._active[worker.job].exited(worker, how)

    def news(self, worker: WorkerInfo, message: str | None) -> None:
        """A compute says what a worker of a job waits for, or why it takes it away."""
        self._active[worker.job].news(worker, message)

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        """A compute is back, and has these workers of jobs."""
        for supervisor in self._active.values():
            supervisor.found(compute, [one for one in workers if one.job == supervisor.id], asked)

    def freed(self) -> None:
        """There may be room for others; look at it once, when what happens now has happened."""
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looking = False
        for supervisor in [one for one in self._active.values() if one.over.is_set()]:
            self._forget(supervisor)
            self.context.background.spawn(self.context.logs.archive(supervisor.id))
        if self.draining:
            if not any(one.admitted for one in self._active.values()):
                self.drained.set()
            return
        waiting = {one.id: one for one in self._active.values() if one.state is JobState.STARTING and not one.admitted}
        queue = [_place(supervisor) for supervisor in waiting.values()]
        decision = admit(queue, self.computes.rooms()) if queue else Decision({}, {})
        for job, chosen in decision.admitted.items():
            waiting[job].admit(chosen)
        self.computes.reserve(decision.reserved)
        for job, reason in decision.reasons.items():
            self.context.background.spawn(waiting[job].wait_for_room(reason))


def _place(supervisor: Supervisor) -> Waiting:
    job = supervisor.job
    return Waiting(job.id, priority(job.form.priority), job.started_at or 0.0, supervisor.needs())
