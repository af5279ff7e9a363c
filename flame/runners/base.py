"""The interface of a runner: what starts, lists and ends workers on one kind of compute."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from flame.spec.nouns import Resources

T = TypeVar("T")
#: Seconds after which a worker is said to wait for something.
_MOMENT = 1.0

#: What a worker runs: the agent that executes a job's task.
FLAMELET = "flame.flamelet"


class WorkerSpec(NamedTuple):
    """What to start: a flamelet for one attempt of a task.

    ``environment`` holds all that the flamelet needs (``FLAME_SERVER``, ``FLAME_TASK``, ``FLAME_TASK_KEY``,
    ``FLAME_ATTEMPT``). It holds a secret: a runner passes it on where no process list shows it.

    ``resources`` is what the worker may use: a runner gives it that much, and holds it to it. ``module`` is what it runs
    (``python -m``): the flamelet, or a session's executor. ``image`` is the container image, where the compute runs containers
    and its configured one will not do.
    """

    task: str
    job: str
    attempt: int
    environment: Mapping[str, str]
    dependencies: Sequence[str] = ()
    resources: Resources = Resources()
    module: str = FLAMELET
    image: str | None = None

    @property
    def name(self) -> str:
        """The worker's name, unique in a server: task and attempt."""
        return f"{self.task}.{self.attempt}"


class WorkerInfo(NamedTuple):
    """A worker that a runner has. ``handle`` is the runner's own address of it: a pid, a container id, a pod's name."""

    task: str
    job: str
    attempt: int
    handle: str


class WorkerExit(NamedTuple):
    """How a worker ended, as its runner saw it; ``message`` is a sentence where the runner knows the cause (OOM, image not found)."""

    exit_code: int | None
    signal: str | None
    message: str | None = None


class Capacity(NamedTuple):
    """What there is on a compute in all, used or not: workers, cores, bytes of memory, GPUs. None: no limit is known."""

    slots: int | None = None
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None


ExitCallback = Callable[[WorkerInfo, WorkerExit], None]
NewsCallback = Callable[[WorkerInfo, str | None], None]


class Runner(abc.ABC):
    """One kind of compute. Instances are made per registered compute, with that kind's typed configuration.

    A runner keeps no state of its own that a restart could lose: :meth:`list` asks the compute itself.
    """

    #: The name by which a compute's ``kind`` chooses this runner.
    kind: ClassVar[str]
    #: The typed configuration of this kind; validated when a compute is registered.
    Config: ClassVar[type[msgspec.Struct]]
    #: Set before :meth:`open`: told, in the event loop and as it happens, what a started worker waits for before it runs (room on a
    #: node, its image), or why the compute itself is about to end it; None once it runs. A runner that knows
    #: neither says nothing. While a worker waits, the runner's own patience counts, not the server's.
    on_news: NewsCallback | None = None

    def __init__(self, config: msgspec.Struct, *, instance: str, data_dir: Path) -> None:
        """Nothing is started or connected before :meth:`open`.

        :param config: of this class's ``Config``.
        :param instance: the server's id, by which its workers are told from another server's on the same compute.
        :param data_dir: the server's data directory, for a runner that keeps files of its workers.
        """
        self.instance = instance
        self.data_dir = data_dir

    @abc.abstractmethod
    async def open(self, on_exit: ExitCallback) -> None:
        """Connect to the compute; from now on call ``on_exit`` once, in the event loop, for each worker that ends by itself."""

    @abc.abstractmethod
    async def start(self, spec: WorkerSpec) -> WorkerInfo:
        """Start a worker. Starting one that is there already gives that one.

        :raises flame.errors.RunnerError: it could not be started; the text is the cause.
        """

    @abc.abstractmethod
    async def list(self) -> Sequence[WorkerInfo]:
        """The workers of this server that the compute really has now, also those that an earlier process of the server started. Adopts them: their ends are reported to ``on_exit``."""

    @abc.abstractmethod
    async def end(self, worker: WorkerInfo, *, grace: float = 5.0) -> None:
        """End a worker with all its processes: ask, wait up to ``grace`` seconds, then kill. Returns when nothing of it is left; one that is gone is no error."""

    @abc.abstractmethod
    def logs(self, worker: WorkerInfo) -> AsyncIterator[bytes]:
        """What the worker itself (the flamelet, not the task) has printed: for a worker that never connected."""

    async def clean(self, worker: WorkerInfo) -> None:
        """Remove what an ended worker has left on the compute, such as its working directory; nothing there is no error."""

    @abc.abstractmethod
    async def capacity(self) -> Capacity:
        """What fits in all. Asked anew now and then, since a cluster grows and shrinks."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of the compute; the workers go on."""

    def _say(self, worker: WorkerInfo, message: str | None) -> None:
        """Tell what a worker waits for; None: nothing any more."""
        if self.on_news is not None:
            self.on_news(worker, message)

    async def _before(self, worker: WorkerInfo, waits: str, work: Coroutine[Any, Any, T]) -> T:
        """Do what must be done before a worker can be started; if it takes more than a moment, the worker is said to wait for it."""
        doing = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([doing], timeout=_MOMENT)
        if done:
            return doing.result()
        self._say(worker, waits)
        try:
            return await doing
        finally:
            self._say(worker, None)
