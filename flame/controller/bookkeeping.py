"""How the life of a job is written down and told: from states to the fields of records, to events, and back.

The records and streams are what the world sees and what a restarted server starts from; the
:class:`~flame.controller.job_life.JobLife` is what decides. This module translates between the two, and does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
from msgspec.structs import replace

from flame.controller.context import StoredTask
from flame.controller.events import Action, Clock, Enter, Warn
from flame.controller.job_life import JobLife, TaskLife, missing, quorums
from flame.controller.moments import mark
from flame.spec.nouns import RoundPolicy
from flame.spec.records import Event, Job, JobState, Round, Task, TaskState

#: The most warnings that are kept with a job; more of them go into its stream alone.
WARNINGS = 100

Entry = tuple[str, dict[str, Any]]


def job_stream(job: str) -> str:
    """The name of the stream of all that happens in a job."""
    return f"job/{job}"


def rounds_stream(job: str) -> str:
    """The name of the stream of an ended job's rounds."""
    return f"rounds/{job}"


def task_stream(task: str, attempt: int) -> str:
    """The name of the stream that a flamelet follows."""
    return f"task/{task}.{attempt}"


def life_of(job: Job, tasks: Sequence[StoredTask]) -> JobLife:
    """What decides about a job, from its records. Which workers there are is not in them."""
    assert job.form.schema is not None
    consumers = {role.name for role in job.form.schema.roles if role.is_data_consumer}
    parts = parts_of(tasks)
    return JobLife(
        name=job.name,
        state=job.state,
        tasks=MappingProxyType(
            {
                task.id: TaskLife(
                    id=task.id,
                    role=task.role,
                    state=task.state,
                    attempt=task.attempt,
                    connected=task.state is not TaskState.DEPLOYING and task.attempt > 0,
                    replaced=task.replaced,
                    delivered=task.delivered,
                    owes=task.owes,
                    part=parts[task.id],
                    failure=task.failure,
                    brought=task.config.from_user,
                )
                for task in tasks
            }
        ),
        quorum=quorums(
            [(task.role, task.role in consumers) for task in tasks],
            fewest_of(job.form.policy),
            job.form.policy.min_aggregators,
        ),
        clock=job.running_at is not None,
        failure=job.failure,
        restart={role.name: job.form.restart.of(role.name) for role in job.form.schema.roles},
        consumers=frozenset(consumers),
        pauses=job.form.on_failure == "pause",
        behind=job.restart_behind,
    )


def parts_of(tasks: Sequence[Task]) -> dict[str, str]:
    """For each task the part of the job that it is in, named after one of the part's: who meets on a channel is in one part."""
    part = {task.id: task.id for task in tasks}

    def first(task: str) -> str:
        while part[task] != task:
            task = part[task] = part[part[task]]
        return task

    rooms: dict[tuple[str, str], str] = {}
    for task in tasks:
        for room in task.config.group_association.items():
            part[first(task.id)] = first(rooms.setdefault(room, task.id))
    return {task.id: first(task.id) for task in tasks}


def with_workers(job: JobLife, there: set[tuple[str, int]], begun: set[tuple[str, int]]) -> JobLife:
    """What decides about a job, once it is known which workers there are.

    :param there: task and attempt of each worker.
    :param begun: those of them that were told to start.
    """
    tasks = {
        task.id: replace(
            task,
            live=frozenset(attempt for owner, attempt in there if owner == task.id),
            connected=task.connected or (task.id, task.attempt) in begun,
        )
        for task in job.tasks.values()
    }
    return replace(job, tasks=tasks)


def fewest_of(policy: RoundPolicy) -> int | None:
    """How many data-consuming workers of a role are enough; None: all are needed.

    ``minTrainers`` is 1 where nobody has set it, and a job that says nothing has not said that it can do without
    its trainers. One that asks for two or more, or that gives its rounds a deadline, has.
    """
    return policy.min_trainers if policy.min_trainers > 1 or policy.round_deadline is not None else None


def task_fields(before: TaskLife, after: TaskLife, now: float) -> dict[str, Any]:
    """What changes in a task's record; empty where only something changed that no record holds."""
    fields: dict[str, Any] = {}
    if after.brought and (after.attempt != before.attempt or after.waits is not before.waits):
        fields = {
            "attempt": after.attempt,
            "reason": "Its participant has left; it may come back." if after.waits else "Its participant starts it.",
        }
        if after.attempt != before.attempt:
            fields["started_at"] = now
    elif after.attempt != before.attempt:
        fields = {
            "attempt": after.attempt,
            "started_at": now,
            "worker": None,
            "reason": "Its worker is being started.",
        }
    if after.replaced != before.replaced:
        fields["replaced"] = after.replaced
    if after.delivered != before.delivered:
        fields["delivered"] = after.delivered
    if after.owes != before.owes:
        fields["owes"] = after.owes
    if after.state is not before.state:
        fields["state"] = after.state
        if after.state is not TaskState.DEPLOYING and not after.waits:
            fields["reason"] = None
        if after.state.ended:
            fields |= {"ended_at": now, "failure": after.failure}
        elif before.state.ended:
            fields |= {"ended_at": None, "failure": None}
    return fields


def job_fields(job: Job, before: JobLife, after: JobLife, actions: Sequence[Action], now: float) -> dict[str, Any]:
    """What changes in a job's record."""
    fields: dict[str, Any] = {}
    warnings = list(job.warnings)
    for action in actions:
        match action:
            case Enter(state=state):
                fields |= {"state": state, "reason": None}
                if state is JobState.STARTING and job.started_at is None:
                    fields["started_at"] = now
                if state is JobState.PAUSED:
                    fields |= {"running_at": None, "running_mark": None}
                if state.ended:
                    fields["ended_at"] = now
            case Clock():
                fields |= {"running_at": now, "running_mark": mark()}
            case Warn(message=message):
                warnings.append(message)
            case _:
                pass
    if actions:  # else nobody has come or gone
        short = missing(after)
        if short != missing(before) or (short and "reason" in fields):
            fields["reason"] = _lacks(short) if short and after.state is JobState.DEPLOYING else None
    if after.behind != before.behind:
        fields["restart_behind"] = after.behind
    if after.failure is not before.failure:
        fields["failure"] = after.failure
    if after.state is JobState.FAILED:
        warnings += also_failed(after)
    if warnings != job.warnings:
        fields["warnings"] = list(dict.fromkeys(warnings))[:WARNINGS]
    return fields


def _lacks(count: int) -> str:
    who = "1 participant" if count == 1 else f"{count} participants"
    return f"It waits for {who}: `flame job invite JOB` makes a token, and `flame join` takes part with it."


def also_failed(job: JobLife) -> list[str]:
    """What failed beside the task that the job's failure names; where two fail at once, either may be the cause."""
    cause = job.failure.task if job.failure is not None else None
    return [
        f"Task {task.id} ({task.role}) failed too: {task.failure.message}"
        for task in job.tasks.values()
        if task.failure is not None and task.id != cause
    ]


def task_news(task: Task) -> Entry:
    """The event that tells of a task's state."""
    data: dict[str, Any] = {
        "task": task.id,
        "role": task.role,
        "index": task.index,
        "state": task.state.value,
        "attempt": task.attempt,
    }
    if task.reason is not None:
        data["reason"] = task.reason
    if task.failure is not None:
        data["failure"] = msgspec.to_builtins(task.failure)
    return "task", data


def job_news(job: Job, state: JobState | None = None) -> Entry:
    """The event that tells of a job's state, or of one that it has just passed through."""
    data: dict[str, Any] = {"state": (state or job.state).value}
    if job.reason is not None:
        data["reason"] = job.reason
    if job.failure is not None:
        data["failure"] = msgspec.to_builtins(job.failure)
    return "job", data


def round_of(data: dict[str, Any]) -> Round:
    """The round that an event tells of."""
    return Round(round=data["round"], metrics=data["metrics"], seconds=data["seconds"], group=data.get("group", ""))


def keep_round(rounds: list[Round], done: Round) -> None:
    """Add a round; one that was done before, by a worker that was lost before it could be kept, is replaced."""
    key = (done.round, done.group)
    for index in range(len(rounds) - 1, -1, -1):
        if (rounds[index].round, rounds[index].group) == key:
            rounds[index] = done
            return
        if rounds[index].group == done.group and rounds[index].round < done.round:
            break
    rounds.append(done)


def ends(event: Event) -> bool:
    """Whether an event is the last of its job's stream."""
    return event.type == "job" and JobState(event.data["state"]).ended


@dataclass
class History:
    """What the stream of a job says to a server that starts again.

    :ivar state: the job's state as it was told last.
    :ivar tasks: each task's state and attempt as they were told last.
    :ivar heard: for each attempt of each task, the number of the last report in the stream.
    :ivar rounds: the rounds so far.
    """

    state: str | None = None
    tasks: dict[str, tuple[str, int]] = field(default_factory=dict)
    heard: dict[tuple[str, int], int] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        data = event.data
        if event.type == "job":
            self.state = data["state"]
        elif event.type == "task":
            self.tasks[data["task"]] = (data["state"], data["attempt"])
        elif event.type == "round":
            keep_round(self.rounds, round_of(data))
        if "report" in data:
            key = (data["task"], data["attempt"])
            self.heard[key] = max(self.heard.get(key, 0), data["report"])

    def untold(self, job: Job, tasks: Iterable[Task]) -> list[Entry]:
        """What the records say and the stream does not: the server was killed between the two."""
        news = [task_news(t) for t in tasks if t.attempt and self.tasks.get(t.id) != (t.state.value, t.attempt)]
        if self.state != job.state.value and job.state is not JobState.READY:
            news.append(job_news(job))
        return news
