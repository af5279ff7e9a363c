"""What decides about a job and its tasks, and what there is to ask about it. All of it is pure, and nothing in here changes anything.

:class:`JobLife` and :class:`TaskLife` are what :mod:`flame.controller.lifecycle` takes from one state to the next. The functions are the
questions on which that depends: whether there are enough participants to begin, whether the work is done, whether a
role still makes its quorum, who is still there and of no use any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from flame.spec.nouns import Restart as RestartPolicy
from flame.spec.records import Failure, JobState, TaskState


class TaskLife(msgspec.Struct, frozen=True):
    """What decides about a task.

    :ivar attempt: the newest attempt; 0 before the first.
    :ivar connected: the newest attempt's flamelet has been there.
    :ivar replaced: how many lost workers were replaced, since one has run for long.
    :ivar live: the attempts whose worker was asked for and is not known to be gone.
    :ivar ending: those of them that were asked to end.
    :ivar delivered: it has handed in the job's model, or its group's.
    :ivar owes: it has something of its own to hand in, so it is needed until it has completed.
    :ivar part: which part of the job it is in; parts know nothing of each other (parallel experiments).
    :ivar told: the attempt whose worker was told that the others have done the work.
    :ivar brought: a participant starts its worker, not a runner.
    """

    id: str
    role: str
    state: TaskState = TaskState.READY
    attempt: int = 0
    connected: bool = False
    replaced: int = 0
    live: frozenset[int] = frozenset()
    ending: frozenset[int] = frozenset()
    delivered: bool = False
    owes: bool = False
    part: str = ""
    told: int = 0
    failure: Failure | None = None
    brought: bool = False

    @property
    def waits(self) -> bool:
        """It waits for a participant."""
        return self.brought and self.state is TaskState.READY


class JobLife(msgspec.Struct, frozen=True):
    """What decides about a job.

    :ivar tasks: by id, in the order of expansion; never changed in place.
    :ivar quorum: for each role, how many of its tasks must not fail.
    :ivar clock: the time limit is counting.
    :ivar restart: for each role, how lost workers are replaced; for one that is not in it, as nobody has said anything.
    :ivar pauses: a failure pauses the job.
    :ivar consumers: the roles that consume data.
    :ivar behind: it is being restarted: behind which round it goes on once its workers have ended; None: it is not.
    """

    name: str
    state: JobState
    tasks: Mapping[str, TaskLife]
    quorum: Mapping[str, int]
    clock: bool = False
    failure: Failure | None = None
    restart: Mapping[str, RestartPolicy] = MappingProxyType({})
    pauses: bool = False
    consumers: frozenset[str] = frozenset()
    behind: int | None = None


def quorums(roles: Sequence[tuple[str, bool]], fewest: int | None, others: int | None = None) -> dict[str, int]:
    """How many tasks of each role a job needs.

    :param roles: for each task its role, and whether the role consumes data.
    :param fewest: how many data-consuming workers are enough; None: all are needed.
    :param others: likewise for each role that consumes no data.
    """
    needs: dict[str, int] = {}
    consumes = dict(roles)
    for role, _ in roles:
        needs[role] = needs.get(role, 0) + 1
    for role, count in needs.items():
        enough = fewest if consumes[role] else others
        if enough is not None:
            needs[role] = min(enough, count)
    return needs


def gathered(job: JobLife) -> bool:
    """Whether there are enough participants for the job to begin. What has begun does not become undone when one leaves."""
    if any(_has_run(task) or not (task.brought or task.state is TaskState.READY) for task in job.tasks.values()):
        return True
    there = dict.fromkeys(job.quorum, 0)
    for task in job.tasks.values():
        there[task.role] += not task.waits
    return all(there[role] >= fewest for role, fewest in job.quorum.items())


def missing(job: JobLife) -> int:
    """How many participants are still needed for the job to begin."""
    if gathered(job):
        return 0
    lacking = 0
    for role, fewest in job.quorum.items():
        there = sum(task.role == role and not task.waits for task in job.tasks.values())
        lacking += max(0, fewest - there)
    return lacking


def superfluous(job: JobLife) -> list[TaskLife]:
    """Workers that have taken another one's place and find that the others have done the work and are gone."""
    return [task for task in _idle(job) if task.attempt > 1 and not task.owes]


def left_behind(job: JobLife) -> list[TaskLife]:
    """Workers that may still wait for others who have done the work and are gone, and were not told so."""
    return [task for task in _idle(job) if task.told != task.attempt]


def _idle(job: JobLife) -> list[TaskLife]:
    """Workers that are there although the work of their part is done."""
    done = {part for part in {task.part for task in job.tasks.values()} if _done(job, part)}
    busy = (TaskState.DEPLOYING, TaskState.RUNNING)
    return [task for task in job.tasks.values() if task.part in done and task.state in busy]


def _done(job: JobLife, part: str) -> bool:
    """Whether nothing is left to do in a part of the job, whoever is still there, but to hand in what somebody owes.

    Those who aggregate have handed in their models and completed; without a server, one of the members has. Where there is
    no model, all who consume no data have completed.
    """
    members = [task for task in job.tasks.values() if task.part == part]
    makers = {task.role for task in members if task.delivered}
    left = [
        task
        for task in members
        if task.state is not TaskState.COMPLETED
        and (
            task.role in makers
            if makers - job.consumers
            else task.delivered
            if makers
            else task.role not in job.consumers
        )
    ]
    return not left and any(makers or task.role not in job.consumers for task in members)


def too_late(job: JobLife, task: TaskLife) -> bool:
    """It has lost sight of the others while one of them was replaced, and gave up when they had done the work."""
    replaced = any(other.attempt > 1 for other in job.tasks.values())
    return replaced and not task.owes and job.state is JobState.RUNNING and _done(job, task.part)


def _has_run(task: TaskLife) -> bool:
    return task.state is TaskState.RUNNING or task.state.ended


def all_run(job: JobLife) -> bool:
    """Every task's code was started, but for those that wait for a participant whom the job can begin without."""
    tasks = job.tasks.values()
    return all(_has_run(task) or task.waits for task in tasks) and any(_has_run(task) for task in tasks)


def work_is_done(job: JobLife) -> bool:
    """Every task completed, but for those that the job can do without, and those whose participant has left."""
    tasks = job.tasks.values()
    ended = all(task.state.ended or task.waits for task in tasks)
    return ended and any(task.state is TaskState.COMPLETED for task in tasks) and broken_role(job) is None


def broken_role(job: JobLife) -> TaskLife | None:
    """A failed task of a role that no longer makes its quorum; None while every role does."""
    alive = dict.fromkeys(job.quorum, 0)
    for task in job.tasks.values():
        given_up = task.brought and task.state is TaskState.TERMINATED  # because the rest of the job was done
        if given_up or task.state not in (TaskState.FAILED, TaskState.TERMINATED):
            alive[task.role] += 1
    for task in job.tasks.values():
        if task.state in (TaskState.FAILED, TaskState.TERMINATED) and alive[task.role] < job.quorum[task.role]:
            return task
    return None
