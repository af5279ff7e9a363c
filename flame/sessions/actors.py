"""Actors: an object that lives in one executor, whose methods are called in order. A session of its own, with one executor.

>>> class Counter:
...     def __init__(self, start=0): self.n = start
...     def add(self, k): self.n += k; return self.n
>>> async with flame.sessions.actor(Counter, start=10) as counter:
...     await counter.add(5)
15

Each call is a task, and tasks start in the order of their ids; so the calls of one client happen in the order in which they are made. An
actor's state is in its process alone. When that is lost, the calls that follow fail with :class:`flame.errors.ActorLost`, rather than
being answered by an object that has forgotten everything; unless the actor was made with ``restart=True``, which lets it
begin anew from its arguments, as suits one whose state can be made again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flame.errors import ActorLost, TaskFailed, UsageError
from flame.sessions.application import SessionContext, Task, find
from flame.sessions.client import Connection, Future, Session, describe

_HOST = "flame.sessions.actors:Host"


class Host:
    """The application of an actor's session: makes the object when it is bound, and calls its methods.

    :param entry: ``module:Class`` of the object.
    :param restart: whether an object may take the place of one that was lost.
    """

    def __init__(self, entry: str, restart: bool) -> None:
        self._class = find(entry)
        self._restart = restart
        self._object: Any = None
        self._last = 0  # the call that came last; none before the first

    def on_session_enter(self, ctx: SessionContext) -> None:
        """Make the object."""
        arguments, keywords = ctx.common_data
        self._object = self._class(*arguments, **keywords)
        self._last = 0

    def on_task_invoke(self, ctx: SessionContext, task: Task) -> Any:
        """Call a method."""
        anew = self._last == 0 and (task.id, task.attempt) != (1, 1)
        if anew and not self._restart:
            raise ActorLost("The actor's process was lost, and its state with it.")
        self._last = task.id
        name, arguments, keywords = task.input
        return getattr(self._object, name)(*arguments, **keywords)

    def on_session_leave(self) -> None:
        """The object goes; one with a method ``close`` is told."""
        close = getattr(self._object, "close", None)
        self._object = None
        if callable(close):
            close()


class Actor:
    """The far object, as its client sees it. Made by :func:`actor`; entering the context makes the object, leaving it ends it.

    Its public methods are called like coroutines, and each call gives a future: ``await counter.add(5)``, or
    ``futures = [counter.add(k) for k in range(10)]``.
    """

    def __init__(self, session: Session, cls: type) -> None:
        self._session = session
        self._class = cls

    async def __aenter__(self) -> Actor:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *why: Any) -> None:
        await self._session.__aexit__(*why)

    @property
    def session(self) -> Session:
        """The session behind it."""
        return self._session

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not callable(getattr(self._class, name, None)):
            raise AttributeError(f"{self._class.__qualname__} has no method {name!r} for others to call.")

        def call(*arguments: Any, **keywords: Any) -> _Call:
            return _Call(self._session.submit([name, list(arguments), keywords]))

        return call


class _Call:
    """A call that was made: awaited for its answer."""

    def __init__(self, future: Future) -> None:
        self.future = future

    def __await__(self) -> Any:
        try:
            return (yield from self.future.__await__())
        except TaskFailed as error:
            if error.type == ActorLost.__name__:
                raise ActorLost(error.reason) from error
            raise


def actor(
    cls: type, *arguments: Any, connection: Connection | None = None, restart: bool = False, **keywords: Any
) -> Actor:
    """An actor: ``async with flame.sessions.actor(Class, *arguments, **keywords) as instance``.

    :param cls: a class, defined at the top of a module; no application, just a class.
    :param arguments: for its constructor, as are ``keywords``.
    :param connection: where; None makes one of its own.
    :param restart: whether it begins anew when its process is lost.
    :raises flame.errors.UsageError: it is no class, or an argument cannot travel.
    """
    if not isinstance(cls, type):
        raise UsageError(f"An actor is made of a class, not of {cls!r}.")
    form, bundles, common = describe(cls, common_data=[list(arguments), keywords], min_instances=1, max_instances=1)
    own = form.application
    assert own is not None
    host = msgspec.structs.replace(own, entry=_HOST, arguments={"entry": own.entry, "restart": restart})
    form = msgspec.structs.replace(form, application=host)
    return Actor(Session(connection or Connection(), form, bundles, common, own=connection is None), cls)
