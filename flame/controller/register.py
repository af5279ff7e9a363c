"""The register of computes: what users create, change, drain and delete.

A configuration is checked against its kind before it is kept. Whether the compute can be reached is another matter: one
that cannot is kept, says so, and is tried again, since machines are registered before they are up, and come and go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from flame.controller.computes import Site
from flame.controller.context import DEFAULT, Context
from flame.controller.placement import WORLD, Load, segments
from flame.errors import Conflict, FlameError, SpecError, UsageError
from flame.runners import read_config
from flame.runners.base import Capacity
from flame.runners.secret import masked, unmasked
from flame.spec.nouns import Compute
from flame.spec.quantities import parse_bytes
from flame.spec.records import ComputeRecord, ComputeStatus, ComputeUse

#: Seconds that who registers a compute waits to hear whether it can be reached.
TRYING = 10.0


class Register:
    """Computes as a resource.

    :param context: the controller's surroundings.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._computes = context.computes
        self._shelf = context.compute_shelf
        self._lock = asyncio.Lock()

    async def declare(self, forms: Sequence[Compute]) -> None:
        """Register what an operator declares at the start of the server, or bring it up to date. Before the computes are opened.

        :raises flame.errors.SpecError: a configuration does not fit its kind.
        """
        for form in forms:
            self._check(form)
        for form in forms:
            saved = await self._shelf.get(form.name)
            if saved is None:
                await self._shelf.insert(form.name, _record(form, created_at=time.time()))
                continue
            record = _record(form, created_at=saved.record.created_at, drained=saved.record.drained)
            if record != saved.record:
                await self._shelf.put(saved, record)

    async def ensure_default(self) -> None:
        """A new server where nobody has declared another compute has one: its own host. It is changed like any other."""
        if not await self._shelf.find(limit=1):
            record = ComputeRecord(id=DEFAULT, name=DEFAULT, kind=DEFAULT, region=WORLD, created_at=time.time())
            await self._shelf.insert(DEFAULT, record)

    async def create(self, form: Compute) -> ComputeStatus:
        """Register a compute.

        :raises flame.errors.SpecError: its configuration does not fit its kind.
        :raises flame.errors.Conflict: there is one of that name.
        """
        self._check(form)
        record = _record(form, created_at=time.time())
        async with self._lock:
            saved = await self._shelf.insert(record.id, record)
            site = self._computes.add(saved)
        return await self._tried(site)

    def all(self, after: str | None = None, limit: int = 100) -> list[ComputeStatus]:
        """The computes in order of their names."""
        sites = sorted(self._computes.sites(), key=lambda site: site.record.name)
        return [self._status(site) for site in sites if after is None or site.record.name > after][:limit]

    def get(self, name: str) -> ComputeStatus:
        """One compute.

        :raises flame.errors.NotFound: there is no such compute.
        """
        return self._status(self._computes.site(name))

    async def update(self, name: str, form: Compute) -> ComputeStatus:
        """Change a compute. What its workers need to be found again does not change while there are any.

        :param form: secrets in it that are ``***`` stay what they are.
        :raises flame.errors.Conflict: it has workers, and would become another place.
        """
        async with self._lock:
            site = self._computes.site(name)
            before = site.record
            if form.name != name:
                raise SpecError(f"a compute keeps its name: this is {name!r}, not {form.name!r}.", "name")
            form = msgspec.structs.replace(form, config=unmasked(form.config, before.config))
            self._check(form)
            record = _record(form, created_at=before.created_at, drained=before.drained)
            moved = (record.kind, record.config) != (before.kind, before.config)
            if moved and site.holdings:
                raise Conflict(
                    f"Compute {name!r} has {_workers(site)}, so its kind and configuration cannot change; drain it first."
                )
            await self._shelf.put(site.saved, record)
            if not moved:
                self._computes.changed()
                return self._status(site)
            await self._computes.remove(site)
            site = self._computes.add(site.saved)
        return await self._tried(site)

    async def drain(self, name: str, *, drained: bool = True) -> ComputeStatus:
        """Give a compute no new workers any more, or again. Those that are there go on to their end."""
        async with self._lock:
            site = self._computes.site(name)
            await self._shelf.put(site.saved, msgspec.structs.replace(site.record, drained=drained))
            self._computes.changed()
        return self._status(site)

    async def delete(self, name: str) -> None:
        """Take a compute from the register.

        :raises flame.errors.Conflict: it has workers.
        """
        async with self._lock:
            site = self._computes.site(name)
            if site.holdings:
                raise Conflict(f"Compute {name!r} has {_workers(site)}; drain it, and delete it when they have ended.")
            await self._shelf.delete(name)
            await self._computes.remove(site)

    async def _tried(self, site: Site) -> ComputeStatus:
        """The compute, once it is known whether it can be reached."""
        try:
            async with asyncio.timeout(TRYING):
                await site.tried.wait()
        except TimeoutError:
            pass
        return self._status(site)

    def _check(self, form: Compute) -> None:
        try:
            read_config(form.kind, form.config)
        except UsageError as error:  # a kind that there is not, in a form that is otherwise one
            raise SpecError(error.message, "kind") from error
        if form.memory is not None:
            parse_bytes(form.memory, "memory")
        if form.server and urlsplit(form.server).scheme not in ("http", "https"):
            raise SpecError(f"must be an address such as http://10.0.0.1:10100, not {form.server!r}.", "server")

    def _status(self, site: Site) -> ComputeStatus:
        record = site.record
        try:
            typed = read_config(record.kind, record.config)
        except FlameError:
            typed = None
        shown = msgspec.structs.asdict(msgspec.structs.replace(record, config=masked(record.config, typed)))
        state = "drained" if record.drained else "unreachable" if site.problem else "ready"
        return ComputeStatus(
            **shown,
            state=state,
            problem=site.problem,
            capacity=_use(self._computes.capacity(site)),
            used=_use(site.used),
        )


def _record(form: Compute, *, created_at: float, drained: bool = False) -> ComputeRecord:
    region = "/".join((WORLD, *segments(form.region)))
    fields = msgspec.structs.asdict(form) | {"region": region, "server": form.server.rstrip("/")}
    return ComputeRecord(id=form.name, **fields, created_at=created_at, drained=drained)


def _use(amounts: Capacity | Load) -> ComputeUse:
    return ComputeUse(slots=amounts[0], cpu=amounts[1], memory=amounts[2], gpu=amounts[3])


def _workers(site: Site) -> str:
    count = len(site.holdings)
    return f"{count} worker{'s' if count != 1 else ''}"
