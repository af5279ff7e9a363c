"""Sessions as a tenant of the computes: what runners tell of executors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from flame.runners.base import WorkerExit, WorkerInfo
from flame.sessions.manager.executors import JOB
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.pool import Pool
from flame.sessions.manager.workers import Workers
from flame.spec.sessions import ExecutorState

log = logging.getLogger("flame.sessions")


class Tenant:
    """See :class:`flame.controller.computes.Tenant`."""

    def __init__(self, floor: Floor, pool: Pool, workers: Workers, wake: Callable[[], None]) -> None:
        self._floor = floor
        self._pool = pool
        self._workers = workers
        self._wake = wake

    def owns(self, worker: WorkerInfo) -> bool:
        """Whether a worker is an executor of ours."""
        return worker.job == JOB

    def exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        """The runner has seen the end of an executor that nobody asked to end."""
        executor = self._floor.executors.get(worker.task)
        if executor is None:
            return
        executor.gone.set()
        if executor.releasing:
            return
        cause = how.message or (
            f"It was killed by {how.signal}." if how.signal else f"It ended with status {how.exit_code}."
        )
        log.info("executor %s is gone: %s", executor.id, cause)
        if executor.state in (ExecutorState.STARTING, ExecutorState.BINDING) and not executor.leaving:
            killed = how.signal is not None
            self._pool.failed_to_start(executor, f"An executor ended before it served a task. {cause}", died=killed)
        self._pool.lose(executor, cause)

    def news(self, worker: WorkerInfo, message: str | None) -> None:
        """A compute says what an executor waits for, or why it takes it away. Its end, with the cause, is told besides."""
        if message is not None:
            log.info("executor %s: %s", worker.task, message)
        executor = self._floor.executors.get(worker.task)
        if executor is not None:
            self._pool.awaited(executor, waits=message is not None)

    def freed(self) -> None:
        """There may be room that was not there before."""
        self._wake()

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        """A compute is back, and has these executors."""
        there = {info.task: info for info in workers}
        for executor in [one for one in self._floor.executors.values() if one.record.compute == compute]:
            info = there.pop(executor.id, None)
            if info is not None:
                executor.info = executor.info or info
            elif executor.started.is_set() and executor.began < asked:
                self._pool.lose(executor, f"It is not on {compute} any more.")
        for info in there.values():
            self._floor.context.background.spawn(self._workers.end_stranger(compute, info))
