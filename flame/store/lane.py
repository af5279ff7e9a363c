"""A thread that owns a database connection and serves the operations that coroutines queue for it, in batches.

An event loop must not wait for a disk, and a transaction costs about the same whether it holds one
change or a hundred. So whatever has queued up while the last batch ran is served as the next one: with group commit
the store gets faster under load instead of slower. The callers of a batch are told in one call into their
loop, after the batch is done as a whole.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flame.errors import StoreError

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]


class Call:
    """One queued operation and, once it was served, its result or its error."""

    __slots__ = ("error", "future", "loop", "operation", "result")

    def __init__(self, operation: Operation[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.operation = operation
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.result: Any = None
        self.error: Exception | None = None


Serve = Callable[[sqlite3.Connection, Sequence[Call]], None]


class Lane:
    """Threads that serve one queue of operations.

    :param name: of the threads, for those who look at a stuck process.
    :param connections: one for each thread; closed with the lane.
    :param serve: runs a batch on a connection; it gives each call its result or error and raises nothing.
    :param batch: most operations in one batch.
    """

    def __init__(self, name: str, connections: Sequence[sqlite3.Connection], serve: Serve, *, batch: int) -> None:
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._serve = serve
        self._batch = batch
        self._gate = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(connection,), name=f"flame-{name}", daemon=True)
            for connection in connections
        ]
        for thread in self._threads:
            thread.start()

    async def __call__(self, operation: Operation[T]) -> T:
        """Queue an operation and wait until its batch is done.

        A caller that is cancelled stops waiting; its operation takes place all the same.

        :raises flame.errors.StoreError: the lane is closed, or whatever the operation failed with.
        """
        call = Call(operation, asyncio.get_running_loop())
        with self._gate:
            if self._closed:
                raise StoreError("The store is closed.")
            self._queue.put(call)
        result: T = await call.future
        return result

    def close(self) -> None:
        """Serve what is queued, then end the threads and close the connections. Blocks; once is enough."""
        with self._gate:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, connection: sqlite3.Connection) -> None:
        going = True
        while going:
            calls: list[Call] = []
            entry = self._queue.get()
            while True:
                if entry is None:  # nothing is queued behind the end marks, see close()
                    going = False
                    break
                calls.append(entry)
                if len(calls) == self._batch:
                    break
                try:
                    entry = self._queue.get_nowait()
                except queue.Empty:
                    break
            if calls:
                self._serve(connection, calls)
                _deliver(calls)
        connection.close()


def _deliver(calls: Sequence[Call]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[Call]] = {}
    for call in calls:
        by_loop.setdefault(call.loop, []).append(call)
    for loop, done in by_loop.items():
        if not loop.is_closed():  # else nobody waits any more
            loop.call_soon_threadsafe(_settle, done)


def _settle(calls: Sequence[Call]) -> None:
    for call in calls:
        if call.future.done():
            continue  # the caller was cancelled
        if call.error is not None:
            call.future.set_exception(call.error)
        else:
            call.future.set_result(call.result)
