"""The life of sessions: opened, given what they share, found, closed, and removed."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterable, Callable

import msgspec

from flame.controller.catalog import Catalog
from flame.controller.shelf import Saved
from flame.errors import Conflict, FlameError, NotFound, SpecError
from flame.sessions.lifecycle import check_close, check_same
from flame.sessions.manager import journal
from flame.sessions.manager.apps import Apps, Sees
from flame.sessions.manager.floor import Floor
from flame.sessions.manager.live import Live
from flame.sessions.manager.objects import Objects
from flame.sessions.manager.pool import Pool
from flame.spec.sessions import SessionForm, SessionRecord, SessionState

log = logging.getLogger("flame.sessions")

#: Seconds between two looks at closed sessions.
RETIRING = 600.0


class Register:
    """All sessions: those that are open, and those that are closed and not yet removed.

    :param catalog: who else needs the code of an application.
    :param wake: called when a session may need executors, or has left some.
    """

    def __init__(
        self, floor: Floor, pool: Pool, apps: Apps, objects: Objects, catalog: Catalog, *, wake: Callable[[], None]
    ) -> None:
        self._floor = floor
        self._pool = pool
        self._apps = apps
        self._objects = objects
        self._catalog = catalog
        self._wake = wake
        self._opening = asyncio.Lock()
        self._order = 0

    async def open(self, form: SessionForm, *, project: str, owner: str, sees: Sees) -> Live:
        """Open a session, or give the one that is open under this id.

        :param sees: whether who asks may see a record.
        :raises flame.errors.Conflict: the id is that of a closed session, or of one that was opened with something else.
        :raises flame.errors.NotFound: there is no such application.
        """
        if form.id is None:
            return await self._open_new(form, project, owner, sees)
        async with self._opening:
            live = self._floor.lives.get(form.id)
            if live is not None:
                if not sees(live.saved.record):
                    raise Conflict(f"There is a session {form.id!r} already; choose another id.")
                check_same(form, live.form, SessionState.OPEN)
                return live
            saved = await self._floor.sessions.get(form.id)
            if saved is not None and not sees(saved.record):
                raise Conflict(f"There is a session {form.id!r} already; choose another id.")
            if saved is not None:
                check_same(form, saved.record.form, saved.record.state)
            return await self._open_new(form, project, owner, sees)

    async def _open_new(self, form: SessionForm, project: str, owner: str, sees: Sees) -> Live:
        application = await self._apps.resolve(form, sees)
        if form.max_instances is not None and form.max_instances < max(form.min_instances, form.batch_size):
            raise SpecError("is smaller than minInstances or batchSize, so nothing could ever run.", "maxInstances")
        files = await self._apps.load(application.code)
        record = SessionRecord(
            id=form.id or f"{int(time.time() * 1000):012x}{secrets.token_hex(6)}",
            state=SessionState.OPEN,
            form=form,
            application=application,
            code=application.code,
            created_at=time.time(),
            project=project,
            owner=owner,
        )
        saved = await self._floor.sessions.insert(record.id, record)
        live = self.admit(saved)
        live.files = files
        await self.look_for_common(live)
        if live.lacks:
            self._wake()
        return live

    def admit(self, saved: Saved[SessionRecord]) -> Live:
        """Have a session among those that are open, in line after them."""
        self._order += 1
        live = self._floor.lives[saved.id] = Live(saved, self._order)
        return live

    async def look_for_common(self, live: Live) -> None:
        """See whether a session's client has yet to bring the common data."""
        digest = live.form.common_digest
        live.awaits = None if digest is None or await self._objects.has(live.id, digest) else digest

    async def bring(self, id: str, digest: str, data: AsyncIterable[bytes]) -> None:
        """A session gets an object; it may be the common data that it waits for.

        :raises flame.errors.NotFound: there is no such session.
        :raises flame.errors.Conflict: it is closed.
        """
        live = self._floor.lives.get(id)
        if live is None or live.closing:
            await self.get(id)
            raise Conflict(f"Session {id} is closed.")
        await self._objects.put(id, digest, data)
        if id not in self._floor.lives:  # closed while the object was on its way
            await self._objects.drop(id)
        if live.awaits == digest:
            live.awaits = None
            self._wake()

    async def find(self, state: SessionState | None, after: str | None, limit: int) -> list[SessionRecord]:
        """Sessions in order of their ids."""
        where = {"state": state.value} if state is not None else None
        found = await self._floor.sessions.find(where, after=after, limit=limit)
        return [
            self._floor.lives[saved.id].view() if saved.id in self._floor.lives else saved.record for saved in found
        ]

    async def get(self, id: str) -> SessionRecord:
        """A session.

        :raises flame.errors.NotFound: there is none.
        """
        live = self._floor.lives.get(id)
        if live is not None:
            return live.view()
        saved = await self._floor.sessions.get(id)
        if saved is None:
            raise NotFound(f"There is no session {id!r}.")
        return saved.record

    def live(self, id: str) -> Live | None:
        """An open session."""
        return self._floor.lives.get(id)

    async def close(self, id: str, *, force: bool = False) -> SessionRecord:
        """Close a session: what waits is cancelled. One that is closed stays so.

        :raises flame.errors.Conflict: a task runs, and ``force`` is not given.
        """
        live = self._floor.lives.get(id)
        if live is None:
            return await self.get(id)
        check_close(live.counts, id, force=force)
        live.closing = True
        executors = list(live.executors.values())
        busy = [one for one in executors if live.book.given(one.id)]
        self._floor.committer.ended(live, live.book.close())
        for executor in busy:
            self._pool.lose(executor, "Its session was closed by force.")
        for executor in executors:
            if executor not in busy:
                self._pool.unbind(executor)
        done = asyncio.get_running_loop().create_future()
        self._floor.committer.touch(live, lambda: done.set_result(None))
        await done
        record = msgspec.structs.replace(
            live.saved.record, state=SessionState.CLOSED, counts=live.counts, closed_at=time.time(), reason=live.reason
        )
        await self._floor.sessions.put(live.saved, record)
        self._floor.lives.pop(id, None)
        await self._objects.drop(id)
        live.tell()
        self._wake()
        return record

    async def delete(self, id: str) -> None:
        """Remove a closed session, with what is known of its tasks.

        :raises flame.errors.Conflict: it is open.
        """
        record = await self.get(id)
        if id in self._floor.lives:
            raise Conflict(f"Session {id} is open; close it before you delete it.")
        await self._floor.context.store.forget(journal.name(id))
        await self._floor.sessions.delete(id)
        await self._release_code(record.code)

    async def delete_app(self, id: str) -> None:
        """Remove an application; sessions that are open go on."""
        record = await self._apps.get(id)
        await self._apps.delete(id)
        await self._release_code(record.code)

    async def _release_code(self, code: str | None) -> None:
        self._apps.forget(code)
        await self._catalog.release(code)

    async def retire(self, seconds: float) -> None:
        """Remove closed sessions when they are so old; looks again and again, for ever."""
        while True:
            try:
                await self.sweep(time.time() - seconds)
            except FlameError as error:
                log.error("closed sessions cannot be cleaned up: %s", error)
            await asyncio.sleep(RETIRING)

    async def sweep(self, before: float) -> list[str]:
        """Remove the sessions that were closed before a time; gives their ids."""
        removed = []
        for saved in await self._floor.sessions.all({"state": SessionState.CLOSED.value}):
            if (saved.record.closed_at or 0.0) < before:
                await self.delete(saved.id)
                removed.append(saved.id)
        return removed
