"""After a restart: the sessions that were open, from their journals, and the executors that the computes still have."""

from __future__ import annotations

import logging

from flame.controller.shelf import Saved
from flame.errors import FlameError
from flame.sessions.manager import journal
from flame.sessions.manager.apps import Apps
from flame.sessions.manager.executors import Executor
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.pool import Pool
from flame.sessions.manager.register import Register
from flame.sessions.manager.workers import Workers
from flame.spec.sessions import ExecutorState, SessionRecord, SessionState

log = logging.getLogger("flame.sessions")


async def sessions(floor: Floor, register: Register, apps: Apps) -> None:
    """Take up the sessions that are open."""
    for saved in await floor.sessions.all({"state": SessionState.OPEN.value}):
        await _restore(saved, floor, register, apps)


async def _restore(saved: Saved[SessionRecord], floor: Floor, register: Register, apps: Apps) -> None:
    past, after = journal.Past(), 0
    place = journal.name(saved.id)
    while records := await floor.context.store.recall(place, after=after, limit=500):
        for number, data in records:
            past.add(number, data)
        after = records[-1][0]
    live = register.admit(saved)
    live.last, live.keeper = past.last, past.keeper
    live.members = past.members
    live.book.restore(past.next, past.works.values(), past.ended)
    await register.look_for_common(live)
    try:
        live.files = await apps.load(live.application.code)
    except FlameError as error:
        live.reason = f"Its code is not there any more: {error}"
    log.info("session %s goes on with %d tasks", live.id, len(live.book.live))


async def executors(floor: Floor, pool: Pool, workers: Workers) -> None:
    """Take up the executors that are there, and end those that nobody knows."""
    there = {info.task: (compute, info) for compute, info in floor.ground.there()}
    for known in await floor.records.all():
        executor = Executor(known.id, known.record, known.record.app)
        executor.saved = known
        _, info = there.pop(known.id, (None, None))
        if info is None and floor.ground.reachable(known.record.compute):
            await floor.records.delete(known.id)
            continue
        # On a compute that cannot be reached it may be there all the same: its connection will tell.
        executor.info = info
        executor.started.set()
        executor.state = ExecutorState.IDLE
        executor.leaving = True  # nobody counts on it before it is back
        floor.executors[known.id] = executor
        floor.ground.hold(executor)
        pool.await_return(executor, "It did not come back.")
    for compute, info in there.values():
        floor.context.background.spawn(workers.end_stranger(compute, info))
