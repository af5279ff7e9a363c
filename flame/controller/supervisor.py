"""The shell around one job's life: it hears what happens, writes what follows, then makes it so.

A supervisor exists for each job that was started and has not ended. It holds the job's records and its
:class:`~flame.controller.job_life.JobLife`. Whatever happens goes through :meth:`Supervisor.handle`, one event
at a time: the pure step, the changed records into the store, the news into the job's stream, and then the actions,
which run beside. If the store fails, nothing has happened: memory is changed only after the store is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flame.controller import events, lifecycle
from flame.controller.bookkeeping import (
    Entry,
    History,
    job_fields,
    job_news,
    life_of,
    task_fields,
    task_news,
    task_stream,
    with_workers,
)
from flame.controller.computes import clean
from flame.controller.context import Context, StoredTask, log
from flame.controller.hearing import Hearing
from flame.controller.job_life import JobLife
from flame.controller.ledger import Ledger, surely
from flame.controller.moments import seconds_since
from flame.controller.placement import Need, need_of, placement_of
from flame.controller.rendezvous import Rendezvous
from flame.controller.shelf import Saved
from flame.controller.workers import Crew, Worker, too_late
from flame.errors import Forbidden
from flame.runners.base import WorkerExit, WorkerInfo
from flame.spec.nouns import Placement
from flame.spec.records import Failure, Job, JobState, TaskState

#: Who has run for so long counts as steady: the losses before are forgotten.
STEADY_SECONDS = 600.0


class Supervisor:
    """One job that is under way.

    :param context: the controller's surroundings.
    :param job: the job's record.
    :param tasks: its tasks' records, in the order of expansion.
    :param history: what its stream says, for a job that an earlier process of the server has begun.
    """

    def __init__(
        self, context: Context, job: Saved[Job], tasks: Sequence[Saved[StoredTask]], history: History | None = None
    ) -> None:
        form = job.record.form
        assert form.schema is not None
        self._context = context
        self._ledger = Ledger(context, job, tasks, history)
        self._life = life_of(job.record, [task.record for task in tasks])
        self._lock = asyncio.Lock()
        self._clock: asyncio.TimerHandle | None = None
        self._rendezvous = Rendezvous(job.id, form.schema.channels, context.store, self._tell_peers)
        self._schema = form.schema
        self._crew = Crew(
            context,
            job.id,
            form.model_spec.dependencies,
            self._placement_of,
            happened=self.handle_surely,
            placed=self._placed,
        )
        self.hearing = Hearing(
            context,
            self._ledger,
            self._crew,
            self._rendezvous,
            self._lock,
            worker=self.worker,
            happened=self.handle,
        )
        self._places: dict[str, str] = {}
        self.admitted = job.record.state not in (JobState.READY, JobState.STARTING, JobState.PAUSED)
        self.restarted = asyncio.Event()
        self.over = asyncio.Event()

    # ------------------------------------------------------------------------------------------- what is known

    @property
    def id(self) -> str:
        """The job's id."""
        return self._ledger.id

    @property
    def state(self) -> JobState:
        """The job's state."""
        return self._life.state

    @property
    def job(self) -> Job:
        """The job's record, with its rounds so far."""
        return self._ledger.whole_job

    @property
    def tasks(self) -> list[StoredTask]:
        """The tasks' records, in the order of expansion."""
        return self._ledger.tasks

    def task(self, id: str) -> StoredTask:
        """One task's record."""
        return self._ledger.task(id)

    def needs(self) -> list[Need]:
        """The places that its workers need when it is admitted; participants bring theirs."""
        tasks = self._life.tasks.values()
        return [self._need(task.id) for task in tasks if task.state is TaskState.READY and not task.brought]

    def owns(self, info: WorkerInfo) -> bool:
        """Whether a worker is one of this job's."""
        return info.job == self.id and info.task in self._life.tasks

    def waits(self, task: str) -> bool:
        """Whether a task waits for its participant."""
        return self._life.tasks[task].waits

    def worker(self, task: str, attempt: int) -> Worker:
        """The worker that speaks for this attempt.

        :raises flame.errors.Forbidden: there is a newer attempt, there never was this one, or its worker is gone.
        """
        newest = self._life.tasks[task].attempt
        worker = self._crew.get(task, attempt)
        if attempt != newest or worker is None:
            raise too_late(task, attempt, f"the newest is {newest}")
        if worker.gone.is_set():
            raise too_late(task, attempt)
        return worker

    # ------------------------------------------------------------------------------------------ what happens

    async def handle(self, event: events.Event) -> None:
        """Let something happen to the job.

        :raises flame.errors.Conflict: the job's state does not allow what a user asks for.
        :raises flame.errors.StoreError: nothing has happened, because it could not be written.
        """
        async with self._lock:
            life, before = self._life, list[events.Action]()
            if isinstance(event, events.Failed | events.Terminated | events.Silent | events.Gone):
                worker = self._crew.get(event.task, event.attempt)
                now = asyncio.get_running_loop().time()
                if worker is not None and worker.since is not None and now - worker.since > STEADY_SECONDS:
                    life, before = lifecycle.step(life, events.Steady(event.task, event.attempt))
            after, actions = lifecycle.step(life, event)
            await self._commit(after, before + actions)

    async def handle_surely(self, event: events.Event) -> None:
        """Let something happen that nobody will say again: while the store fails, try again."""
        await surely(partial(self.handle, event), self.id)

    def check_claim(self, task: str) -> None:
        """Whether a participant may take a task now.

        :raises flame.errors.Conflict: there is nothing to take part in.
        """
        lifecycle.check_claim(self._life, self._life.tasks[task])

    async def claim(self, task: str, **holder: str | None) -> None:
        """A participant takes a task, or takes it anew.

        :param holder: what is written down about the participant.
        :raises flame.errors.Conflict: there is nothing to take part in.
        """
        async with self._lock:
            after, actions = lifecycle.step(self._life, events.Claim(task))
            await self._ledger.save_task(task, **holder)
            await self._commit(after, actions)

    async def evict(self, task: str, message: str) -> None:
        """A participant may not take part any more: its worker is told, and its place is free."""
        life = self._life.tasks[task]
        if life.live:
            await self._tell(task, life.attempt, "stop", {"reason": message})
            await self.handle(events.Terminated(task, life.attempt, self._cause(task, life.attempt, message)))
        async with self._lock:
            await self._ledger.save_task(task, participant=None, holder=None, invite=None)

    def admit(self, chosen: Mapping[str, str]) -> None:
        """There is room for all of its workers: take it, and start them.

        :param chosen: the compute for each task.
        """
        self.admitted = True
        self._places = dict(chosen)
        for task, compute in chosen.items():
            self._hold(task, self._life.tasks[task].attempt + 1, compute)
        self._context.background.spawn(self.handle_surely(events.Admit()))

    async def resume(self, workers: Mapping[WorkerInfo, str], history: History) -> None:
        """Go on with a job that an earlier process of the server has begun.

        Where a compute cannot be reached, its workers are taken to be there: they are waited for, as long as any lease.

        :param workers: those of this job that there really are, and on which compute each is.
        :param history: what the job's stream says.
        """
        there: dict[tuple[str, int], tuple[WorkerInfo, str] | None] = {
            (info.task, info.attempt): (info, compute) for info, compute in workers.items()
        }
        for task in self.tasks:
            known = (task.id, task.attempt) in there or task.state.ended or not task.attempt
            if not known and task.compute and not self._context.computes.reachable(task.compute):
                presumed = WorkerInfo(task.id, self.id, task.attempt, task.worker or "")
                there[task.id, task.attempt] = (presumed, task.compute)
            # Nobody can list what participants have; if one is not there, its lease will tell.
            if task.config.from_user and task.state in (TaskState.DEPLOYING, TaskState.RUNNING):
                there[task.id, task.attempt] = None
        await self._rendezvous.load()
        read = await asyncio.gather(*(self._context.store.read(task_stream(*key)) for key in there))
        told = dict(zip(there, read, strict=True))
        begun = {key for key, stream in told.items() if any(event.type == "start" for event in stream)}
        # From here to the next await nothing can end in between.
        for key, found in there.items():
            if found is None:
                worker = self._crew.welcome(*key)
                options = self._context.options
                self._context.leases.begin((self.id, *key), max(options.lease, options.reunion))
                worker.heard = True
            else:
                info, compute = found
                self._hold(info.task, info.attempt, compute)
                worker = self._crew.adopt(info, self._life.tasks[info.task].role, compute)
            worker.acked = history.heard.get(key, 0)
            worker.begun = key in begun
        self._life = with_workers(self._life, set(there), begun)
        await surely(lambda: self._ledger.publish(history.untold(self._ledger.job, self.tasks)), self.id)
        for one in list(self._life.tasks.values()):
            for attempt in one.live - {one.attempt}:
                self._crew.end(one.id, attempt, one.role, parting=False)
            if one.attempt and not one.state.ended and one.attempt not in one.live:
                cause = self._cause(one.id, one.attempt, "Its worker ended while the server was down.")
                await self.handle_surely(events.Missing(one.id, one.attempt, cause))
        async with self._lock:
            await self._commit(*lifecycle.settle(self._life))
        if self._life.clock and not self._life.state.ended:
            self._wind_clock()

    async def wait_for_room(self, reason: str) -> None:
        """The queue says why the job has to wait."""
        async with self._lock:
            if self.state is JobState.STARTING and self._ledger.job.reason != reason:
                await self._ledger.save_job(reason=reason)
                await self._ledger.publish([job_news(self._ledger.job)])

    async def connected(self, task: str, attempt: int) -> None:
        """A flamelet follows its events."""
        worker = self.worker(task, attempt)
        if not worker.heard:
            worker.heard = True
            self._context.leases.begin((self.id, task, attempt))
        if not self._life.tasks[task].connected:
            await self.handle(events.Connected(task, attempt))

    def silent(self, task: str, attempt: int) -> None:
        """A worker's lease ran out."""
        worker = self._crew.get(task, attempt)
        options, word = self._context.options, self._crew.word(task, attempt)
        if word is not None and not self._crew.heard(task, attempt):
            # It waits to be started: for how long, its compute decides.
            self._context.leases.begin((self.id, task, attempt), options.deploy)
            return
        if worker is not None and worker.heard:
            message = f"Nothing has been heard of its worker for {options.lease:g} s." + (f" {word}" if word else "")
        else:
            message = f"Its worker has not connected within {options.deploy:g} s."
        log.warning("job %s: task %s: %s", self.id, task, message)
        event = events.Silent(task, attempt, self._cause(task, attempt, message))
        self._context.background.spawn(self.handle_surely(event))

    def exited(self, info: WorkerInfo, how: WorkerExit) -> None:
        """The runner has seen the end of a worker that nobody asked to end."""
        self._crew.exited(info, how, self._life.tasks[info.task].role)

    def news(self, info: WorkerInfo, message: str | None) -> None:
        """The compute says what a worker waits for, or why it takes it away; None when neither."""
        before = self._crew.hear(info, message)
        if message != before:
            self._context.background.spawn(self._explain(info, message, before))

    async def _explain(self, info: WorkerInfo, message: str | None, before: str | None) -> None:
        async with self._lock:
            task, life = self._ledger.task(info.task), self._life.tasks[info.task]
            if life.attempt != info.attempt or life.state.ended or (message is None and task.reason != before):
                return
            await self._ledger.save_task(info.task, reason=message)
            await self._ledger.publish([task_news(self._ledger.task(info.task))])

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        """A compute is back, and has these workers of this job."""
        self._crew.found(compute, workers, asked, lambda task: self._life.tasks[task].role)

    def check_artifact(self, task: str, name: str) -> None:
        """Whether a worker may hand in an artifact of this name.

        :raises flame.errors.Forbidden: it is a participant's, and a worker of the job's own in another role has handed in one of
            that name: a trainer from elsewhere does not replace the aggregator's model.
        """
        mine = self._ledger.task(task)
        if mine.config.from_user and any(
            name in one.handed_in and one.role != mine.role and not one.config.from_user for one in self.tasks
        ):
            raise Forbidden(f"The artifact {name!r} is another worker's; a participant cannot replace it.")

    async def hand_in(self, task: str, name: str) -> None:
        """A worker is about to hand in an artifact.

        :raises flame.errors.Forbidden: see :meth:`check_artifact`.
        """
        async with self._lock:
            self.check_artifact(task, name)
            known = self._ledger.task(task).handed_in
            if name not in known:
                await self._ledger.save_task(task, handed_in=[*known, name])

    def _placement_of(self, role: str) -> Placement:
        return placement_of(self._ledger.job.form, self._schema, role)

    def _need(self, task: str) -> Need:
        config = self._ledger.task(task).config
        return need_of(self._ledger.job.form, self._schema, config)

    def _hold(self, task: str, attempt: int, compute: str) -> None:
        self._context.computes.hold((self.id, task, attempt), compute, self._need(task).load)

    def _cause(self, task: str, attempt: int, message: str) -> Failure:
        tail = self._context.logs.tail(self.id, task, attempt)
        role = self._life.tasks[task].role
        return Failure(message=message, task=task, role=role, attempt=attempt, log=tail)

    # ----------------------------------------------------------------------------------- what follows from it

    async def _commit(self, after: JobLife, actions: Sequence[events.Action]) -> None:
        """Write what has changed, tell it, and act. Called with the lock held."""
        now, before = time.time(), self._life
        states = [action.state for action in actions if isinstance(action, events.Enter)]
        changed = [task for task in after.tasks.values() if task is not before.tasks[task.id]]
        fields = {task.id: values for task in changed if (values := task_fields(before.tasks[task.id], task, now))}
        asked = [action for action in actions if isinstance(action, events.Ask)]
        for ask in asked:
            fields[ask.task]["compute"] = self._places.get(ask.task) or self._elsewhere(ask.task)
        if after.state.ended and states:
            await self._ledger.keep_rounds()
            await self._ledger.note_end()
        await self._ledger.save_tasks(fields)
        await self._ledger.save_job(**job_fields(self._ledger.job, before, after, actions, now))
        # It is in the store, so it has happened: from here on nothing may fail.
        self._life = after
        if before.behind is not None and after.behind is None:
            self.restarted.set()
        for ask in asked:
            self._places.pop(ask.task, None)
            self._hold(ask.task, ask.attempt, fields[ask.task]["compute"])
        for task in changed:
            was = before.tasks[task.id]
            for attempt in was.live - task.live:
                self._context.computes.give((self.id, task.id, attempt))
            if was.attempt < task.attempt:
                late = too_late(task.id, was.attempt, f"the newest is {task.attempt}")
                self._context.standing.end(("task", task.id, was.attempt), late)
        news: list[Entry] = [("warning", {"message": one.message}) for one in actions if isinstance(one, events.Warn)]
        news += [task_news(self._ledger.task(task)) for task in fields]
        news += [job_news(self._ledger.job, state) for state in states]
        await surely(lambda: self._ledger.publish(news), self.id)
        for state in states:
            log.info("job %s (%s) is %s", self.id, self._ledger.job.name, state.value)
        for action in actions:
            self._act(action)
        for task in changed:
            was = before.tasks[task.id]
            over = (task.state.ended and not was.state.ended) or (task.state is TaskState.READY is not was.state)
            if (over or 0 < was.attempt < task.attempt) and not after.state.ended:
                upto = task.attempt if over else was.attempt
                self._context.background.spawn(surely(partial(self._rendezvous.depart, task.id, upto), self.id))
        if after.state.ended and states:
            self._conclude()

    def _act(self, action: events.Action) -> None:
        context = self._context
        match action:
            case events.Ask(task=task, attempt=attempt, delay=delay):
                compute = self._ledger.task(task).compute or ""
                self._crew.begin(task, attempt, self._life.tasks[task].role, compute, delay=delay)
            case events.Expect(task=task, attempt=attempt):
                self._crew.welcome(task, attempt)
            case events.Release(task=task, attempt=attempt):
                self._crew.release(task, attempt)
                context.background.spawn(context.notifier.drop(task_stream(task, attempt)))
            case events.Begin(task=task, attempt=attempt):
                context.background.spawn(self._tell(task, attempt, "start", {"attempt": attempt}))
            case events.End(task=task, attempt=attempt, reason=reason, parting=parting):
                if not parting:
                    context.background.spawn(self._tell(task, attempt, "stop", {"reason": reason}))
                self._crew.end(task, attempt, self._life.tasks[task].role, parting=parting)
            case events.Dismiss(task=task, attempt=attempt):
                context.background.spawn(self._tell(task, attempt, "done", {}))
            case events.Clock():
                self._wind_clock()
            case events.Warn(message=message):
                log.warning("job %s: %s", self.id, message)
            case events.Enter(state=JobState.PAUSED):
                self._rest()
            case events.Rewind():
                context.background.spawn(surely(self._rewind, self.id))
            case events.Enter():
                pass

    def _rest(self) -> None:
        """The job is paused: its room is others' now, and its time does not count."""
        self.admitted = False
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        self._forgo()

    async def _rewind(self) -> None:
        """Set the job back, unless that is done already or no longer wanted: then there may be new workers, with what they have reached."""
        async with self._lock:
            if self.state is JobState.PAUSED and self._life.behind is not None:
                await self._context.checkpoints.forget(self.id, self._life.behind)
                await self._commit(*lifecycle.step(self._life, events.Rewound()))
                self._context.computes.changed()

    def _forgo(self) -> None:
        """Give back what room was promised and has not been used."""
        self._places.clear()
        for task in self._life.tasks.values():
            self._context.computes.give((self.id, task.id, task.attempt + 1))
        self._context.computes.changed()

    def _conclude(self) -> None:
        """The job has ended: let go of all that only a running job needs."""
        if self._clock is not None:
            self._clock.cancel()
        self.over.set()
        self._forgo()
        self._context.background.spawn(self.tidy())

    async def tidy(self) -> None:
        """Remove what the job needed while it was under way, and what its workers have left: also those that ended under earlier servers."""
        context = self._context
        await self._rendezvous.clear()
        for task in self.tasks:
            for attempt in range(1, task.attempt + 1):
                await context.notifier.drop(task_stream(task.id, attempt))
                worker = self._crew.get(task.id, attempt)
                compute = task.compute if worker is None else worker.compute
                if compute and self.state is JobState.COMPLETED:
                    info = worker.info if worker is not None else None
                    await clean(context.computes, compute, info or WorkerInfo(task.id, self.id, attempt, ""))
        await self._ledger.forget_end()

    def _wind_clock(self) -> None:
        job = self._ledger.job
        limit = job.form.max_run_time
        if limit is not None and job.running_at is not None and self._clock is None:
            left = max(0.0, limit - seconds_since(job.running_mark, job.running_at))
            self._clock = asyncio.get_running_loop().call_later(left, self._time_is_up, limit)

    def _time_is_up(self, limit: float) -> None:
        self._context.background.spawn(self.handle_surely(events.TimeUp(limit)))

    async def _placed(self, info: WorkerInfo) -> None:
        async with self._lock:
            if self._life.tasks[info.task].attempt == info.attempt:
                await self._ledger.save_task(info.task, worker=info.handle)

    def _elsewhere(self, task: str) -> str:
        last = self._ledger.task(task).compute
        return self._context.computes.elsewhere(self._need(task), last, self._crew.shunned)

    async def _tell(self, task: str, attempt: int, type: str, data: dict[str, Any]) -> None:
        worker = self._crew.get(task, attempt)
        if worker is None or worker.gone.is_set():
            return
        if type == "start":
            if worker.begun:
                return
            worker.begun = True
        await self._context.notifier.publish(task_stream(task, attempt), type, data)

    async def _tell_peers(self, task: str, data: dict[str, Any]) -> None:
        await self._tell(task, self._life.tasks[task].attempt, "peers", data)
