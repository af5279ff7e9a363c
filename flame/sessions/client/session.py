"""A session as its client has it: tasks in, answers out.

Submitting costs no wait: tasks are numbered here, leave together, and each has a :class:`Future`. What the server has not
confirmed is kept and sent again when a connection was lost; the server knows numbers that it has seen. An answer that comes twice
finds its future done. So each task is answered once, whatever happens between.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flame.errors import Conflict, FlameError, Forbidden, ServerError, TaskCancelled, TaskFailed
from flame.sessions import wire
from flame.sessions.client import refusals, streams
from flame.sessions.client.describing import Packed
from flame.sessions.objects import pack, unpack
from flame.sessions.payload import Reference, dumps, loads
from flame.spec.sessions import Counts, SessionForm, WorkFailure

if TYPE_CHECKING:
    from flame.sessions.client.connection import Connection

#: Tasks, and bytes, that leave in one frame.
TOGETHER = 2000
_FRAME = 1 << 20
#: Tasks that :meth:`Session.map` has under way.
AHEAD = 10_000

Options = tuple[float | None, int | None]


class _Cancel(NamedTuple):
    """A request to cancel tasks that waits for its answer."""

    answer: asyncio.Future[list[int]]
    numbers: list[int]
    force: bool


class Future(asyncio.Future[Any]):
    """The answer of a task, which is awaited.

    :ivar number: which of this client's tasks it is.
    :ivar id: the task's id in its session; None until the server has said so.
    """

    def __init__(self, session: Session, number: int) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.number = number
        self._session = session
        self._id: int | None = None

    @property
    def id(self) -> int | None:
        """See the class."""
        if self._id is None:
            self._id = self._session.id_of(self.number)
        return self._id


class Session:
    """A stream of tasks. Made by :func:`open`; entering the context opens it, and leaving it waits for the tasks and closes it.

    :param connection: where.
    :param form: what it is opened with; None joins the one of this ``id``.
    :param bundles: the code that belongs to it, by digests.
    :param common: its common data, where they are an object.
    :param own: whether the connection begins and ends with the session.
    :ivar id: its id, once it is open.
    """

    def __init__(
        self,
        connection: Connection,
        form: SessionForm | None,
        bundles: Mapping[str, bytes],
        common: Packed | None = None,
        *,
        id: str = "",
        own: bool = False,
    ) -> None:
        self.id = id
        self._own = own
        self._connection = connection
        self._form = form
        self._bundles = bundles
        self._common = common
        self._client = secrets.token_hex(6)
        self._channel = 0
        self._next = 1
        self._window = 1 << 20
        self._in_flight = 0
        self._futures: dict[int, Future] = {}
        self._sizes: dict[int, int] = {}
        self._waiting: deque[tuple[int, bytes, Options | None]] = deque()
        self._sent: deque[tuple[int, list[bytes], Options | None]] = deque()  # frames that were not confirmed
        self._blocks: list[tuple[int, int, int]] = []
        self._flushing = False
        self._opened: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] | None = None
        self._closing = False  # by force, in the order to close that waits for its answer
        self._cancels: dict[int, _Cancel] = {}
        self._requests = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._accepted = asyncio.Event()
        self._counts: set[asyncio.Queue[Counts | None]] = set()
        self._failure: FlameError | None = None

    # --------------------------------------------------------------------------------------- coming and going

    async def __aenter__(self) -> Session:
        if self._own:
            await self._connection.__aenter__()
        try:
            self._channel = self._connection.add(self, self._bundles)
            self._opened = asyncio.get_running_loop().create_future()
            self.reopen()
            await self._opened
            if self._common is not None:
                await self._bring(*self._common)
                self._common = None
        except BaseException:
            await self._left()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._failure is None and self._form is not None:
                if kind is None:
                    await self._quiet.wait()
                await self.close(force=kind is not None)
        finally:
            await self._left()

    async def close(self, *, force: bool = False) -> None:
        """Close the session: what waits is cancelled.

        :param force: also while tasks run; they are cancelled, too.
        :raises flame.errors.Conflict: a task runs, and ``force`` is not given.
        """
        self._check()
        self.flush()
        self._closed, self._closing = asyncio.get_running_loop().create_future(), force
        self._send(wire.CLOSE, self._channel, force)
        await self._closed

    async def leave(self) -> None:
        """Let go of the session and leave it open; :meth:`Connection.join` finds it again."""
        self._send(wire.LEAVE, self._channel)
        self._failure = Conflict(f"Session {self.id} was left.")
        await self._left()

    async def _left(self) -> None:
        self._connection.remove(self._channel)
        self.fail(TaskCancelled("The session was left before this task was answered."))
        if self._own:
            await self._connection.close()

    # ------------------------------------------------------------------------------------------------- tasks

    def submit(self, value: Any, *, timeout: float | None = None, retries: int | None = None) -> Future:
        """Hand in a task; its answer is awaited.

        :param timeout: seconds that it may run; None: what holds for the session.
        :param retries: how often it is tried again when it fails; None likewise.
        :raises flame.errors.UsageError: the value cannot travel.
        """
        return self._submit(dumps(value), None if timeout is None and retries is None else (timeout, retries))

    def submit_many(
        self, values: Iterable[Any], *, timeout: float | None = None, retries: int | None = None
    ) -> list[Future]:
        """Hand in many tasks."""
        options = None if timeout is None and retries is None else (timeout, retries)
        return [self._submit(dumps(value), options) for value in values]

    async def invoke(self, value: Any, *, timeout: float | None = None, retries: int | None = None) -> Any:
        """Hand in a task and wait for its answer.

        :raises flame.errors.TaskFailed: it failed.
        :raises flame.errors.TaskCancelled: it was cancelled.
        """
        future = self.submit(value, timeout=timeout, retries=retries)
        self.flush()
        return await future

    async def map(
        self, values: Iterable[Any] | AsyncIterable[Any], *, ordered: bool = True, ahead: int = AHEAD
    ) -> AsyncIterator[Any]:
        """The answers of many tasks, as they are there: in the order of the values, or as they come.

        :param ahead: how many tasks are under way at most.
        :raises flame.errors.TaskFailed: one failed; the others go on.
        """
        async for answer in streams.answers(self.submit, values, ordered=ordered, ahead=ahead):
            yield answer

    async def as_completed(self, futures: Iterable[Future]) -> AsyncIterator[Future]:
        """Futures in the order in which they are done."""
        async for future in streams.completed(futures):
            yield future

    async def put(self, value: Any) -> Reference:
        """Keep a value once at the server and once on each host, for all tasks of the session.

        :returns: what stands for it in the inputs of tasks, which get the value itself. Its arrays cannot be written to there.
        :raises flame.errors.UsageError: something in it cannot travel.
        """
        self._check()
        reference, parts = await asyncio.to_thread(pack, value)
        await self._bring(reference, parts)
        return reference

    async def get(self, reference: Reference) -> Any:
        """The value of an object, such as one that a task has made with ``ctx.put`` and answered with.

        :raises flame.errors.NotFound: the session has none of this digest.
        """
        data = await self._connection.http.call("GET", self._object(reference), into=bytes)
        if hashlib.sha256(data).hexdigest() != reference.digest:
            raise ServerError(f"The object {reference.digest[:12]} has come with other bytes than it was given.")
        return unpack(memoryview(data))

    async def _bring(self, reference: Reference, parts: list[bytes | memoryview]) -> None:
        data = await asyncio.to_thread(b"".join, parts)
        await self._connection.http.call("PUT", self._object(reference), data=data)

    def _object(self, reference: Reference) -> str:
        return f"/v1/sessions/{self.id}/objects/{reference.digest}"

    async def accepted(self) -> None:
        """Wait until everything that was handed in is in the server's store."""
        self.flush()
        while self._sent or self._waiting:
            self._check()
            self._accepted.clear()
            await self._accepted.wait()
        self._check()

    async def cancel(self, *futures: Future, force: bool = False) -> list[Future]:
        """Cancel tasks; gives those that are cancelled, or will be at once. One that runs goes on.

        :param force: end the executors of those that run, too.
        """
        self._check()
        self.flush()
        self._requests += 1
        request = self._requests
        numbers = [future.number for future in futures]
        asked = self._cancels[request] = _Cancel(asyncio.get_running_loop().create_future(), numbers, force)
        self._send(wire.CANCEL, self._channel, request, numbers, force)
        taken = set(await asked.answer)
        return [future for future in futures if future.number in taken]

    async def watch(self) -> AsyncIterator[Counts]:
        """The session's tasks by state: now, and with each change, until it is closed."""
        self._check()
        queue: asyncio.Queue[Counts | None] = asyncio.Queue()
        self._counts.add(queue)
        try:
            self._send(wire.WATCH, self._channel)
            while (counts := await queue.get()) is not None:
                yield counts
        finally:
            self._counts.discard(queue)

    # -------------------------------------------------------------------------------------- for the connection

    def reopen(self) -> None:
        """Say which session this is, on a new connection, or after what it needs was sent."""
        form = (
            msgspec.to_builtins(self._form, builtin_types=(bytes,)) if self._form is not None and not self.id else None
        )
        self._send(wire.OPEN, self._channel, form, self.id, self._client)

    def hear(self, message: list[Any]) -> None:
        """A message for this session."""
        kind = message[0]
        if kind == wire.ANSWERS:
            self._answers(message[2], message[3])
        elif kind == wire.ACCEPTED:
            self._accept(message[2], message[3], message[4])
        elif kind == wire.OPENED:
            self._welcome(*message[2:])
        elif kind == wire.REFUSED:
            self._refused(refusals.refusal(message[2], message[3]))
        elif kind == wire.CLOSED:
            _resolve(self._closed, None)
            for queue in self._counts:
                queue.put_nowait(None)
        elif kind == wire.CANCELLED:
            asked = self._cancels.pop(message[2], None)
            _resolve(asked.answer if asked is not None else None, message[3])
        elif kind == wire.COUNTS:
            counts = msgspec.convert(message[2], Counts)
            for queue in self._counts:
                queue.put_nowait(counts)

    def fail(self, error: FlameError) -> None:
        """Nothing will come any more."""
        self._failure = self._failure or error
        for waiting in (self._opened, self._closed, *(asked.answer for asked in self._cancels.values())):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
        self._cancels.clear()
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # it is known: nobody need be told that nobody asked
        for queue in self._counts:
            queue.put_nowait(None)
        self._waiting.clear()
        self._sent.clear()
        self._accepted.set()
        self._quiet.set()

    def id_of(self, number: int) -> int | None:
        """The id of a task, once the server has said so."""
        for first, begin, count in reversed(self._blocks):
            if first <= number < first + count:
                return begin + number - first
        return None

    def flush(self) -> None:
        """Send what was handed in, as far as the server has room for it."""
        self._flushing = False
        if self._opened is None or not self._opened.done():
            return
        while self._waiting and (self._in_flight < self._window):
            first, _, options = self._waiting[0]
            payloads: list[bytes] = []
            size = 0
            while self._waiting and len(payloads) < TOGETHER and size < _FRAME and self._waiting[0][2] == options:
                payload = self._waiting.popleft()[1]
                payloads.append(payload)
                size += len(payload) + 64
            self._in_flight += size
            self._sent.append((first, payloads, options))
            self._send(wire.SUBMIT, self._channel, first, payloads, options)

    # ------------------------------------------------------------------------------------------------ pieces

    def _submit(self, payload: bytes, options: Options | None) -> Future:
        if self._failure is not None:
            raise self._failure
        number = self._next
        self._next += 1
        future = self._futures[number] = Future(self, number)
        self._sizes[number] = len(payload) + 64
        self._waiting.append((number, payload, options))
        self._quiet.clear()
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)
        return future

    def _send(self, *message: Any) -> None:
        self._connection.send(*message)

    def _answers(self, entry: int, rows: Sequence[Any]) -> None:
        futures, sizes = self._futures, self._sizes
        for number, task, state, payload in rows:
            future = futures.pop(number, None)
            self._in_flight -= sizes.pop(number, 0)
            if future is None or future.done():
                continue
            future._id = task
            try:
                if state == wire.SUCCEED:
                    future.set_result(loads(payload))
                elif state == wire.FAILED:
                    why = msgspec.msgpack.decode(payload, type=WorkFailure)
                    future.set_exception(TaskFailed(why.type, why.message, why.trace, task))
                    if (
                        why.type == "SessionFailed"
                    ):  # all of them, and for one reason: it need not be told a thousand times
                        future.exception()
                else:
                    future.set_exception(TaskCancelled(f"Task {task} was cancelled."))
                    future.exception()
            except FlameError as error:
                future.set_exception(error)
        self._send(wire.ACK, self._channel, entry)
        if self._waiting:
            self.flush()
        elif not futures:
            self._quiet.set()

    def _accept(self, first: int, begin: int, count: int) -> None:
        if not self._blocks or self._blocks[-1][0] < first:
            self._blocks.append((first, begin, count))
        end = first + count
        while self._sent and self._sent[0][0] + len(self._sent[0][1]) <= end:
            self._sent.popleft()
        self._accepted.set()

    def _welcome(self, id: str, window: int, last: int, blocks: Sequence[Sequence[int]]) -> None:
        self.id, self._window = id, window
        for first, begin, count in blocks:
            self._accept(first, begin, count)
        if self._counts:
            self._send(wire.WATCH, self._channel)
        for first, payloads, options in list(self._sent):
            self._send(wire.SUBMIT, self._channel, first, payloads, options)
        for request, asked in self._cancels.items():  # whose answers were lost with a connection
            self._send(wire.CANCEL, self._channel, request, asked.numbers, asked.force)
        if self._closed is not None and not self._closed.done():
            self._send(wire.CLOSE, self._channel, self._closing)
        _resolve(self._opened, None)
        self.flush()

    def _refused(self, error: FlameError) -> None:
        if self._opened is not None and not self._opened.done():
            self._opened.set_exception(error)
        elif self._closed is not None and not self._closed.done():
            if isinstance(error, Forbidden):  # it was closed before the answer could be told
                self._closed.set_result(None)
            else:
                self._closed.set_exception(error)
        else:
            self.fail(error)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def _resolve(future: asyncio.Future[Any] | None, value: Any) -> None:
    if future is not None and not future.done():
        future.set_result(value)
