"""Applications and elastic sessions over the REST API. For handing in tasks see :mod:`flame.sessions`."""

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator

import msgspec

from flame.client.follow import Backoff, OnLost, read_event, transient
from flame.client.resources import Noun, Page, pages
from flame.errors import FlameError, ServerError
from flame.spec.sessions import (
    Application,
    AppRecord,
    Counts,
    SessionForm,
    SessionRecord,
    SessionState,
    WorkRecord,
    WorkState,
)


class Apps(Noun):
    """Registered applications: code that serves the tasks of sessions."""

    async def create(self, application: Application) -> AppRecord:
        """Register an application; its code bundle must have been uploaded (:meth:`flame.client.resources.Codes.upload`).

        :raises flame.errors.Conflict: the project has one of that name.
        """
        query = {"project": self._session.project}
        return await self._session.call("POST", "/v1/apps", query=query, body=application, into=AppRecord)

    async def list(self) -> list[AppRecord]:
        """All applications."""
        return await pages(self._session, "/v1/apps", AppRecord)

    async def get(self, id: str) -> AppRecord:
        """One application."""
        return await self._session.call("GET", f"/v1/apps/{id}", into=AppRecord)

    async def update(self, id: str, application: Application) -> AppRecord:
        """Change an application; sessions that are open go on with what it was."""
        return await self._session.call("PUT", f"/v1/apps/{id}", body=application, into=AppRecord)

    async def delete(self, id: str) -> None:
        """Remove an application."""
        await self._session.call("DELETE", f"/v1/apps/{id}")


class Sessions(Noun):
    """Elastic sessions, seen from outside."""

    async def open(self, form: SessionForm) -> SessionRecord:
        """Open a session, or give the one that is open under the form's id.

        :raises flame.errors.Conflict: that one is another, or closed.
        """
        query = {"project": self._session.project}
        return await self._session.call("POST", "/v1/sessions", query=query, body=form, into=SessionRecord)

    async def list(self, state: SessionState | None = None) -> list[SessionRecord]:
        """All sessions, or those in one state; oldest first."""
        return await pages(self._session, "/v1/sessions", SessionRecord, state=state.value if state else None)

    async def get(self, id: str) -> SessionRecord:
        """One session, with its counts and executors."""
        return await self._session.call("GET", f"/v1/sessions/{id}", into=SessionRecord)

    async def tasks(
        self, id: str, *, after: int = 0, limit: int = 100, state: WorkState | None = None
    ) -> tuple[builtins.list[WorkRecord], bool]:
        """Tasks of a session in the order of their ids, and whether there are more.

        :param after: begin behind this id.
        """
        query = {"after": after, "limit": limit, "state": state.value if state else None}
        page = await self._session.call("GET", f"/v1/sessions/{id}/tasks", query=query, into=Page[WorkRecord])
        return page.items, page.next is not None

    async def close(self, id: str, *, force: bool = False) -> SessionRecord:
        """Close a session: what waits is cancelled.

        :param force: also while tasks run; they are cancelled, too.
        :raises flame.errors.Conflict: a task runs, and ``force`` is not given.
        """
        query = {"force": "true" if force else None}
        return await self._session.call("POST", f"/v1/sessions/{id}/close", query=query, into=SessionRecord)

    async def watch(
        self, id: str, *, patience: float | None = None, on_lost: OnLost | None = None
    ) -> AsyncGenerator[tuple[SessionState, Counts], None]:
        """A session's state and its tasks by state: now, and with each change, until it is closed.

        :param patience: seconds that the server may be away before that is an error; None for ever.
        :param on_lost: told each time that the server could not be reached.
        """
        backoff = Backoff(patience=patience)
        while True:
            try:
                async with self._session.open("GET", f"/v1/sessions/{id}/events") as answer:
                    async for line in answer.lines():
                        backoff.succeeded()
                        if not line:
                            continue
                        data = read_event(line).data
                        state = SessionState(data["state"])
                        yield state, msgspec.convert(data, Counts)
                        if state is SessionState.CLOSED:
                            return
                raise ServerError(f"{self._session.server} closed the stream of session {id}.")
            except FlameError as error:
                if on_lost is not None and transient(error):
                    on_lost(error)
                await backoff.failed(error)
