"""What the workers of one job say: the reports of their flamelets, taken in once and in order.

What changes the life of the job goes to its supervisor as an event; where a worker can be reached, to the
:class:`~flame.controller.rendezvous.Rendezvous`; what is only to be told or kept, to the :class:`~flame.controller.ledger.Ledger`.

Metrics and rounds do not pass through the life of the job. They go into the job's stream as they come, a whole batch in
one append, each with the number of the report it came in; so after a crash of the server the stream itself says what
was heard already. A growing document is never rewritten: the rounds are gathered in memory, and
are put into a stream of their own, ``rounds/ID``, when the job ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from flame.controller import events
from flame.controller import reports as said
from flame.controller.bookkeeping import Entry, task_news
from flame.controller.context import Context, log
from flame.controller.ledger import Ledger
from flame.controller.rendezvous import Rendezvous
from flame.controller.workers import Crew, Worker
from flame.spec.records import Model, Record, Report


class Hearing:
    """Takes in what the workers of one job report.

    :param context: the controller's surroundings.
    :param ledger: what is written of the job.
    :param crew: its workers.
    :param rendezvous: tells them of each other.
    :param lock: the supervisor's, held by whoever writes.
    :param worker: gives the worker that speaks for an attempt, or refuses it.
    :param happened: takes what changes the life of the job.
    """

    def __init__(
        self,
        context: Context,
        ledger: Ledger,
        crew: Crew,
        rendezvous: Rendezvous,
        lock: asyncio.Lock,
        *,
        worker: Callable[[str, int], Worker],
        happened: Callable[[events.Event], Awaitable[None]],
    ) -> None:
        self._context = context
        self._ledger = ledger
        self._crew = crew
        self._rendezvous = rendezvous
        self._lock = lock
        self._worker = worker
        self._happened = happened

    async def report(self, task: str, attempt: int, reports: Sequence[Report]) -> int:
        """Take in what a flamelet reports, in order; what was heard before is passed over.

        :returns: the number of the last report that was heard.
        :raises flame.errors.SpecError: a report is malformed; nothing of the batch was taken in.
        """
        worker = self._worker(task, attempt)
        async with worker.reporting:
            fresh = [(report, said.read(report)) for report in reports if report.seq > worker.acked]
            entries: list[Entry] = []
            for report, data in fresh:
                if isinstance(data, said.MetricsData):
                    entries.append(self._measured(task, attempt, report, data))
                elif data is not None:
                    await self._ledger.publish(entries)
                    entries = []
                    worker.acked = report.seq - 1
                    await self._hear(task, attempt, report, data)
                    worker.acked = report.seq
            await self._ledger.publish(entries)
            if fresh:
                worker.acked = fresh[-1][0].seq
        return worker.acked

    def _measured(self, task: str, attempt: int, report: Report, data: said.MetricsData) -> Entry:
        news = {"round": data.round, "metrics": data.numbers(), "task": task, "attempt": attempt, "report": report.seq}
        if report.type == "round":
            return "round", {**news, "seconds": data.seconds, **({"group": data.group} if data.group else {})}
        return "metrics", {**news, "role": self._ledger.task(task).role}

    async def _hear(self, task: str, attempt: int, report: Report, data: Record) -> None:
        """A report that changes something."""
        role = self._ledger.task(task).role
        match data:
            case said.StateData(state="running"):
                self._worker(task, attempt).since = asyncio.get_running_loop().time()
                await self._happened(events.Running(task, attempt))
            case said.StateData(state="completed"):
                await self._happened(events.Completed(task, attempt))
                self._parted(task, attempt)
            case said.StateData(state="terminated") if (word := self._taken(task, attempt)) is not None:
                # The compute takes the worker away, so its flamelet was asked to end. The compute says when nothing is left, and why.
                log.info("job %s: the worker of %s says farewell: %s", self._ledger.id, task, word)
            case said.StateData(state=state):
                tail = self._context.logs.tail(self._ledger.id, task, attempt)
                failure = said.failure_of(data, task, role, attempt, tail)
                kind = events.Failed if state == "failed" else events.Terminated
                await self._happened(kind(task, attempt, failure))
                self._parted(task, attempt)
            case said.JoinData():
                await self._rendezvous.join(task, role, data.channel, data.group, {**data.member, "attempt": attempt})
            case said.LeaveData():
                await self._rendezvous.leave(task, data.channel, data.group)
            case Model():
                async with self._lock:
                    await self._ledger.keep_model(data)
                    await self._ledger.publish([("model", msgspec.to_builtins(data))])
                await self._happened(events.Delivered(task, attempt))
            case said.OwesData():
                await self._happened(events.Owes(task, attempt))
            case said.MessageData(message=message) if report.type == "warning":
                async with self._lock:
                    await self._ledger.warn(message)
            case said.MessageData(message=message):
                async with self._lock:
                    await self._ledger.save_task(task, reason=message or None)
                    await self._ledger.publish([task_news(self._ledger.task(task))])

    def _taken(self, task: str, attempt: int) -> str | None:
        """Why its compute takes a worker away that we want; None where it does not."""
        unwanted = self._worker(task, attempt).unwanted.is_set()
        return None if unwanted else self._crew.word(task, attempt)

    def _parted(self, task: str, attempt: int) -> None:
        """A worker has said how its task ended: it is about to go."""
        if worker := self._crew.get(task, attempt):
            worker.parted.set()
