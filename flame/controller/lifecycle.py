"""The life of a job and its tasks: a pure function from a state and an event to a new state and actions.

There is no clock, socket or database in here, so that tests can drive it through any order of events. The
shell (:mod:`flame.controller.supervisor`) feeds it with what users ask, flamelets report and runners see, writes the
new state to the store, and only then carries out the actions.

States of a job, and what each one means:

* ``ready``: it exists, nobody has started it.
* ``starting``: its start was accepted; it waits for room on a compute.
* ``deploying``: workers were asked for, and some have not started their task's code yet.
* ``running``: every task's code has been started (some may have completed since). The time limit counts from the
  first one, that is, possibly from before this state.
* ``pausing``, ``paused``: its workers are being ended, or are gone, and it can be resumed from what they have kept.
* ``stopping``: its workers are being ended, because somebody asked for it or because something failed.
* ``completed``, ``failed``, ``terminated``: it ended. **No worker of it is left**: a job enters these states only
  when every worker that was ever asked for is known to be gone.

::

    ready -> starting -> deploying -> running -> completed
                 |           |           |
                 +-----------+-----------+----> stopping -> failed      where there is a failure
                                                         -> terminated  where there is none

    starting, deploying, running -> pausing -> paused -> starting        pausing, paused -> stopping

A restart is a pause that goes on by itself: what it shall go on behind is written with it.

A worker that is lost, or whose code is killed by a signal, is replaced by a new attempt, as often as its role's ``restart``
allows; the first time at once, then after a pause that doubles. Code that exits with an error of its own would do so again, so
that fails the task, unless ``restart.onError`` says otherwise. So does the loss of a worker that may not be replaced (any more).
A failed task fails the job, unless its role has a quorum (``policy.minTrainers`` for data-consuming roles,
``policy.minAggregators`` for others) that the rest of its workers still make. A job whose ``onFailure`` is ``pause`` is paused where
another would fail.

A task whose worker a participant brings is nobody's to start: it is ``ready`` until its participant claims it, and again
when the participant has left, which is no failure. No worker is started, and none is told to begin, before there are enough
participants for every role's quorum; from then on the job goes on without those who are missing, and they may come later.

Everything that follows from the tasks' states is derived in one place, :func:`settle`. So a server that was killed
between two writes finds its way again: it reads what is there, and settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec.structs import replace

from flame.controller.events import (
    Action,
    Admit,
    Ask,
    Begin,
    Claim,
    Clock,
    Completed,
    Connected,
    Delivered,
    Dismiss,
    End,
    Enter,
    Event,
    Expect,
    Failed,
    Gone,
    Kill,
    Missing,
    Owes,
    Pause,
    Release,
    Restart,
    Resume,
    Rewind,
    Rewound,
    Running,
    Silent,
    Start,
    Steady,
    Stop,
    Terminated,
    TimeUp,
    Warn,
)
from flame.controller.job_life import (
    JobLife,
    TaskLife,
    all_run,
    broken_role,
    gathered,
    left_behind,
    superfluous,
    too_late,
    work_is_done,
)
from flame.errors import Conflict
from flame.spec.nouns import Restart as RestartPolicy
from flame.spec.records import Failure, JobState, TaskState

#: How often a worker is replaced at least that was lost before it started its task's code.
REPLACEMENTS = 1
#: The longest pause before a worker is replaced, in seconds.
LONGEST_BACKOFF = 60.0

#: The legal changes of a job's state.
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.READY: frozenset({JobState.STARTING}),
        JobState.STARTING: frozenset({JobState.DEPLOYING, JobState.STOPPING, JobState.PAUSING}),
        JobState.DEPLOYING: frozenset({JobState.RUNNING, JobState.STOPPING, JobState.PAUSING}),
        JobState.RUNNING: frozenset({JobState.COMPLETED, JobState.STOPPING, JobState.PAUSING}),
        JobState.PAUSING: frozenset({JobState.PAUSED, JobState.STOPPING}),
        JobState.PAUSED: frozenset({JobState.STARTING, JobState.STOPPING}),
        JobState.STOPPING: frozenset({JobState.FAILED, JobState.TERMINATED}),
        JobState.COMPLETED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.TERMINATED: frozenset(),
    }
)


def step(job: JobLife, event: Event) -> tuple[JobLife, list[Action]]:
    """What an event does to a job.

    Reports about an older attempt, and about tasks that have ended, change nothing.

    :param job: the state before.
    :param event: what happened.
    :returns: the state after, and what is to be done once it is in the store, in order.
    :raises flame.errors.Conflict: the job's state does not allow what a user asks for.
    """
    actions: list[Action] = []
    match event:
        case Start():
            if job.state is not JobState.READY:
                raise Conflict(_not_startable(job))
            job = _enter(job, JobState.STARTING, actions)
        case Admit():
            if job.state is JobState.STARTING:
                job = _enter(job, JobState.DEPLOYING, actions)
        case Claim(task=id):
            job = _claim(job, job.tasks[id], actions)
        case Stop():
            if job.state is JobState.READY or job.state.ended:
                raise Conflict(_not_stoppable(job))
            idle = job.state in (JobState.PAUSING, JobState.PAUSED)
            if idle or (job.state is not JobState.STOPPING and not work_is_done(job)):
                job = _halt(job, None, "the job was stopped", actions)
        case Pause() if job.behind is not None:
            job = replace(job, behind=None)  # it is about to be paused, and shall stay so
        case Pause():
            if job.state not in (JobState.STARTING, JobState.DEPLOYING, JobState.RUNNING) or work_is_done(job):
                raise Conflict(_not_pausable(job))
            job = _pause(job, "the job is paused", actions)
        case Resume() if job.behind is not None:
            pass  # it is about to be
        case Resume():
            if job.state is not JobState.PAUSED:
                raise Conflict(f"Job {job.name!r} is {job.state.value}; only a paused one can be resumed.")
            job = _enter(replace(job, failure=None), JobState.STARTING, actions)
        case Restart(behind=behind):
            if job.state not in (JobState.PAUSING, JobState.PAUSED):
                if job.state not in (JobState.STARTING, JobState.DEPLOYING, JobState.RUNNING) or work_is_done(job):
                    raise Conflict(_not_restartable(job))
                job = _pause(job, "the job is restarted", actions)
            job = replace(job, behind=behind)
        case Rewound():
            if job.state is JobState.PAUSED and job.behind is not None:
                for task in job.tasks.values():
                    job = _set(job, _afresh(task))
                job = _enter(replace(job, failure=None, behind=None), JobState.STARTING, actions)
        case TimeUp(seconds=seconds):
            if job.state in (JobState.DEPLOYING, JobState.RUNNING) and not work_is_done(job):
                limit = Failure(message=f"The job ran longer than its maxRunTime of {seconds:g} s.")
                job = _halt(job, limit, "the job's time is up", actions)
        case Kill(task=id):
            task = job.tasks[id]
            if task.state not in (TaskState.DEPLOYING, TaskState.RUNNING):
                raise Conflict(f"Task {id} has no worker to end: it is {task.state.value}.")
            cause = Failure(message="Its worker was ended on request.")
            job = _fail(job, task, _named(cause, task), actions, parting=False)
        case Connected():  # nothing follows from it, and all workers of a large job say it in the same second
            return _report(job, event, actions), actions
        case _:
            job = _report(job, event, actions)
    return settle(job, actions)


def settle(job: JobLife, actions: list[Action] | None = None) -> tuple[JobLife, list[Action]]:
    """Bring the job's state up to what its tasks' states say. Settling twice is settling once.

    A recovering server calls it on what it has read; then it also finds the workers of ended tasks and asks
    them to end once more, because ``ending`` is empty.
    """
    actions = [] if actions is None else actions
    if job.state is JobState.DEPLOYING and gathered(job):
        for task in job.tasks.values():
            if task.state is TaskState.READY and not task.brought:
                job = _ask(job, task, actions)
    if job.state in (JobState.DEPLOYING, JobState.RUNNING):
        for task in superfluous(job):
            job = _ran(job, replace(task, state=TaskState.COMPLETED), actions)
            if task.state is TaskState.DEPLOYING:  # there is nothing that it could still have to say
                job = _end(job, job.tasks[task.id], "its task is done without it", actions)
        for task in left_behind(job):
            actions.append(Dismiss(task.id, task.attempt))
            job = _set(job, replace(task, told=task.attempt))
        for task in job.tasks.values():
            if task.state.ended:
                job = _end(job, job.tasks[task.id], "its task has ended", actions, parting=True)
        broken = broken_role(job)
        if broken is not None:
            job = _halt(job, broken.failure, f"task {broken.id} ({broken.role}) failed", actions)
        elif job.state is JobState.DEPLOYING and all_run(job):
            job = _enter(job, JobState.RUNNING, actions)
    if job.state is JobState.RUNNING and work_is_done(job) and not any(task.live for task in job.tasks.values()):
        for task in job.tasks.values():
            if task.waits:  # it was done without
                job = _set(job, replace(task, state=TaskState.TERMINATED))
        job = _enter(job, JobState.COMPLETED, actions)
    if job.state is JobState.PAUSING:
        for task in job.tasks.values():
            if task.live:
                job = _end(job, task, "the job is paused", actions)
        if not any(task.live for task in job.tasks.values()):
            for task in job.tasks.values():
                if task.state is not TaskState.COMPLETED:
                    job = _set(job, _afresh(task))
            job = _enter(replace(job, clock=False), JobState.PAUSED, actions)
    if job.state is JobState.PAUSED and job.behind is not None:
        actions.append(Rewind(job.behind))
    if job.state is JobState.STOPPING:
        for task in job.tasks.values():
            if task.live:
                job = _end(job, task, "the job is stopping", actions)
            elif not task.state.ended:
                job = _set(job, replace(task, state=TaskState.TERMINATED))
        if not any(task.live for task in job.tasks.values()):
            job = _enter(job, JobState.TERMINATED if job.failure is None else JobState.FAILED, actions)
    return job, actions


def _report(job: JobLife, event: Event, actions: list[Action]) -> JobLife:
    """What is reported or seen of one worker."""
    assert isinstance(
        event,
        Steady | Delivered | Owes | Connected | Running | Completed | Failed | Terminated | Silent | Gone | Missing,
    )
    task = job.tasks[event.task]
    if task.brought and event.attempt not in task.live:
        return job  # it has left, or its place is taken
    if isinstance(event, Gone | Missing):
        task = replace(task, live=task.live - {event.attempt}, ending=task.ending - {event.attempt})
        job = _set(job, task)
    if event.attempt != task.attempt or task.state.ended or task.state is TaskState.READY or job.state.ended:
        return job
    match event:
        case Delivered():
            job = _set(job, replace(task, delivered=True))
        case Owes():
            job = _set(job, replace(task, owes=True))
        case Steady():
            job = _set(job, replace(task, replaced=0))
        case Connected() if not task.connected:
            job = _set(job, replace(task, connected=True))
            if job.state in (JobState.DEPLOYING, JobState.RUNNING) and gathered(job):
                actions.append(Begin(task.id, task.attempt))
        case Running() if task.state is TaskState.DEPLOYING:
            job = _ran(job, replace(task, state=TaskState.RUNNING, connected=True), actions)
        case Completed():
            job = _ran(job, replace(task, state=TaskState.COMPLETED, connected=True), actions)
        case Failed() | Terminated() | Silent() | Gone() | Missing() if job.state is JobState.PAUSING:
            pass  # it is to run again, whatever became of it
        case Failed(failure=failure):
            if _replaceable(job, task, event):
                job = _replace(job, task, failure, actions, parting=True)
            elif too_late(job, task):
                actions.append(Warn(f"Task {task.id} ({task.role}) failed when the work was done: {failure.message}"))
                job = _ran(job, replace(task, state=TaskState.COMPLETED), actions)
            else:
                job = _fail(job, task, failure, actions, parting=True)
        case Missing() if not task.brought and job.state is not JobState.STOPPING and task.state is TaskState.DEPLOYING:
            job = _ask(job, task, actions)
        case Terminated(failure=failure) | Silent(failure=failure) | Gone(failure=failure) | Missing(failure=failure):
            if job.state is JobState.STOPPING:
                job = _set(job, replace(task, state=TaskState.TERMINATED))
            elif task.brought:
                job = _release(job, _afresh(task), actions)
            elif _replaceable(job, task, event):
                job = _replace(job, task, failure, actions, parting=False)
            else:
                job = _fail(job, task, failure, actions, parting=False)
        case _:
            pass
    return job


def _replaceable(job: JobLife, task: TaskLife, event: Failed | Terminated | Silent | Gone | Missing) -> bool:
    """Whether another worker is to take the place of one that is lost or has failed."""
    if job.state not in (JobState.DEPLOYING, JobState.RUNNING):
        return False
    policy = job.restart.get(task.role, RestartPolicy())
    if isinstance(event, Failed) and event.failure.signal is None and not policy.on_error:
        return False
    least = REPLACEMENTS if task.state is TaskState.DEPLOYING and not isinstance(event, Failed | Terminated) else 0
    return task.replaced < max(policy.attempts, least)


def _replace(job: JobLife, task: TaskLife, failure: Failure, actions: list[Action], *, parting: bool) -> JobLife:
    """Start the task again, under the next attempt. A participant's is free again: it starts its worker itself."""
    if task.brought:
        return _release(job, replace(_afresh(task), replaced=task.replaced + 1), actions)
    policy = job.restart.get(task.role, RestartPolicy())
    delay = min(LONGEST_BACKOFF, policy.backoff * 2.0 ** (task.replaced - 1)) if task.replaced else 0.0
    job = _end(job, task, "its worker is lost", actions, parting=parting)
    if task.state is not TaskState.DEPLOYING:
        again = f"is started again (attempt {task.attempt + 1})"
        actions.append(Warn(f"Task {task.id} ({task.role}) {again}: {failure.message}"))
    return _ask(job, replace(job.tasks[task.id], replaced=task.replaced + 1), actions, delay)


def _ask(job: JobLife, task: TaskLife, actions: list[Action], delay: float = 0.0) -> JobLife:
    attempt = task.attempt + 1
    actions.append(Ask(task.id, attempt, delay))
    asked = replace(task, state=TaskState.DEPLOYING, attempt=attempt, connected=False, live=task.live | {attempt})
    return _set(job, asked)


def check_claim(job: JobLife, task: TaskLife) -> None:
    """Whether a participant may take a task.

    :raises flame.errors.Conflict: there is nothing to take part in.
    """
    if not task.brought or task.state.ended or job.state not in (JobState.DEPLOYING, JobState.RUNNING):
        raise Conflict(_not_claimable(job, task))
    if any(one.state is TaskState.COMPLETED for one in job.tasks.values()):
        raise Conflict(f"Job {job.name!r} has had its last round: it takes nobody any more.")


def _claim(job: JobLife, task: TaskLife, actions: list[Action]) -> JobLife:
    """A participant takes a task. A worker of an earlier attempt is fenced off: only its owner can end it."""
    check_claim(job, task)
    before = gathered(job)
    job = _release(job, task, actions)
    attempt = task.attempt + 1
    actions.append(Expect(task.id, attempt))
    claimed = replace(
        task,
        state=TaskState.DEPLOYING,
        attempt=attempt,
        connected=False,
        live=frozenset({attempt}),
        ending=frozenset(),
    )
    job = _set(job, claimed)
    if not before and gathered(job):
        actions.extend(Begin(one.id, one.attempt) for one in job.tasks.values() if one.connected and one.live)
    return job


def _release(job: JobLife, task: TaskLife, actions: list[Action]) -> JobLife:
    actions.extend(Release(task.id, attempt) for attempt in sorted(task.live))
    return _set(job, replace(task, live=frozenset(), ending=frozenset()))


def _ran(job: JobLife, task: TaskLife, actions: list[Action]) -> JobLife:
    if not job.clock:
        actions.append(Clock())
        job = replace(job, clock=True)
    return _set(job, task)


def _fail(job: JobLife, task: TaskLife, failure: Failure, actions: list[Action], *, parting: bool) -> JobLife:
    """The task failed; the job goes on where the others of its role make the quorum."""
    task = replace(task, state=TaskState.FAILED, failure=failure)
    job = _end(_set(job, task), task, "its task failed", actions, parting=parting)
    if job.state in (JobState.DEPLOYING, JobState.RUNNING):
        if broken_role(job) is None:
            actions.append(Warn(f"Task {task.id} ({task.role}) failed, the job goes on without it: {failure.message}"))
        else:
            job = _halt(job, failure, f"task {task.id} ({task.role}) failed", actions)
    return job


def _pause(job: JobLife, reason: str, actions: list[Action]) -> JobLife:
    job = _enter(job, JobState.PAUSING, actions)
    for task in job.tasks.values():
        job = _end(job, task, reason, actions)
    return job


def _afresh(task: TaskLife) -> TaskLife:
    """A task that nothing is left of, as if it had never run; but its attempts are counted on."""
    return replace(task, state=TaskState.READY, connected=False, replaced=0, delivered=False, failure=None)


def _halt(job: JobLife, failure: Failure | None, reason: str, actions: list[Action]) -> JobLife:
    if failure is not None and job.pauses:
        return _pause(replace(job, failure=failure), reason, actions)
    job = _enter(replace(job, failure=job.failure or failure, behind=None), JobState.STOPPING, actions)
    for task in job.tasks.values():
        job = _end(job, task, reason, actions)
    return job


def _end(job: JobLife, task: TaskLife, reason: str, actions: list[Action], *, parting: bool = False) -> JobLife:
    """Ask each worker of the task to end that was not asked yet."""
    waiting = task.live - task.ending
    if not waiting:
        return job
    actions.extend(End(task.id, attempt, reason, parting) for attempt in sorted(waiting))
    return _set(job, replace(task, ending=task.ending | waiting))


def _enter(job: JobLife, state: JobState, actions: list[Action]) -> JobLife:
    assert state in TRANSITIONS[job.state], f"{job.state} -> {state}"
    actions.append(Enter(state))
    return replace(job, state=state)


def _set(job: JobLife, task: TaskLife) -> JobLife:
    return replace(job, tasks={**job.tasks, task.id: task})


def _named(failure: Failure, task: TaskLife) -> Failure:
    failure.task, failure.role, failure.attempt = task.id, task.role, task.attempt
    return failure


def _not_claimable(job: JobLife, task: TaskLife) -> str:
    if job.state.ended or job.state is JobState.STOPPING:
        return f"Job {job.name!r} is {job.state.value}: there is nothing to take part in any more."
    if task.state.ended:
        return f"Task {task.id} has ended ({task.state.value}); it cannot be taken again."
    if not task.brought:
        return f"Task {task.id} is not for participants: Flame starts its worker."
    return f"Job {job.name!r} is {job.state.value}: it does not take participants yet."


def _not_startable(job: JobLife) -> str:
    if job.state.ended:
        return f"Job {job.name!r} has ended ({job.state.value}) and cannot be started again; create a new one."
    return f"Job {job.name!r} is {job.state.value}: it has been started already."


def _not_pausable(job: JobLife) -> str:
    if job.state.ended:
        return f"Job {job.name!r} has ended ({job.state.value}): there is nothing to pause."
    if job.state in (JobState.DEPLOYING, JobState.RUNNING):
        return f"Job {job.name!r} has done its work and is about to end: there is nothing to pause."
    return f"Job {job.name!r} is {job.state.value}: there is nothing to pause."


def _not_restartable(job: JobLife) -> str:
    if job.state in (JobState.DEPLOYING, JobState.RUNNING):
        return f"Job {job.name!r} has done its work and is about to end; restart it when it has ended."
    return f"Job {job.name!r} is {job.state.value}: it cannot be restarted now."


def _not_stoppable(job: JobLife) -> str:
    if job.state.ended:
        return f"Job {job.name!r} has ended ({job.state.value}): there is nothing to stop."
    return f"Job {job.name!r} is {job.state.value}: it has not been started, so there is nothing to stop."
