"""What a starting server does with what an earlier process has left, however that one ended.

The store says what should be, the computes say what is. Workers that belong to an unfinished job are adopted: they were
not restarted, and need not even notice. Workers that nobody owns are ended. What was to be started and is not there is
started. What is on a compute that cannot be reached is taken to be there, until it can. What the records say and nobody was told is told now.
What a job has left that ended at the last moment is removed.
"""

from __future__ import annotations

from collections.abc import Callable

from flame.controller.bookkeeping import History, job_stream
from flame.controller.context import Context, StoredTask, log
from flame.controller.ledger import ENDINGS
from flame.controller.shelf import Saved
from flame.controller.supervisor import Supervisor
from flame.spec.records import JobState

_UNDER_WAY = [state for state in JobState if not state.ended and state is not JobState.READY]


async def recover(context: Context, watch: Callable[[Supervisor], None]) -> None:
    """Take up every job that is under way.

    :param context: the controller's surroundings; its computes are opened here.
    :param watch: takes each supervisor, before anything can happen to it.
    """
    found: list[tuple[Supervisor, History]] = []
    for state in _UNDER_WAY:
        for saved in await context.jobs.all({"state": state.value}):
            records = await _tasks_of(context, saved.id)
            history = await read_history(context, saved.id)
            supervisor = Supervisor(context, saved, records, history)
            watch(supervisor)
            found.append((supervisor, history))
    await context.computes.open()
    homes = {info: name for name, workers in context.computes.there().items() for info in workers}
    for supervisor, history in found:
        mine = {info: name for info, name in homes.items() if supervisor.owns(info)}
        await supervisor.resume(mine, history)
        log.info("job %s (%s) goes on with %d workers", supervisor.id, supervisor.job.name, len(mine))
    for document in await context.store.find(ENDINGS, limit=1_000_000):
        ended = await context.jobs.get(document.id)
        if ended is None:
            await context.store.delete(ENDINGS, document.id)
        elif ended.record.state.ended:
            context.background.spawn(Supervisor(context, ended, await _tasks_of(context, ended.id)).tidy())


async def _tasks_of(context: Context, job: str) -> list[Saved[StoredTask]]:
    return sorted(await context.tasks.all({"jobId": job}), key=lambda task: task.record.index)


async def read_history(context: Context, job: str) -> History:
    """All that a job's stream says."""
    history, after = History(), 0
    while events := await context.store.read(job_stream(job), after=after):
        for event in events:
            history.add(event)
        after = events[-1].seq
    return history
