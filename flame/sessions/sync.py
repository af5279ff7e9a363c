"""Sessions for code without ``async``: scripts and notebooks.

>>> with flame.sessions.sync.open(square, max_instances=4) as session:
...     session.invoke(12)
...     list(session.map(range(1000)))

It is a :class:`concurrent.futures.Executor`, too, for what takes one: ``session.submit(12)`` gives a
:class:`concurrent.futures.Future`. Without an application it is a pool for any function, in the place of
:class:`concurrent.futures.ProcessPoolExecutor`, on all the machines that the server has:

>>> with flame.sessions.sync.open(max_instances=4) as pool:
...     pool.submit(pow, 2, 10).result()
...     list(pool.map(f, xs, ys))

The functions are those of modules, and travel as their source. An event loop in a thread of its own does the work.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from flame.errors import UsageError
from flame.sessions.actors import Actor
from flame.sessions.actors import actor as make_actor
from flame.sessions.application import SessionContext, Task, find
from flame.sessions.client import Connection, Session, describe
from flame.sessions.code import gather
from flame.sessions.payload import Reference
from flame.spec.sessions import Application, Counts

T = TypeVar("T")

_CALLS = "flame.sessions.sync:Calls"


class Calls:
    """The application behind a pool: calls the functions that its tasks name."""

    def on_task_invoke(self, ctx: SessionContext, task: Task) -> Any:
        """Call a function."""
        entry, arguments, keywords = task.input
        return find(entry)(*arguments, **keywords)


class SyncSession(concurrent.futures.Executor):
    """A session, or a pool for functions. Made by :func:`open`."""

    def __init__(self, app: Any, server: str | None, token: str | None, options: Mapping[str, Any]) -> None:
        self._app = app
        self._options = options
        self._sessions: dict[str | None, Session] = {}  # of a pool one for each bundle of code
        self._opening: dict[str | None, asyncio.Lock] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flame-session", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._connection: Connection = self._wait(self._connect(server, token))
            if app is not None:
                self._wait(self._open(None, *describe(app, **options)))
        except BaseException:
            self.shutdown(wait=False)
            raise

    @property
    def id(self) -> str:
        """The session's id."""
        return self._session.id

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Hand in a task: its input, and as a pool a function with its arguments.

        :raises flame.errors.UsageError: a value cannot travel, or a function has no source that can.
        """
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")  # as the standard library says it
        if self._app is not None:
            if args:
                raise UsageError("A session with an application takes one input a task: session.submit(input).")
            return asyncio.run_coroutine_threadsafe(self._submit(fn, kwargs), self._loop)
        code = gather(fn) if inspect.isfunction(fn) or inspect.isclass(fn) else None
        entry = code.entry if code is not None else _named(fn)
        return asyncio.run_coroutine_threadsafe(self._call(code, [entry, list(args), kwargs]), self._loop)

    def submit_many(self, values: Iterable[Any]) -> list[concurrent.futures.Future[Any]]:
        """Hand in many tasks of a session with an application."""
        return [self.submit(value) for value in values]

    def invoke(self, value: Any, **options: Any) -> Any:
        """Hand in a task and wait for its answer.

        :param options: ``timeout`` and ``retries``, as for :meth:`flame.sessions.Session.invoke`.
        :raises flame.errors.TaskFailed: it failed.
        """
        return self._wait(self._session.invoke(value, **options))

    def map(
        self, fn: Any, /, *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """The answers of many tasks in order: ``session.map(inputs)``, or of a pool ``pool.map(fn, *iterables)``.

        :param timeout: seconds from now after which waiting for an answer raises TimeoutError.
        :param chunksize: of no effect: tasks travel together as it is.
        """
        if self._app is None:
            return super().map(fn, *iterables, timeout=timeout)
        return _in_turn(self.submit_many(fn), None if timeout is None else time.monotonic() + timeout)

    def put(self, value: Any) -> Reference:
        """Keep a value once, for all tasks; see :meth:`flame.sessions.Session.put`."""
        return self._wait(self._session.put(value))

    def get(self, reference: Reference) -> Any:
        """The value of an object; see :meth:`flame.sessions.Session.get`."""
        return self._wait(self._session.get(reference))

    def actor(self, cls: type, *arguments: Any, restart: bool = False, **keywords: Any) -> SyncActor:
        """An actor on this connection, in a context of its own; see :func:`flame.sessions.actor`."""
        return SyncActor(
            make_actor(cls, *arguments, connection=self._connection, restart=restart, **keywords), self._wait
        )

    @property
    def counts(self) -> Counts:
        """The session's tasks by state, now."""
        return self._wait(self._count())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the session: tasks that were handed in are waited for, unless they are to be cancelled."""
        if self._closed:
            return
        self._closed = True
        try:
            if hasattr(self, "_connection"):
                self._wait(self._leave(force=cancel_futures or not wait))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(cancel_futures=kind is not None)

    # ------------------------------------------------------------------------------------------- in the loop

    @property
    def _session(self) -> Session:
        if self._app is None:
            raise UsageError("This is a pool for functions; name an application to have a session of it.")
        return self._sessions[None]

    async def _connect(self, server: str | None, token: str | None) -> Connection:
        return await Connection(server, token).__aenter__()

    async def _open(self, key: str | None, form: Any, bundles: Any, common: Any) -> Session:
        session = Session(self._connection, form, bundles, common)
        await session.__aenter__()
        self._sessions[key] = session
        return session

    async def _submit(self, value: Any, options: dict[str, Any]) -> Any:
        return await self._session.submit(value, **options)

    async def _call(self, code: Any, what: list[Any]) -> Any:
        key = None if code is None else code.digest
        if key not in self._sessions:
            async with self._opening.setdefault(key, asyncio.Lock()):
                if key not in self._sessions:
                    bundles = {key: code.bundle} if key is not None else {}
                    form, _, common = describe(Application(entry=_CALLS, code=key), **self._options)
                    await self._open(key, form, bundles, common)
        return await self._sessions[key].submit(what)

    async def _count(self) -> Counts:
        async for counts in self._session.watch():
            return counts
        raise UsageError("The session is closed.")

    async def _leave(self, *, force: bool) -> None:
        kind = asyncio.CancelledError if force else None
        for session in self._sessions.values():
            await session.__aexit__(kind)
        await self._connection.__aexit__(None, None, None)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class SyncActor:
    """An actor whose calls wait for their answers. Its context makes the object, and ends it."""

    def __init__(self, far: Actor, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._far = far
        self._wait = wait

    def __enter__(self) -> SyncActor:
        self._wait(self._far.__aenter__())
        return self

    def __exit__(self, *why: Any) -> None:
        self._wait(self._far.__aexit__(*why))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._far, name)

        async def call(*arguments: Any, **keywords: Any) -> Any:
            return await method(*arguments, **keywords)

        return lambda *arguments, **keywords: self._wait(call(*arguments, **keywords))


def open(app: Any = None, *, server: str | None = None, token: str | None = None, **options: Any) -> SyncSession:  # noqa: A001 - it opens
    """A session of an application, or without one a pool for functions.

    :param app: as for :func:`flame.sessions.open`; None for a pool.
    :param server: the server's address; None as for :class:`flame.sessions.Connection`.
    :param token: likewise.
    :param options: as for :func:`flame.sessions.open`.
    :raises flame.errors.FlameError: it cannot be opened.
    """
    return SyncSession(app, server, token, options)


def _in_turn(futures: list[concurrent.futures.Future[Any]], end: float | None) -> Iterator[Any]:
    for future in futures:
        yield future.result(None if end is None else max(0.0, end - time.monotonic()))


def _named(fn: Any) -> str:
    """The entry of a function that has no source, such as ``math.sqrt``."""
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", "")
    if not module or not name.isidentifier():
        raise UsageError(f"{fn!r} cannot travel: give a function that is defined at the top of a module.")
    return f"{module}:{name}"
