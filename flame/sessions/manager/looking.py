"""The shell of the scheduler: when it is asked who should have which executor, and what is done about its answer.

It is asked when something has happened that may change that, at most every :data:`CALM` seconds while there is no room for
everyone; a session's tasks go to the executors that it has without asking anyone.
"""

from __future__ import annotations

import asyncio

from flame.sessions.manager.floor import Floor
from flame.sessions.manager.pool import Pool
from flame.sessions.scheduler import Bind, Release, Service, Start, Unbind, plan

#: Seconds between two looks of the scheduler while sessions wait for each other.
CALM = 0.02


class Looking:
    """Looks at who should have which executor."""

    def __init__(self, floor: Floor, pool: Pool) -> None:
        self._floor = floor
        self._pool = pool
        self._service = Service()
        self._next: asyncio.Handle | None = None
        self._last = 0.0
        self._contended = False

    def wake(self) -> None:
        """Look at who should have which executor: once, when what happens now has happened, and not too often."""
        if self._next is None and self._floor.open:
            loop = asyncio.get_running_loop()
            rest = self._last + CALM - loop.time() if self._contended else 0.0
            self._next = loop.call_later(rest, self._look) if rest > 0 else loop.call_soon(self._look)

    def glance(self) -> None:
        """An executor has got on with its tasks: while sessions wait for each other, it may be somebody else's turn."""
        if self._contended:
            self.wake()

    def stop(self) -> None:
        """Don't look again."""
        if self._next is not None:
            self._next.cancel()

    def _look(self) -> None:
        self._next = None
        self._last = asyncio.get_running_loop().time()
        needs = [live.need() for live in self._floor.lives.values()]
        wanting = [need for need in needs if need.wants or self._floor.lives[need.id].executors]
        slots = {need.id: self._floor.lives[need.id].held * need.slots / need.weight for need in wanting}
        lacking = [need.id for need in wanting if need.wants > self._floor.lives[need.id].held and not need.blocked]
        self._service.note(self._last, slots, lacking)
        needs = [need._replace(had=self._service.had.get(need.id, 0.0)) for need in wanting]
        caps = {
            live.app: live.application.max_instances
            for live in self._floor.lives.values()
            if live.application.max_instances is not None
        }
        for executor in list(self._floor.executors.values()):
            if (
                self._floor.ground.wanted(executor) and "idle" in executor.timers
            ):  # it does nothing, and jobs wait for its room
                executor.never("idle")
                self._pool.let_go(executor)
        held = [executor.held() for executor in self._floor.executors.values()]
        nodes = self._floor.ground.nodes(self._floor.executors.values())
        actions = plan(needs, nodes, held, caps)
        for action in actions:
            if isinstance(action, Start):
                self._pool.start(self._floor.lives[action.session], action.node)
            elif isinstance(action, Bind):
                self._pool.bind(self._floor.executors[action.executor], self._floor.lives[action.session])
            elif isinstance(action, Unbind):
                self._pool.unbind(self._floor.executors[action.executor])
            elif isinstance(action, Release):
                self._pool.release(self._floor.executors[action.executor])
        self._contended = any(need.wants > self._floor.lives[need.id].held and not need.blocked for need in needs)
