"""The manager of elastic sessions: puts the parts around the scheduler and the lifecycles together, and says when they begin and end.

Events come from clients (:mod:`clients`, to :mod:`register` and :mod:`tasks`), executors (:mod:`door`), runners (:mod:`tenant`) and
timers. Each changes the pure parts, is written by the :mod:`committer`, and leads to orders for executors (:mod:`pool`,
:mod:`serving`). The scheduler is asked by :mod:`looking`.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from flame.controller.controller import Controller
from flame.sessions.link import Link
from flame.sessions.manager import recovery
from flame.sessions.manager.apps import Apps
from flame.sessions.manager.door import Door
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.looking import Looking
from flame.sessions.manager.objects import Objects
from flame.sessions.manager.pool import Pool
from flame.sessions.manager.register import Register
from flame.sessions.manager.tasks import Tasks
from flame.sessions.manager.tenant import Tenant
from flame.sessions.manager.workers import Workers
from flame.spec.sessions import ExecutorState


class Numbers(NamedTuple):
    """How much there is now.

    :ivar sessions: those that are open.
    :ivar tasks: theirs, by state.
    :ivar executors: all of them, by state.
    """

    sessions: int
    tasks: dict[str, int]
    executors: dict[str, int]


class Manager:
    """All sessions of a server. Made by :meth:`open`, let go of by :meth:`close`; the executors outlive it.

    :param controller: whose store, keys and computes it shares.
    :ivar apps: the registered applications.
    :ivar objects: what sessions keep once for all their tasks.
    :ivar register: the sessions.
    :ivar tasks: their tasks.
    :ivar door: where executors come in.
    """

    def __init__(self, controller: Controller) -> None:
        context = self.context = controller.context
        self._floor = floor = Floor(context)
        self.apps = Apps(context)
        self.objects = Objects(context.store, context.place, context.options.largest_artifact)
        self._workers = Workers(floor, self.objects)
        self._pool = pool = Pool(floor, self._workers, self._wake)
        self._looking = Looking(floor, pool)
        self.register = Register(floor, pool, self.apps, self.objects, controller.catalog, wake=self._wake)
        self.tasks = Tasks(floor, pool, self.register, self._wake)
        self.door = Door(floor, pool, self._looking)
        context.computes.add_tenant(Tenant(floor, pool, self._workers, self._wake))

    def _wake(self) -> None:
        self._looking.wake()

    async def open(self) -> None:
        """Take up the sessions that are open, and the executors that are there."""
        await recovery.sessions(self._floor, self.register, self.apps)
        await recovery.executors(self._floor, self._pool, self._workers)
        self._floor.open = True
        self._wake()

    async def close(self) -> None:
        """Let go. Executors go on, and look for the next process of the server."""
        self._floor.open = False
        self._looking.stop()
        await self._floor.committer.settled()
        for executor in self._floor.executors.values():
            executor.silence()

    def disconnect(self) -> None:
        """Close the connections of executors and clients; they look for the next process of the server."""
        self._floor.open = False
        for link in list(self._floor.links):
            link.close()

    def numbers(self) -> Numbers:
        """How much there is now, for a monitor. Every state is named, so that a series does not end when it comes to nought."""
        tasks = Counter(pending=0, running=0, succeed=0, failed=0, cancelled=0)
        for live in self._floor.lives.values():
            counts = live.counts
            tasks.update({state: getattr(counts, state) for state in tasks})
        executors = Counter({state.value: 0 for state in ExecutorState if state is not ExecutorState.RELEASED})
        executors.update(one.state.value for one in self._floor.executors.values())
        return Numbers(len(self._floor.lives), dict(tasks), dict(executors))

    def join(self, link: Link) -> None:
        """A client's connection is there."""
        self._floor.links.add(link)

    def part(self, link: Link) -> None:
        """A client's connection is over."""
        self._floor.links.discard(link)

    async def stop_all(self) -> None:
        """End all executors: a private server takes them with it."""
        for name in list(self._floor.lives):
            await self.register.close(name, force=True)
        self._floor.open = False
        for executor in list(self._floor.executors.values()):
            self._pool.lose(executor, "The server ends.")
        await self.context.background.drain()
