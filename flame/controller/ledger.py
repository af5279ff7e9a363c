"""The books of one job: its records and its stream.

Records are written before the stream tells of them. The rounds are gathered in memory while the job runs and put into a
stream of their own when it ends, so that no document grows with them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from flame.controller.bookkeeping import WARNINGS, Entry, History, job_stream, keep_round, round_of, rounds_stream
from flame.controller.context import Context, StoredTask, log
from flame.controller.shelf import Saved
from flame.errors import Conflict, StoreError
from flame.spec.records import Job, Model, Round

#: The jobs that have ended, or are about to, and have not been tidied up after.
ENDINGS = "endings"


class Ledger:
    """What is written of one job. Whoever writes holds the supervisor's lock.

    :param context: the controller's surroundings.
    :param job: the job's record.
    :param tasks: its tasks' records, in the order of expansion.
    :param history: what its stream says already.
    """

    def __init__(
        self, context: Context, job: Saved[Job], tasks: Sequence[Saved[StoredTask]], history: History | None
    ) -> None:
        self._context = context
        self._job = job
        self._tasks = {task.id: task for task in tasks}
        self._rounds: list[Round] = history.rounds if history else []

    @property
    def id(self) -> str:
        """The job's id."""
        return self._job.id

    @property
    def job(self) -> Job:
        """The job's record, without its rounds."""
        return self._job.record

    @property
    def whole_job(self) -> Job:
        """The job's record, with its rounds so far."""
        return msgspec.structs.replace(self._job.record, rounds=self._rounds)

    @property
    def tasks(self) -> list[StoredTask]:
        """The tasks' records, in the order of expansion."""
        return [task.record for task in self._tasks.values()]

    def task(self, id: str) -> StoredTask:
        """One task's record."""
        return self._tasks[id].record

    async def save_job(self, **fields: Any) -> None:
        """Write changed fields of the job's record."""
        if fields:
            await self._context.jobs.put(self._job, msgspec.structs.replace(self._job.record, **fields))

    async def keep_model(self, model: Model) -> None:
        """Note where the job's model is; one of several where its groups are independent."""
        others = [each for each in self._job.record.models if each.group != model.group]
        models = sorted([*others, model], key=lambda each: each.group)
        await self.save_job(model=models[0], models=models if model.group else [])

    async def save_task(self, id: str, **fields: Any) -> None:
        """Write changed fields of a task's record."""
        saved = self._tasks[id]
        await self._context.tasks.put(saved, msgspec.structs.replace(saved.record, **fields))

    async def save_tasks(self, fields: dict[str, dict[str, Any]]) -> None:
        """Write changed fields of several tasks' records, together."""
        await asyncio.gather(*(self.save_task(task, **values) for task, values in fields.items()))

    async def publish(self, entries: Sequence[Entry]) -> None:
        """Add events to the job's stream, and tell them."""
        if entries:
            await self._context.notifier.publish_many(job_stream(self.id), entries)
            for kind, data in entries:
                if kind == "round":
                    keep_round(self._rounds, round_of(data))

    async def warn(self, message: str) -> None:
        """Keep a warning with the job, once, and tell it."""
        warnings = self._job.record.warnings
        if message not in warnings:
            if len(warnings) < WARNINGS:
                await self.save_job(warnings=[*warnings, message])
            await self.publish([("warning", {"message": message})])

    async def keep_rounds(self) -> None:
        """Put the rounds where they can be read without the rest of the stream. Repeated after a crash, it goes on."""
        stream = rounds_stream(self.id)
        there = len(await self._context.store.read(stream, limit=1_000_000))
        if entries := [("round", msgspec.to_builtins(done)) for done in self._rounds[there:]]:
            await self._context.store.append(stream, entries)

    async def note_end(self) -> None:
        """Keep that the job ends: what it leaves is to be removed, by the next process of the server if this one is killed before."""
        with contextlib.suppress(Conflict):  # an earlier try has kept it
            await self._context.store.insert(ENDINGS, self.id, {"jobId": self.id})

    async def forget_end(self) -> None:
        """What it has left is removed."""
        await self._context.store.delete(ENDINGS, self.id)


async def surely(write: Callable[[], Awaitable[None]], job: str) -> None:
    """Write something that must not be lost: while the store fails, try again."""
    pause = 0.1
    while True:
        try:
            await write()
        except StoreError as error:
            log.error("job %s: %s", job, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        else:
            return
