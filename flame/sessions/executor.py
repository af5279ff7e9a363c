"""The executor: a process that serves the tasks of one session after the other. ``python -m flame.sessions.executor``.

Two threads. The main one runs the user's code and nothing else: it takes tasks in order and hands their results over, many at
a time where they are short. The other one reads from the server, so that what the server wants back (tasks that were not begun,
because somebody cancelled them, or because the one before them takes long) is given back while the user's code runs. A
task is claimed under a lock, so it is begun here or given back, never both.

It is kept light, because a cold start waits for it: blocking sockets, no asyncio, and numpy only where a task brings an array.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from flame.errors import FlameError
from flame.sessions import dialing, payload, wire
from flame.sessions.payload import dumps

if TYPE_CHECKING:
    from flame.sessions.objects import HostObjects

#: Seconds after which results are sent although more tasks are there.
PATIENCE = 0.001
#: Results that are sent together at most.
TOGETHER = 512
#: Seconds that an executor goes on without its server, unless FLAME_ORPHAN_AFTER says otherwise.
ORPHAN_AFTER = 60.0

_clock = time.perf_counter


class Executor:
    """This process.

    :param server: where the server is.
    :param id: who this is.
    :param key: what proves it.
    :param folder: where the application's code is put.
    """

    def __init__(self, server: str, id: str, key: str, folder: Path) -> None:
        self._server, self._id, self._key, self._folder = server, id, key, folder
        self._orphan_after = float(os.environ.get("FLAME_ORPHAN_AFTER", ORPHAN_AFTER))
        self._frames = wire.Frames()
        self._socket = self._connect()
        self._sending = threading.Lock()
        self._claiming = threading.Lock()
        self._orders: SimpleQueue[Any] = SimpleQueue()
        self._waiting: dict[int, tuple[int, bytes]] = {}  # tasks that were not begun
        self._running: tuple[int, int] | None = None
        self._session: str | None = None
        self._entered = False
        self._application: Any = None
        self._entry, self._arguments, self._loaded = "", dict[str, Any](), False
        self._shared = _Shared(server, id, key)
        payload.resolve = self._shared.get
        self._rows: list[tuple[int, int, bool, bytes]] = []
        self._since = 0.0
        # Frames of results that the store may not have yet, with the tasks that they are of.
        self._unanswered: deque[tuple[bytes, list[tuple[int, int]]]] = deque()
        self._answered = 0

    def run(self) -> None:
        """Serve until the server lets this executor go."""
        self._send(wire.frame(wire.HELLO, None, False, None, [], False))
        threading.Thread(target=self._read, daemon=True).start()
        context: Any = None
        while True:
            kind, *order = self._orders.get()
            if kind == wire.TASKS:
                for task in order[0]:
                    self._work(task, context)
                self._flush()
            elif kind == wire.WELCOME:
                self._load(*order)
            elif kind == wire.BIND:
                context = self._bind(*order)
            elif kind == wire.UNBIND:
                self._unbind()
            else:
                self._unbind()
                return

    # --------------------------------------------------------------------------------------- the main thread

    def _work(self, id: int, context: Any) -> None:
        with self._claiming:
            task = self._waiting.pop(id, None)
            if task is None:  # the server has it again
                return
            attempt, payload = task
            self._running = (id, attempt)
        if not self._rows:
            self._since = _clock()
        try:
            result = True, dumps(self._application.invoke(context, id, attempt, payload))
        except Exception as error:
            result = False, _failure(error)
        with self._claiming:
            self._rows.append((id, attempt, *result))
            self._running = None
        if len(self._rows) >= TOGETHER or _clock() - self._since > PATIENCE:
            self._flush()

    def _load(self, entry: str, arguments: dict[str, Any], code: dict[str, bytes]) -> None:
        for name, data in code.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        sys.path.insert(0, str(self._folder))
        self._entry, self._arguments, self._loaded = entry, arguments, True

    def _bind(self, session: str, common: bytes | None) -> Any:
        from flame.sessions import application

        with self._claiming:
            self._session, self._entered = session, False
        context = application.SessionContext(session, common, self._shared.put)
        try:
            if self._application is None:
                self._application = application.load(self._entry, self._arguments)
            self._application.enter(context)
        except Exception as error:
            with self._claiming:
                self._session = None
                self._waiting.clear()
            self._send(wire.frame(wire.BIND_FAILED, session, _failure(error)))
            return None
        with self._claiming:
            self._entered = True
        self._send(wire.frame(wire.BOUND, session))
        return context

    def _unbind(self) -> None:
        if self._session is None:
            return
        session = self._session
        try:
            self._application.leave()
        except Exception as error:
            sys.stderr.write(f"on_session_leave of session {session} failed:\n{_trace(error)}")
            sys.stderr.flush()
        with self._claiming:
            self._session, self._entered = None, False
        self._send(wire.frame(wire.UNBOUND, session))

    # --------------------------------------------------------------------------------------- the other thread

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                self._return()
                continue
            try:
                for message in self._frames.feed(data):
                    self._take(message)
            except Exception as error:  # nothing that can be gone on with
                sys.stderr.write(f"This executor does not understand its server:\n{_trace(error)}")
                os._exit(1)

    def _take(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == wire.TASKS:
            _, answered, tasks = message
            while self._answered < answered and self._unanswered:
                self._unanswered.popleft()
                self._answered += 1
            if tasks:
                with self._claiming:
                    for task, attempt, payload in tasks:
                        self._waiting[task] = (attempt, payload)
                self._orders.put((kind, [task[0] for task in tasks]))
        elif kind == wire.REVOKE:
            with self._claiming:
                wanted = list(self._waiting) if message[1] is None else message[1]
                back = [task for task in wanted if self._waiting.pop(task, None) is not None]
            self._flush()  # what is done need not wait for what takes long
            self._send(wire.frame(wire.REVOKED, self._session, back))
        else:
            self._orders.put(message)

    def _return(self) -> None:
        """The server is away: look for it until it is back, then tell it where things are."""
        import random

        self._socket.close()
        begin, pause = time.monotonic(), 0.05
        while True:
            try:
                fresh = self._connect()
                break
            except dialing.Refused:
                os._exit(0)  # nobody wants this executor any more
            except (OSError, FlameError):
                if time.monotonic() - begin > self._orphan_after:
                    os._exit(1)
            time.sleep(pause * random.random())  # so that not all come at once
            pause = min(2 * pause, 1.0)
        self._frames = wire.Frames()
        with self._sending:
            with self._claiming:
                self._waiting.clear()  # the server gives them anew
                self._pack()
                session, entered, running = self._session, self._entered, self._running
            done = [one for _, tasks in self._unanswered for one in tasks]
            self._socket, self._answered = fresh, 0
            self._write(wire.frame(wire.HELLO, session, entered, running, done, self._loaded))
            for data, _ in self._unanswered:
                self._write(data)

    # --------------------------------------------------------------------------------------- both

    def _flush(self) -> None:
        with self._sending:
            with self._claiming:
                data = self._pack()
            if data:
                self._write(data)

    def _pack(self) -> bytes:
        if not self._rows:
            return b""
        rows, self._rows = self._rows, []
        data = wire.frame(wire.RESULTS, self._session, rows, _clock() - self._since)
        self._unanswered.append((data, [row[:2] for row in rows]))
        self._since = _clock()
        return data

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            return  # the reader notices, too, and says it all again when the server is back

    def _connect(self) -> Any:
        return dialing.dial(self._server, f"/v1/executors/{self._id}/link?attempt=1", self._key)


class _Shared:
    """The objects that tasks refer to, and those that they make; brought in when the first of them is met."""

    def __init__(self, server: str, id: str, key: str) -> None:
        self._asked = server, f"/v1/executors/{id}/objects", key
        self._host: HostObjects | None = None

    def get(self, reference: payload.Reference) -> Any:
        """An object's value."""
        from flame.sessions import objects

        if self._host is None:
            given = os.environ.get("FLAME_OBJECTS")
            remote = objects.Remote(*self._asked)
            self._host = objects.HostObjects(Path(given) if given else None, objects.cache_folder(), remote.read)
        return self._host.get(reference)

    def put(self, value: Any) -> payload.Reference:
        """Make an object of a value."""
        from flame.sessions import objects

        reference, parts = objects.pack(value)
        objects.Remote(*self._asked).write(reference.digest, parts)
        return reference


def _failure(error: BaseException) -> bytes:
    import msgspec

    fields = {"type": type(error).__name__, "message": str(error), "trace": _trace(error)}
    return msgspec.msgpack.encode(fields)


def _trace(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def main() -> None:
    """Be the executor that the environment names."""
    given = os.environ
    folder = Path(given.get("FLAME_WORK_DIR", "."), "code")
    try:
        executor = Executor(given["FLAME_SERVER"], given["FLAME_TASK"], given["FLAME_TASK_KEY"], folder)
    except (OSError, FlameError) as error:
        sys.exit(f"The executor cannot reach its server: {error}")
    executor.run()


if __name__ == "__main__":
    main()
