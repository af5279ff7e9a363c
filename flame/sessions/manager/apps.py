"""Registered applications, and the code and data that sessions bring along."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from flame.controller.context import Context
from flame.controller.shelf import Saved, Shelf
from flame.errors import Conflict, FlameError, NotFound, SpecError
from flame.spec import bundle
from flame.spec.sessions import Application, AppRecord, SessionForm

_KEPT = 64

#: Whether who asks may see a record.
Sees = Callable[[Any], bool]


class NeedsBundle(FlameError):
    """A bundle has to be uploaded first.

    :ivar digest: which.
    """

    status = 409

    def __init__(self, digest: str) -> None:
        super().__init__(f"The bundle {digest} is not there; upload it first.")
        self.digest = digest


class Apps:
    """All applications of a server.

    :param context: the controller's surroundings, with the state and the bundles.
    """

    def __init__(self, context: Context) -> None:
        self._bundles = context.bundles
        self._shelf: Shelf[AppRecord] = Shelf(context.store, "apps", AppRecord)
        self._names = asyncio.Lock()
        self._unpacked: dict[str, dict[str, bytes]] = {}

    async def create(self, application: Application, *, project: str, owner: str) -> AppRecord:
        """Register an application under its name.

        :raises flame.errors.Conflict: the project has one of that name.
        """
        await self._check(application)
        async with self._names:
            if await self._named(application.name, project) is not None:
                raise Conflict(f"There is an application named {application.name!r} already.")
            now = time.time()
            record = AppRecord(
                id=secrets.token_hex(12),
                name=application.name,
                application=application,
                code=application.code,
                created_at=now,
                updated_at=now,
                project=project,
                owner=owner,
            )
            await self._shelf.insert(record.id, record)
        return record

    async def list(self, after: str | None, limit: int) -> list[AppRecord]:
        """The applications in order of their ids."""
        return [saved.record for saved in await self._shelf.find(after=after, limit=limit)]

    async def get(self, id: str) -> AppRecord:
        """An application.

        :raises flame.errors.NotFound: there is none.
        """
        return (await self._saved(id)).record

    async def update(self, id: str, application: Application) -> AppRecord:
        """Change an application; sessions that are open go on with what it was.

        :raises flame.errors.Conflict: another one has that name.
        """
        await self._check(application)
        async with self._names:
            saved = await self._saved(id)
            other = await self._named(application.name, saved.record.project)
            if other is not None and other.id != id:
                raise Conflict(f"There is an application named {application.name!r} already.")
            record = msgspec.structs.replace(
                saved.record,
                name=application.name,
                application=application,
                code=application.code,
                updated_at=time.time(),
            )
            await self._shelf.put(saved, record)
        return record

    async def delete(self, id: str) -> None:
        """Remove an application; sessions that are open go on."""
        await self._saved(id)
        await self._shelf.delete(id)

    async def resolve(self, form: SessionForm, sees: Sees) -> Application:
        """The application of a session.

        :raises flame.errors.NotFound: there is none of that name or id.
        """
        if (form.app is None) == (form.application is None):
            raise SpecError("give either app, the name of a registered one, or application.", "session")
        application = form.application
        if application is None:
            assert form.app is not None
            saved = await self._shelf.get(form.app)
            found = [saved] if saved is not None else await self._shelf.all({"name": form.app})
            mine = [one.record for one in found if sees(one.record)]
            if not mine:
                raise NotFound(f"There is no application {form.app!r}.")
            application = mine[0].application
        return application

    async def load(self, code: str | None) -> dict[str, bytes]:
        """The files of a bundle.

        :raises NeedsBundle: it is not there.
        """
        if code is None:
            return {}
        if code not in self._unpacked:
            files = await asyncio.to_thread(_files, await self.bundle(code))
            while len(self._unpacked) >= _KEPT:
                del self._unpacked[next(iter(self._unpacked))]
            self._unpacked[code] = files
        return self._unpacked[code]

    def forget(self, code: str | None) -> None:
        """A bundle may be removed: whoever wants it next must look whether it is there."""
        if code is not None:
            self._unpacked.pop(code, None)

    async def bundle(self, digest: str) -> bytes:
        """A bundle.

        :raises NeedsBundle: it is not there.
        """
        data = await self._bundles.get(digest)
        if data is None:
            raise NeedsBundle(digest)
        return data

    async def keep(self, digest: str, data: bytes) -> None:
        """Keep a bundle that a client has sent.

        :raises flame.errors.SpecError: it has another digest.
        """
        if await asyncio.to_thread(bundle.digest, data) != digest:
            raise SpecError("a bundle was damaged on its way.", digest)
        await self._bundles.put(data)

    async def _check(self, application: Application) -> None:
        if not application.name:
            raise SpecError("an application that is registered needs a name.", "name")
        if application.code is not None and await self._bundles.get(application.code) is None:
            raise SpecError(f"the code bundle {application.code} is not there; upload it first.", "code")

    async def _named(self, name: str, project: str) -> AppRecord | None:
        found = await self._shelf.all({"name": name})
        return next((one.record for one in found if one.record.project == project), None)

    async def _saved(self, id: str) -> Saved[AppRecord]:
        saved = await self._shelf.get(id)
        if saved is None:
            raise NotFound(f"There is no application {id!r}.")
        return saved


def _files(data: bytes) -> dict[str, bytes]:
    return {"/".join(path): content for path, content in bundle.contents(data).items()}
