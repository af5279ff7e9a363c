"""What everything in the controller works with, in one place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from flame.artifacts import Artifacts
from flame.controller.artifacts import JobArtifacts
from flame.controller.bundles import Bundles
from flame.controller.checkpoints import Checkpoints
from flame.controller.computes import Computes
from flame.controller.keys import Keys
from flame.controller.leases import Leases
from flame.controller.logs import Logs
from flame.controller.shelf import Shelf
from flame.controller.standing import Standing
from flame.notifier import Notifier
from flame.runners.base import Runner
from flame.spec.nouns import Broker, Registry
from flame.spec.records import ComputeRecord, DatasetRecord, Design, Invite, Job, Task
from flame.store import Store

log = logging.getLogger("flame.controller")

#: The compute that there is from the start: the server's own host.
DEFAULT = "local"


class StoredTask(Task, kw_only=True):
    """A task with what the server alone needs to know of it.

    :ivar replaced: how many lost workers were replaced.
    :ivar delivered: it has handed in the job's model, or its group's.
    :ivar owes: it has something of its own to hand in.
    :ivar holder: by which the participant who has taken it is known again: the SHA-256 of its secret.
    :ivar invite: the id of the invite that the participant came with.
    :ivar handed_in: the names of the artifacts that its workers have handed in, or begun to.
    """

    replaced: int = 0
    delivered: bool = False
    owes: bool = False
    holder: str | None = None
    invite: str | None = None
    handed_in: list[str] = msgspec.field(default_factory=list)


class StoredInvite(Invite, kw_only=True):
    """An invite with what only the server keeps: its token's digest, and who has come with it, by the digests of their secrets."""

    digest: str
    holders: list[str] = msgspec.field(default_factory=list)


def public(task: StoredTask) -> Task:
    """A task as it is shown."""
    return Task(**{name: getattr(task, name) for name in Task.__struct_fields__})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an operator chooses.

    :ivar data_dir: the server's data directory.
    :ivar server: the address at which workers reach the server.
    :ivar slots: how many workers may be on the default compute at once; None: what is registered, or it says itself.
    :ivar lease: after how many seconds without a word a worker counts as lost.
    :ivar deploy: after how many seconds a worker counts as lost that has never said a word.
    :ivar reunion: after how many seconds a worker counts as lost, at the earliest, that a restarted server has not heard of:
        it must notice that the server is back.
    :ivar grace: how many seconds a worker gets to end by itself when it is asked to.
    :ivar parting: how many seconds a worker gets to leave once its task has ended.
    :ivar registry: where metrics and models go when a job does not say.
    :ivar brokers: meeting points of backends, for jobs that name none of that sort.
    :ivar largest_artifact: in bytes.
    :ivar worker_environment: variables for every worker that the server starts: whom to trust, and what to show.
    :ivar p2p_tls: give the workers of a job certificates of the job's own authority, to speak TLS with each other.
    """

    data_dir: Path
    server: str = "http://127.0.0.1:10100"
    slots: int | None = None
    lease: float = 20.0
    deploy: float = 120.0
    reunion: float = 15.0
    grace: float = 5.0
    parting: float = 5.0
    registry: Registry = field(default_factory=lambda: Registry(sort="local"))
    brokers: tuple[Broker, ...] = ()
    largest_artifact: int = 64 << 30
    worker_environment: Mapping[str, str] = field(default_factory=dict)
    p2p_tls: bool = False


class Background:
    """Coroutines that run beside the requests. A failure of one is logged; none is forgotten."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine from now on; after :meth:`close` nothing begins any more."""
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def drain(self) -> None:
        """Wait until nothing runs any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Cancel what still runs."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("something in the background failed: %s", error, exc_info=error)


class Context:
    """The controller's surroundings: state, streams, computes, files, keys and the operator's choices.

    :param make: makes the runner of a compute.
    :param artifacts: where artifacts are kept.
    :param lost: told the key of a lease that ran out, ``(job, task, attempt)``.
    """

    def __init__(
        self,
        store: Store,
        notifier: Notifier,
        make: Callable[[ComputeRecord], Runner],
        keys: Keys,
        options: Options,
        *,
        artifacts: Artifacts,
        lost: Callable[[Any], None],
    ) -> None:
        self.store = store
        self.place = artifacts
        self.notifier = notifier
        self.keys = keys
        self.options = options
        slots = {DEFAULT: options.slots} if options.slots else {}
        self.compute_shelf: Shelf[ComputeRecord] = Shelf(store, "computes", ComputeRecord)
        self.computes = Computes(self.compute_shelf, make, server=options.server, slots=slots)
        self.leases = Leases(options.lease, lost)
        self.logs = Logs(options.data_dir / "logs", artifacts)
        self.artifacts = JobArtifacts(artifacts, options.largest_artifact)
        self.checkpoints = Checkpoints(artifacts, options.data_dir, options.largest_artifact)
        self.bundles = Bundles(store, artifacts)
        self.background = Background()
        self.standing = Standing()
        self.jobs: Shelf[Job] = Shelf(store, "jobs", Job)
        self.tasks: Shelf[StoredTask] = Shelf(store, "tasks", StoredTask)
        self.designs: Shelf[Design] = Shelf(store, "designs", Design)
        self.invites: Shelf[StoredInvite] = Shelf(store, "invites", StoredInvite)
        self.datasets: Shelf[DatasetRecord] = Shelf(store, "datasets", DatasetRecord)
