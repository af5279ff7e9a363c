"""Going on after the server was away: repeated calls, and event streams that are resumed where they broke.

A server may be restarted under everyone who talks to it. What it keeps is durable and numbered, so whoever
follows it only has to come back and say how far he had got. How soon: with exponential backoff and full jitter,
so that a thousand workers do not come back in the same instant.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import msgspec

from flame.client.http import Query, Session, refusal
from flame.errors import FlameError, ServerError, TooManyRequests
from flame.spec.records import Event

T = TypeVar("T")
#: Called with the cause each time that the server could not be reached or failed, before waiting for another try.
OnLost = Callable[[FlameError], None]

_decode = msgspec.json.Decoder(Event).decode


def transient(error: FlameError) -> bool:
    """True if the same request may well succeed later: the fault is the server's, it is away, or asks for patience."""
    return error.status >= 500 or isinstance(error, TooManyRequests)


class Backoff:
    """How long to wait before each try: up to ``first`` seconds, then up to twice as long each time, never above ``longest``.

    :param patience: seconds after the first failure after which no more tries are made; None goes on forever.
    """

    def __init__(self, first: float = 0.05, longest: float = 5.0, *, patience: float | None = None) -> None:
        self._first = first
        self._longest = longest
        self._patience = patience
        self._tries = 0
        self._since = 0.0

    def succeeded(self) -> None:
        """Begin anew: the server answers."""
        self._tries = 0

    async def failed(self, error: FlameError) -> None:
        """Wait until another try is due.

        :raises flame.errors.FlameError: ``error`` itself, if it will not pass or the patience is at its end.
        """
        now = asyncio.get_running_loop().time()
        if not self._tries:
            self._since = now
        if not transient(error) or (self._patience is not None and now - self._since >= self._patience):
            raise error
        longest = min(self._longest, self._first * 2 ** min(self._tries, 30))
        self._tries += 1
        await asyncio.sleep(random.uniform(0, longest))


async def insist(call: Callable[[], Awaitable[T]], *, patience: float | None = None) -> T:
    """Repeat a call that can be repeated without harm until the server has answered it.

    :param call: makes the awaitable anew for each try.
    :param patience: see :class:`Backoff`.
    :raises flame.errors.FlameError: the server refused it, or the patience is at its end.
    """
    backoff = Backoff(patience=patience)
    while True:
        try:
            return await call()
        except FlameError as error:
            await backoff.failed(error)


async def resumed(
    session: Session,
    path: str,
    *,
    query: Query,
    after: int = 0,
    patience: float | None = None,
    on_lost: OnLost | None = None,
    ended: Callable[[], Awaitable[bool]] | None = None,
) -> AsyncGenerator[Event, None]:
    """The events of a stream in order, each once, across any number of broken connections.

    :param after: begin behind this number.
    :param patience: see :class:`Backoff`.
    :param on_lost: told of each failure to reach the server.
    :param ended: asked when the server closed the stream in good order, whether that was its end; without it, it never is.
    :raises flame.errors.FlameError: the server refused it, or the patience is at its end.
    """
    backoff = Backoff(patience=patience)
    while True:
        try:
            async with session.open("GET", path, query={**query, "after": after}) as answer:
                async for line in answer.lines():
                    backoff.succeeded()
                    if line and (event := read_event(line)).seq > after:
                        after = event.seq
                        yield event
            if ended is not None and await ended():
                return
            raise ServerError(f"{session.server} closed the stream {path}.")
        except FlameError as error:
            if on_lost is not None and transient(error):
                on_lost(error)
            await backoff.failed(error)


def read_event(line: bytes) -> Event:
    """The event of a stream's line.

    :raises flame.errors.FlameError: it is the last word of a stream whose right has ended, such as Unauthorized of a revoked token;
        or it is no event.
    """
    try:
        event = _decode(line)
    except msgspec.MsgspecError as error:
        raise ServerError(f"The server sent an event that is none ({error}).") from error
    if not event.seq and event.type == "refused":
        raise refusal(str(event.data.get("type")), str(event.data.get("message")))
    return event
