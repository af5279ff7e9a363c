"""Executors as the server knows them: where each is, whom it serves, and what it has in hands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from flame.controller.placement import Load
from flame.controller.shelf import Saved
from flame.runners.base import WorkerInfo
from flame.sessions import wire
from flame.sessions.lifecycle import Work, follows
from flame.sessions.link import Link
from flame.sessions.scheduler import Held
from flame.spec.sessions import ExecutorRecord, ExecutorState

if TYPE_CHECKING:
    from flame.sessions.manager.live import Live

#: What runners call the job that executors belong to.
JOB = "executors"
#: Seconds without a word of an executor that has tasks ahead, after which it gives back those that it has not begun.
STALLED = 0.05


class Executor:
    """One executor.

    :ivar state: see :class:`flame.spec.sessions.ExecutorState`.
    :ivar live: the session that it serves, or is about to.
    :ivar link: its connection, while there is one.
    :ivar info: the worker, once it was started or found.
    :ivar leaving: it is being unbound, released or ended.
    :ivar releasing: it is being released or ended.
    :ivar lost: it is gone, or as good as gone.
    :ivar started: set once its runner has started it, or could not.
    :ivar gone: set once it has gone by itself.
    :ivar stalled: its task takes long, so nothing is given to it ahead.
    :ivar answered: frames of results on this connection that are in the store.
    """

    def __init__(self, id: str, record: ExecutorRecord, app: str) -> None:
        self.id = id
        self.record = record
        self.app = app
        self.saved: Saved[ExecutorRecord] | None = None
        self.state = record.state
        self.live: Live | None = None
        self.link: Link | None = None
        self.info: WorkerInfo | None = None
        self.leaving = False
        self.releasing = False
        self.lost = False
        self.began = time.monotonic()
        self.started = asyncio.Event()
        self.gone = asyncio.Event()
        self.stalled = False
        self.answered = 0
        self.heard = 0.0
        self.timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def ready(self) -> bool:
        """Whether tasks may go to it: it is there and bound. One that is still loading would keep them from those that are."""
        return self.link is not None and not self.leaving and self.state is ExecutorState.BOUND

    @property
    def awaited(self) -> bool:
        """Whether it may come back after a restart of the server, which does not know yet whom it serves."""
        return self.live is None and self.leaving and "reunion" in self.timers

    @property
    def load(self) -> Load:
        """The room that it takes."""
        record = self.record
        resources = record.resources
        return Load(record.slots, resources.cpu or 0.0, resources.memory_bytes or 0, resources.gpu)

    def become(self, state: ExecutorState) -> None:
        """Go from one state to the next.

        :raises ValueError: it is not one that follows.
        """
        if not follows(self.state, state):
            raise ValueError(f"executor {self.id} is {self.state.value} and cannot become {state.value}")
        self.state = state

    def held(self) -> Held:
        """It for the scheduler."""
        record = self.record
        return Held(
            id=self.id,
            node=record.compute,
            key=record.key,
            app=self.app,
            session=self.live.id if self.live is not None else None,
            ready=self.state is not ExecutorState.STARTING,
            busy=self.live is not None and bool(self.live.book.given(self.id)),
            leaving=self.leaving,
            back=self.awaited or (self.state is ExecutorState.UNBINDING and not self.releasing),
            slots=record.slots,
            cpu=record.resources.cpu or 0.0,
            memory=record.resources.memory_bytes or 0,
            gpu=record.resources.gpu,
        )

    def view(self) -> ExecutorRecord:
        """It as it is shown."""
        return msgspec.structs.replace(
            self.record,
            state=self.state,
            session=self.live.id if self.live is not None else None,
            worker=self.info.handle if self.info is not None else None,
        )

    def send(self, *message: object) -> None:
        """Send a message, if there is a connection; all that matters is said again when there is one."""
        if self.link is not None:
            self.link.send(*message)

    def give(self, works: list[Work]) -> None:
        """Send it tasks."""
        self.heard = asyncio.get_running_loop().time()
        self.send(wire.TASKS, self.answered, [(work.id, work.attempt, work.payload) for work in works])

    def after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Have something done later, unless it is called off; one of a name."""
        self.never(name)
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, self._ring, name, call)

    def never(self, name: str) -> None:
        """Call something off."""
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def silence(self) -> None:
        """Call everything off."""
        for name in list(self.timers):
            self.never(name)

    def _ring(self, name: str, call: Callable[[], None]) -> None:
        self.timers.pop(name, None)
        call()
