"""The places that run workers: which there are, whether they can be reached, and what room they have.

Jobs and sessions take their room from the same computes. Each is a :class:`Tenant`: it takes a place for a worker, starts
the worker by the place's runner, and gives the place back when nothing of the worker is left. What is taken is kept in memory
alone; a restarted server takes it again for the workers that it finds.

A compute that cannot be reached takes no new workers and is tried again. Its workers are not lost by that: they go on, their
tenants wait for their leases, and when the compute is back the tenants are told which workers it really has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from flame.controller.placement import Load, Need, Room, candidates, fit, load_of, total
from flame.controller.shelf import Saved, Shelf
from flame.errors import FlameError, NotFound, RunnerError
from flame.runners.base import Capacity, Runner, WorkerExit, WorkerInfo
from flame.spec.nouns import Resources
from flame.spec.quantities import parse_bytes
from flame.spec.records import ComputeRecord

log = logging.getLogger("flame.controller")

#: Seconds that a starting server waits for its computes; those that take longer join later.
PATIENCE = 5.0
#: Seconds after which an attempt to reach a compute has failed.
CONNECTING = 30.0
#: Seconds before a compute that cannot be reached is tried again the first time; doubles with each further one.
AGAIN = 1.0
#: Seconds between two looks at what a compute has, and whether it is there.
LOOK = 20.0


class Tenant(Protocol):
    """Who has workers on computes: the jobs, the sessions."""

    def owns(self, worker: WorkerInfo) -> bool:
        """Whether a worker is one of ours, by its job and task."""

    def exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        """The runner has seen the end of one of our workers that nobody asked to end."""

    def news(self, worker: WorkerInfo, message: str | None) -> None:
        """What one of our workers waits for before it runs, or why its compute takes it away; None when neither."""

    def freed(self) -> None:
        """There may be room that was not there before."""

    def found(self, compute: str, workers: Sequence[WorkerInfo], asked: float) -> None:
        """A compute is back, and has these workers of ours: what it does not have has ended.

        :param asked: when it was asked (``time.monotonic()``); workers that were started since may be missing.
        """


class Place(NamedTuple):
    """Where a worker may be started; None where there is no room now, and ``reason`` then says why."""

    compute: str | None
    reason: str | None = None


class Site:
    """One compute: its record, what runs its workers, and who has taken how much of it.

    :ivar problem: why it cannot be used, in a sentence; None where it can.
    :ivar found: the workers that it had when it was reached.
    :ivar tried: set once it was reached, or could not be.
    """

    def __init__(self, saved: Saved[ComputeRecord]) -> None:
        self.saved = saved
        self.runner: Runner | None = None
        self.problem: str | None = "It has not answered yet."
        self.capacity = Capacity()
        self.found: Sequence[WorkerInfo] = ()
        self.tried = asyncio.Event()
        self.keeper: asyncio.Task[None] | None = None
        self.holdings: dict[Hashable, Load] = {}
        self._used: Load | None = Load()

    @property
    def record(self) -> ComputeRecord:
        """The compute as it is registered."""
        return self.saved.record

    @property
    def used(self) -> Load:
        """What is taken."""
        if self._used is None:
            self._used = total(self.holdings.values())
        return self._used

    def hold(self, key: Hashable, load: Load) -> None:
        """Take room."""
        self.holdings[key] = load
        self._used = None

    def give(self, key: Hashable) -> None:
        """Give room back."""
        del self.holdings[key]
        self._used = None

    @property
    def closed(self) -> str | None:
        """Why it takes no new workers, as the end of a sentence about it."""
        if self.record.drained:
            return "is drained"
        return None if self.problem is None else f"cannot be used now: {self.problem}"


class Computes:
    """All computes of a server.

    :param shelf: where they are registered.
    :param make: makes the runner of one.
    :param server: the server's own address, for workers of computes that name none.
    :param slots: by name, how many workers an operator allows, whatever is registered.
    """

    def __init__(
        self,
        shelf: Shelf[ComputeRecord],
        make: Callable[[ComputeRecord], Runner],
        *,
        server: str,
        slots: Mapping[str, int] | None = None,
    ) -> None:
        self._shelf = shelf
        self._make = make
        self._server = server
        self._slots = dict(slots or {})
        self._sites: dict[str, Site] = {}
        self._homes: dict[Hashable, Site] = {}
        self._tenants: list[Tenant] = []
        self._settled = False
        self._background: set[asyncio.Task[None]] = set()
        self._reserved: frozenset[str] = frozenset()

    # ------------------------------------------------------------------------------------------ coming and going

    def add_tenant(self, tenant: Tenant) -> None:
        """Somebody has workers here. To be said before :meth:`open`."""
        self._tenants.append(tenant)

    async def open(self) -> None:
        """Reach every registered compute, all at once. Those that cannot be reached, or not soon, are tried on."""
        for saved in sorted(await self._shelf.all(), key=lambda one: (one.record.created_at, one.id)):
            self.add(saved)
        tries = [asyncio.ensure_future(site.tried.wait()) for site in self._sites.values()]
        if tries:
            _, late = await asyncio.wait(tries, timeout=PATIENCE)
            for one in late:
                one.cancel()

    def add(self, saved: Saved[ComputeRecord]) -> Site:
        """Have a compute from now on."""
        site = self._sites[saved.id] = Site(saved)
        site.keeper = asyncio.get_running_loop().create_task(self._keep(site))
        return site

    async def remove(self, site: Site) -> None:
        """Let go of a compute."""
        del self._sites[site.record.name]
        await self._leave(site)

    def settle(self) -> None:
        """The tenants have taken up what an earlier process has left: end what belongs to none of them."""
        self._settled = True
        for site in self._sites.values():
            self._end_strangers(site, site.found)

    async def close(self) -> None:
        """Let go of all computes; the workers go on."""
        await asyncio.gather(*(self._leave(site) for site in self._sites.values()))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _leave(self, site: Site) -> None:
        if site.keeper is not None:
            site.keeper.cancel()
            await asyncio.wait([site.keeper])
        if site.runner is not None:
            await site.runner.close()

    # ---------------------------------------------------------------------------------------------- what is there

    def sites(self) -> list[Site]:
        """All computes, in the order in which they were registered."""
        return list(self._sites.values())

    def site(self, name: str) -> Site:
        """One compute.

        :raises flame.errors.NotFound: there is no such compute.
        """
        site = self._sites.get(name)
        if site is None:
            raise NotFound(f"There is no compute {name!r}.")
        return site

    def runner(self, name: str | None) -> Runner:
        """What runs a compute's workers.

        :raises flame.errors.RunnerError: it is not registered any more, or was never reached.
        """
        site = self._sites.get(name or "")
        if site is None:
            raise RunnerError(f"There is no compute {name!r} any more.")
        if site.runner is None:
            raise RunnerError(f"Compute {name!r} cannot be used now: {site.problem}")
        return site.runner

    def reachable(self, name: str | None) -> bool:
        """Whether it is known which workers a compute has."""
        site = self._sites.get(name or "")
        return site is not None and site.problem is None

    def server(self, name: str) -> str:
        """The address at which a compute's workers reach the server."""
        site = self._sites.get(name)
        return (site.record.server if site is not None else "") or self._server

    def there(self) -> dict[str, Sequence[WorkerInfo]]:
        """Which workers each compute that could be reached had when it was."""
        return {name: site.found for name, site in self._sites.items() if site.problem is None}

    # ------------------------------------------------------------------------------------------------------- room

    def rooms(self) -> list[Room]:
        """The computes as placement sees them."""
        return [
            Room(site.record.name, site.record.region, self.capacity(site), site.used, site.closed)
            for site in self._sites.values()
        ]

    def capacity(self, site: Site) -> Capacity:
        """What is on a compute in all: what is registered, else what it says itself."""
        record, own = site.record, site.capacity
        return Capacity(
            slots=self._slots.get(record.name) or record.slots or own.slots,
            cpu=own.cpu if record.cpu is None else record.cpu,
            memory=own.memory if record.memory is None else parse_bytes(record.memory),
            gpu=own.gpu if record.gpu is None else record.gpu,
        )

    @property
    def used(self) -> int:
        """How many workers there are, or have been promised room."""
        return len(self._homes)

    def take(self, key: Hashable, resources: Resources, realms: Sequence[str] = (), *, label: str = "worker") -> Place:
        """Take a place for one worker, on any compute that serves all of the realms.

        :param key: by which it is given back.
        :param label: what to call the worker in the reason.
        """
        need = Need("", label, load_of(resources), tuple(realms))
        found = fit([need], self.rooms(), barred=self._reserved)
        if found.reason is not None:
            return Place(None, found.reason)
        self.hold(key, found.chosen[""], need.load)
        return Place(found.chosen[""])

    def hold(self, key: Hashable, compute: str, load: Load) -> None:
        """Take room on a certain compute, whether it is there or not: for a worker that is there, or was placed by other means."""
        self.give(key)
        site = self._sites.get(compute)
        if site is not None:
            site.hold(key, load)
            self._homes[key] = site

    def give(self, key: Hashable) -> None:
        """Give room back; none of that key is no error."""
        site = self._homes.pop(key, None)
        if site is not None:
            site.give(key)
            self.changed()

    @property
    def reserved(self) -> frozenset[str]:
        """The computes whose room jobs wait for."""
        return self._reserved

    def reserve(self, computes: frozenset[str]) -> None:
        """Jobs wait for the room of these computes: nobody else gets any of it."""
        if computes != self._reserved:
            self._reserved = computes
            self.changed()

    def changed(self) -> None:
        """There may be room that was not there before."""
        for tenant in self._tenants:
            tenant.freed()

    def elsewhere(self, need: Need, last: str | None, avoid: Collection[str]) -> str:
        """Where a worker is started anew. There is always an answer, if need be one where it is crowded.

        :param last: where it was.
        :param avoid: where starting workers has failed.
        """
        rooms = self.rooms()
        if last in self._sites and last not in avoid and self._sites[last].closed is None:
            return last
        better = fit([need], [room for room in rooms if room.name not in avoid])
        if better.chosen:
            return better.chosen[need.key]
        if last in self._sites:
            return last
        served = candidates(need.realms, rooms)
        return min(served, key=served.__getitem__, default="")

    async def end(self, compute: str, worker: WorkerInfo) -> None:
        """End a worker that nobody counts on, and remove what it leaves."""
        try:
            runner = self.runner(compute)
            await runner.end(worker)
            await runner.clean(worker)
        except RunnerError as error:
            log.error("worker %s cannot be ended: %s", worker.handle, error)

    # ---------------------------------------------------------------------------------------------- keeping watch

    async def _keep(self, site: Site) -> None:
        """Reach a compute, and look now and then whether it is there and what it has."""
        pause = AGAIN
        while True:
            try:
                async with asyncio.timeout(CONNECTING):
                    await self._look(site)
            except TimeoutError:
                self._away(site, f"It does not answer within {CONNECTING:g} s.")
            except FlameError as error:
                self._away(site, error.message)
            except Exception as error:
                log.exception("the runner of compute %s has a fault", site.record.name)
                self._away(site, f"Its runner has a fault: {type(error).__name__}: {error}.")
            else:
                pause = AGAIN
            site.tried.set()
            await asyncio.sleep(pause if site.problem else LOOK)
            pause = min(2 * pause, LOOK)

    async def _look(self, site: Site) -> None:
        if site.runner is None:
            runner = self._make(site.record)
            runner.on_news = self._news
            try:
                await runner.open(self._exited)
            except BaseException:
                with contextlib.suppress(FlameError):
                    await runner.close()
                raise
            site.runner = runner
        capacity = await site.runner.capacity()
        if site.problem is not None:
            asked = time.monotonic()
            site.found = await site.runner.list()
            log.info("compute %s (%s) has %d workers", site.record.name, site.record.kind, len(site.found))
            site.problem = None
            if self._settled:
                for tenant in self._tenants:
                    tenant.found(site.record.name, [one for one in site.found if tenant.owns(one)], asked)
                self._end_strangers(site, site.found)
            self.changed()
        if capacity != site.capacity:
            site.capacity = capacity
            self.changed()

    def _away(self, site: Site, problem: str) -> None:
        if site.problem != problem:
            log.warning("compute %s cannot be used: %s", site.record.name, problem)
            site.problem = problem
            self.changed()

    def _exited(self, worker: WorkerInfo, how: WorkerExit) -> None:
        for tenant in self._tenants:
            if tenant.owns(worker):
                tenant.exited(worker, how)

    def _news(self, worker: WorkerInfo, message: str | None) -> None:
        for tenant in self._tenants:
            if tenant.owns(worker):
                tenant.news(worker, message)

    def _end_strangers(self, site: Site, workers: Iterable[WorkerInfo]) -> None:
        for worker in workers:
            if not any(tenant.owns(worker) for tenant in self._tenants):
                name = site.record.name
                log.warning(
                    "worker %s of task %s on %s belongs to nobody; it is ended", worker.handle, worker.task, name
                )
                task = asyncio.get_running_loop().create_task(self.end(name, worker))
                self._background.add(task)
                task.add_done_callback(self._background.discard)


async def clean(computes: Computes, compute: str | None, worker: WorkerInfo) -> None:
    """Remove what an ended worker has left, where that can be reached."""
    try:
        await computes.runner(compute).clean(worker)
    except RunnerError as error:
        log.warning("what worker %s.%d has left is not removed: %s", worker.task, worker.attempt, error)
