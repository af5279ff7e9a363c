"""What a starting server does with what an earlier process has left, however that one ended.

The store says what should be, the runner says what is. Workers that belong to an unfinished job are adopted: they were
not restarted, and need not even notice. Workers that nobody owns are ended. What was to be started and is not there is
started. What the records say and nobody was told is told now.
"""

from __future__ import annotations

from collections.abc import Callable

from flame.controller.bookkeeping import History, job_stream
from flame.controller.context import Context, log
from flame.controller.supervisor import Supervisor
from flame.errors import RunnerError
from flame.runners.base import ExitCallback, Runner, WorkerInfo
from flame.spec.records import JobState

_UNDER_WAY = [state for state in JobState if not state.ended and state is not JobState.READY]


async def recover(context: Context, watch: Callable[[Supervisor], None], on_exit: ExitCallback) -> None:
    """Take up every job that is under way.

    :param context: the controller's surroundings; its runners are opened here.
    :param watch: takes each supervisor, before anything can happen to it.
    :param on_exit: told of workers that end.
    """
    found: list[tuple[Supervisor, History]] = []
    for state in _UNDER_WAY:
        for saved in await context.jobs.all({"state": state.value}):
            records = sorted(await context.tasks.all({"jobId": saved.id}), key=lambda task: task.record.index)
            history = await read_history(context, saved.id)
            supervisor = Supervisor(context, saved, records, history)
            watch(supervisor)
            found.append((supervisor, history))
    homes: dict[WorkerInfo, Runner] = {}
    for runner in context.runners.values():
        await runner.open(on_exit)
        homes.update(dict.fromkeys(await runner.list(), runner))
    for supervisor, history in found:
        tasks = {task.id for task in supervisor.tasks}
        mine = [info for info in homes if info.job == supervisor.id and info.task in tasks]
        for info in mine:
            del homes[info]
        await supervisor.resume(mine, history)
        log.info("job %s (%s) goes on with %d workers", supervisor.id, supervisor.job.name, len(mine))
    for info, runner in homes.items():
        log.warning("worker %s of task %s belongs to no job that is under way; it is ended", info.handle, info.task)
        context.background.spawn(_end(runner, info))


async def read_history(context: Context, job: str) -> History:
    """All that a job's stream says."""
    history, after = History(), 0
    while events := await context.store.read(job_stream(job), after=after):
        for event in events:
            history.add(event)
        after = events[-1].seq
    return history


async def _end(runner: Runner, info: WorkerInfo) -> None:
    try:
        await runner.end(info)
        await runner.clean(info)
    except RunnerError as error:
        log.error("worker %s cannot be ended: %s", info.handle, error)
