"""The one thread in which a p2p backend waits for its sockets.

A selector of its own, in place of :mod:`selectors`, because a connection that is held back (its channel's window is
full) must still be told that the peer is gone, and because a wake-up must be possible from a finalizer, which may run
anywhere, also while another lock is held: :meth:`Loop.call` takes none.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_loops: weakref.WeakSet[Loop] = weakref.WeakSet()

READ = select.POLLIN
WRITE = select.POLLOUT
GONE = select.POLLHUP | select.POLLERR


class _Poll:
    """``select.poll`` with the times of ``select.epoll``, for systems without the latter."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return self._poll.poll(None if timeout is None else timeout * 1000)

    def close(self) -> None:
        pass


class Timer:
    """A call that is due later; :meth:`cancel` takes it back."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], object]) -> None:
        self.function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Take it back; safe to call again, or when it is over."""
        self.function = None


class Loop:
    """A thread that waits for sockets and calls back. Everything but :meth:`call` and :meth:`close` belongs to that thread."""

    def __init__(self, name: str) -> None:
        self._poller: Any = select.epoll() if hasattr(select, "epoll") else _Poll()
        self._callbacks: dict[int, Callable[[int], object]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._woken = False
        self._closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.register(self._wake_in, READ, self._on_wake)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        _loops.add(self)
        self._thread.start()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Have ``function(*args)`` called in the loop's thread soon. From any thread, and from finalizers."""
        self._calls.append((function, args))
        if not self._woken:
            self._woken = True
            try:
                self._wake_out.send(b"\0")
            except OSError:
                pass  # full: it will wake; closed: nothing is called any more

    def later(self, seconds: float, function: Callable[[], object]) -> Timer:
        """Have ``function()`` called after some seconds."""
        timer = Timer(function)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))
        return timer

    def register(self, sock: socket.socket, events: int, callback: Callable[[int], object]) -> None:
        """Call ``callback(events)`` whenever one of ``events`` is there (or the peer is gone)."""
        self._poller.register(sock.fileno(), events)
        self._callbacks[sock.fileno()] = callback
        self._sockets[sock.fileno()] = sock

    def modify(self, sock: socket.socket, events: int) -> None:
        """Wait for other events; for none of them, the peer's end is still told."""
        self._poller.modify(sock.fileno(), events)

    def unregister(self, sock: socket.socket) -> None:
        """Wait for nothing of this socket; passed over when nothing was waited for."""
        if self._callbacks.pop(sock.fileno(), None) is not None:
            self._poller.unregister(sock.fileno())
            del self._sockets[sock.fileno()]

    @property
    def inside(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.current_thread() is self._thread

    def run(self, function: Callable[[], Any], timeout: float | None = None) -> bool:
        """Have ``function()`` called in the loop's thread and wait for it; False when that did not happen in time."""
        if self.inside:
            function()
            return True
        done = threading.Event()

        def call() -> None:
            try:
                function()
            finally:
                done.set()

        self.call(call)
        return done.wait(timeout)

    def close(self) -> None:
        """End the thread; what was asked for before is done first."""
        self.call(self._stop)
        if not self.inside:
            self._thread.join()

    def forget(self) -> None:
        """In a child that was forked: its copies of the sockets would keep connections open when this process ends."""
        for sock in [*self._sockets.values(), self._wake_out]:
            sock.close()
        self._poller.close()

    def _stop(self) -> None:
        self._closing = True

    def _on_wake(self, _events: int) -> None:
        try:
            self._wake_in.recv(64)
        except BlockingIOError:
            pass

    def _run(self) -> None:
        while not self._closing or self._calls:
            for fd, events in self._poll():
                callback = self._callbacks.get(fd)
                if callback is not None:
                    self._guarded(callback, (events,))
            # The mark first, the calls second: who adds one meanwhile either is seen or wakes us again.
            self._woken = False
            while self._calls:
                function, args = self._calls.popleft()
                self._guarded(function, args)
            self._run_timers()
        self._poller.close()
        self._wake_in.close()
        self._wake_out.close()

    def _poll(self) -> list[tuple[int, int]]:
        if self._calls:
            timeout: float | None = 0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        else:
            timeout = None
        ready: list[tuple[int, int]] = self._poller.poll(timeout)
        return ready

    def _run_timers(self) -> None:
        while self._timers and (self._timers[0][2].function is None or self._timers[0][0] <= time.monotonic()):
            function = heapq.heappop(self._timers)[2].function
            if function is not None:
                self._guarded(function, ())

    def _guarded(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        """A fault in one connection's handling must not end the thread that serves all of them."""
        try:
            function(*args)
        except Exception:
            log.exception("A fault in the p2p backend; the connection concerned may be stuck.")


def _after_fork() -> None:
    """Data loaders fork workers; those have no part in the channels."""
    for loop in list(_loops):
        loop.forget()
    _loops.clear()


os.register_at_fork(after_in_child=_after_fork)
