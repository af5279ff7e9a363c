"""The workers of one job: how each is started, heard of, and seen off.

Starting and ending take time, so each runs beside everything else, one coroutine a worker. Whatever comes of
it goes back to the job as an event: nothing in here decides what happens next.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence

from flame.controller.context import Context, log
from flame.controller.events import Gone
from flame.errors import FlameError, Forbidden, RunnerError
from flame.runners.base import WorkerExit, WorkerInfo, WorkerSpec
from flame.spec.nouns import Placement
from flame.spec.records import Failure

_LAST_WORDS = 8192
#: Variables of the server that its workers get, too: where crashes are tried (:mod:`flame.sdk.chaospoints`).
_PASSED_ON = ("FLAME_CHAOS",)


class Worker:
    """One attempt of one task, as the server sees its worker.

    :ivar heard: its flamelet has connected at least once.
    :ivar begun: the flamelet was told to start the code.
    :ivar acked: the number of the last report that was taken in.
    :ivar reporting: held while reports are taken in, one batch after another.
    :ivar since: when it was known to run its task's code, by the loop's clock; None: it does not yet.
    :ivar unwanted: set when it is to end; one that waits to be started is not started then.
    :ivar compute: where it is.
    :ivar info: the runner's address of it, once it has been started.
    :ivar born: when it had been started (``time.monotonic()``).
    :ivar started: set when the start has come to an end, well or badly.
    :ivar gone: set when nothing of it is left.
    :ivar parted: set when it has said how its task ended.
    :ivar brought: a participant has started it, so nobody but the participant can end it.
    """

    def __init__(self, task: str, attempt: int, compute: str) -> None:
        self.task = task
        self.attempt = attempt
        self.compute = compute
        self.born = 0.0
        self.heard = False
        self.begun = False
        self.acked = 0
        self.reporting = asyncio.Lock()
        self.since: float | None = None
        self.info: WorkerInfo | None = None
        self.unwanted = asyncio.Event()
        self.started = asyncio.Event()
        self.gone = asyncio.Event()
        self.parted = asyncio.Event()
        self.brought = False


class Crew:
    """Starts and ends the workers of one job.

    :param context: the controller's surroundings.
    :param job: the job's id.
    :param dependencies: what the runner has to install for its code.
    :param placement_of: by role, what its workers may use, and from which image they are made.
    :param happened: takes the event that a worker is gone.
    :param placed: told where a worker has been started.
    """

    def __init__(
        self,
        context: Context,
        job: str,
        dependencies: list[str],
        placement_of: Callable[[str], Placement],
        *,
        happened: Callable[[Gone], Awaitable[None]],
        placed: Callable[[WorkerInfo], Awaitable[None]],
    ) -> None:
        self._context = context
        self._job = job
        self._dependencies = dependencies
        self._placement_of = placement_of
        #: The computes at which a start has failed.
        self.shunned: set[str] = set()
        self._happened = happened
        self._placed = placed
        self._workers: dict[tuple[str, int], Worker] = {}
        self._early: dict[tuple[str, int], WorkerExit] = {}
        self._words: dict[tuple[str, int], str] = {}

    def get(self, task: str, attempt: int) -> Worker | None:
        """The worker of an attempt, also one that is gone; None for one that never was."""
        return self._workers.get((task, attempt))

    def all(self) -> list[Worker]:
        """Every worker there was since this process of the server began."""
        return list(self._workers.values())

    def word(self, task: str, attempt: int) -> str | None:
        """What the compute says: what a worker waits for, or why it is taken away; None where it says nothing."""
        return self._words.get((task, attempt))

    def hear(self, info: WorkerInfo, message: str | None) -> str | None:
        """The compute says something of a worker; gives what it said before."""
        key = (info.task, info.attempt)
        before = self._words.pop(key, None)
        if message is not None:
            self._words[key] = message
        elif before is not None and not self.heard(*key) and (self._job, *key) in self._context.leases:
            # It was started only now, so its time to connect begins now.
            self._context.leases.begin((self._job, *key), self._context.options.deploy)
        return before

    def heard(self, task: str, attempt: int) -> bool:
        """Whether a worker has ever connected."""
        worker = self.get(task, attempt)
        return worker is not None and worker.heard

    def begin(self, task: str, attempt: int, role: str, compute: str, *, delay: float = 0.0) -> None:
        """Start a worker. If it cannot be started, it is gone, and the cause says why.

        :param delay: seconds to wait before.
        """
        worker = self.expect(task, attempt, compute, delay=delay)
        self._context.background.spawn(self._start(worker, role, delay))

    def expect(self, task: str, attempt: int, compute: str, *, delay: float = 0.0) -> Worker:
        """A worker may be there from now on: its calls are answered and its lease counts."""
        worker = self._workers.setdefault((task, attempt), Worker(task, attempt, compute))
        self._context.logs.open(self._job, task, attempt)
        self._context.leases.begin((self._job, task, attempt), self._context.options.deploy + delay)
        return worker

    def welcome(self, task: str, attempt: int) -> Worker:
        """A participant starts this worker, or has started it under an earlier process of the server."""
        worker = self.expect(task, attempt, "")
        worker.brought = True
        worker.started.set()
        return worker

    def release(self, task: str, attempt: int) -> None:
        """A participant's worker has left, or has no right to be there any more: it is not let in again."""
        worker = self._workers.get((task, attempt))
        if worker is not None and not worker.gone.is_set():
            worker.gone.set()
            self._cut(worker)
            self._context.leases.drop((self._job, task, attempt))
            self._context.logs.close(self._job, task, attempt)

    def adopt(self, info: WorkerInfo, role: str, compute: str) -> Worker:
        """An earlier process of the server has started this worker, and it is there: it has some time to come back."""
        worker = self.expect(info.task, info.attempt, compute)
        options = self._context.options
        self._context.leases.begin((self._job, info.task, info.attempt), max(options.lease, options.reunion))
        worker.info = info
        if self.word(info.task, info.attempt) is None:
            worker.heard = True
        else:  # it waits to be started, and could not yet connect
            self._context.leases.begin((self._job, info.task, info.attempt), options.deploy)
        worker.since = asyncio.get_running_loop().time()
        worker.started.set()
        early = self._early.pop((info.task, info.attempt), None)
        if early is not None:
            self._context.background.spawn(self._exit(worker, early, role))
        return worker

    def end(self, task: str, attempt: int, role: str, *, parting: bool) -> None:
        """See to it that nothing of a worker is left.

        :param parting: its task has ended, so it is about to leave by itself: give it a moment.
        """
        worker = self._workers.get((task, attempt))
        if worker is not None:
            worker.unwanted.set()
            self._context.background.spawn(self._end(worker, role, parting))

    def exited(self, info: WorkerInfo, how: WorkerExit, role: str) -> None:
        """The runner has seen the end of a worker that nobody asked to end."""
        worker = self._workers.get((info.task, info.attempt))
        if worker is None:  # a starting server has not come to it yet
            self._early[info.task, info.attempt] = how
        else:
            self._context.background.spawn(self._exit(worker, how, role))

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float, role_of: Callable[[str], str]) -> None:
        """A compute is back. Workers that it does not have any more are gone; those that nobody counts on are ended.

        :param workers: those of this job that it has.
        :param asked: when it was asked; it cannot have known of what was started since.
        """
        there = {(info.task, info.attempt): info for info in workers}
        for worker in self.all():
            if worker.compute != compute or worker.gone.is_set():
                continue
            info = there.pop((worker.task, worker.attempt), None)
            if not worker.started.is_set():
                continue
            if info is not None:
                worker.info = info
            elif worker.born < asked:
                message = f"Its worker had ended when compute {compute!r} could be reached again."
                failure = self._failure(worker, role_of(worker.task), message)
                self._context.background.spawn(self._gone(worker, failure))
        for info in there.values():
            self._context.background.spawn(self._context.computes.end(compute, info))

    async def _start(self, worker: Worker, role: str, delay: float) -> None:
        if delay and await _within(delay, worker.unwanted):
            worker.started.set()
            return  # who asked for its end says that it is gone
        computes, keys, options = self._context.computes, self._context.keys, self._context.options
        placement = self._placement_of(role)
        spec = WorkerSpec(
            task=worker.task,
            job=self._job,
            attempt=worker.attempt,
            environment={
                **options.worker_environment,
                "FLAME_SERVER": computes.server(worker.compute),
                "FLAME_TASK": worker.task,
                "FLAME_TASK_KEY": keys.task(worker.task, worker.attempt),
                "FLAME_ATTEMPT": str(worker.attempt),
                **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            },
            dependencies=self._dependencies,
            resources=placement.resources,
            image=placement.image,
        )
        try:
            worker.info = await computes.runner(worker.compute).start(spec)
        except FlameError as error:
            worker.started.set()
            self.shunned.add(worker.compute)
            await self._gone(worker, self._failure(worker, role, f"Its worker could not be started: {error.message}"))
            return
        worker.born = time.monotonic()
        worker.started.set()
        log.debug("job %s: worker %s of %s started", self._job, worker.info.handle, spec.name)
        await self._placed(worker.info)

    async def _end(self, worker: Worker, role: str, parting: bool) -> None:
        await worker.started.wait()
        if worker.brought:
            await self._part(worker, role, parting)
            return
        if parting:
            try:
                async with asyncio.timeout(self._context.options.parting):
                    await worker.gone.wait()
            except TimeoutError:
                log.warning("job %s: the worker of %s does not leave; it is ended", self._job, worker.task)
        pause = 0.5
        while not worker.gone.is_set() and worker.info is not None:
            try:
                await self._context.computes.runner(worker.compute).end(worker.info, grace=self._context.options.grace)
                break
            except RunnerError as error:
                if worker.parted.is_set():  # it leaves by itself; if not, it is found when its compute is back
                    break
                log.error("job %s: the worker of %s cannot be ended: %s", self._job, worker.task, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 30.0)
        if not worker.gone.is_set():
            await self._gone(worker, self._failure(worker, role, "Its worker was ended."))

    async def _part(self, worker: Worker, role: str, parting: bool) -> None:
        """A participant's worker ends by itself, or is left to its owner, and let in no more."""
        options = self._context.options
        patience = options.parting if parting else options.grace + options.parting
        if not worker.heard:
            patience = 0.0  # it has never come
        try:
            async with asyncio.timeout(patience):
                await worker.parted.wait()
        except TimeoutError:
            log.warning("job %s: the participant's worker of %s says nothing more", self._job, worker.task)
        if not worker.gone.is_set():
            await self._gone(worker, self._failure(worker, role, "Its participant was told to end it."))

    async def _exit(self, worker: Worker, how: WorkerExit, role: str) -> None:
        await worker.started.wait()
        async with worker.reporting:  # what it has said last is being written: that counts first
            pass
        failure = self._failure(worker, role, how.message or _exit_sentence(how))
        failure.exit_code, failure.signal = how.exit_code, how.signal
        if not failure.log:
            failure.log = await self._last_words(worker)
        await self._gone(worker, failure)

    async def _gone(self, worker: Worker, failure: Failure) -> None:
        """Nothing of the worker is left: its log is whole, its lease over, its place free."""
        key = (self._job, worker.task, worker.attempt)
        if worker.gone.is_set():
            return
        worker.gone.set()
        self._cut(worker)
        self._words.pop((worker.task, worker.attempt), None)
        self._context.leases.drop(key)
        await self._happened(Gone(worker.task, worker.attempt, failure))
        self._context.logs.close(*key)
        self._context.computes.give(key)

    def _cut(self, worker: Worker) -> None:
        """The key of the attempt opens nothing any more, and nothing that it has opened stays open."""
        self._context.standing.end(("task", worker.task, worker.attempt), too_late(worker.task, worker.attempt))

    async def _last_words(self, worker: Worker) -> list[str]:
        """What the worker itself has printed, for one that never got to run its task's code."""
        assert worker.info is not None
        tail = b""
        try:
            async for piece in self._context.computes.runner(worker.compute).logs(worker.info):
                tail = (tail + piece)[-_LAST_WORDS:]
        except RunnerError as error:
            log.warning("job %s: the output of worker %s cannot be read: %s", self._job, worker.info.handle, error)
        return [line[:2000] for line in tail.decode(errors="replace").splitlines()[-20:]]

    def _failure(self, worker: Worker, role: str, message: str) -> Failure:
        tail = self._context.logs.tail(self._job, worker.task, worker.attempt)
        return Failure(message=message, task=worker.task, role=role, attempt=worker.attempt, log=tail)


def too_late(task: str, attempt: int, why: str = "its worker has left") -> Forbidden:
    """What is said to whoever comes with the key of an attempt that is over."""
    return Forbidden(f"Attempt {attempt} of task {task} is over: {why}.")


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Wait for an event, at the longest so many seconds; whether it came."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _exit_sentence(how: WorkerExit) -> str:
    if how.signal is not None:
        return f"Its worker was killed by {how.signal}."
    if how.exit_code is not None:
        return f"Its worker ended with exit code {how.exit_code} before it said how its task ended."
    return "Its worker ended before it said how its task ended."
