"""Those who connect and say nothing.

A connection costs memory and a descriptor before anybody has shown a token. Whoever has business here sends a request at once, so
who has not done it by a deadline is cut off; and of those who are still silent there may be so many, of whom the oldest goes first.
After its first request a connection that is idle is closed by aiohttp.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

#: Seconds from the connection to the whole head of the first request; under TLS also for the handshake.
PATIENCE = 20.0
#: So many may be silent at a time. Thousands of workers come back in the same second, but each says at once what it wants.
MOST = 8192


class Connected(Protocol):
    """What aiohttp makes for a connection."""

    def force_close(self) -> None:
        """Close it."""


P = TypeVar("P", bound=Connected)


class Doorman(Generic[P]):
    """Makes what handles a connection, and watches until it has had a request.

    :param make: makes it.
    """

    def __init__(self, make: Callable[[], P]) -> None:
        self._make = make
        self._silent: dict[P, asyncio.TimerHandle] = {}

    def __call__(self) -> P:
        """Somebody has connected."""
        if len(self._silent) >= MOST:
            oldest = next(iter(self._silent))
            self._silent[oldest].cancel()
            self._turn_away(oldest)
        one = self._make()
        self._silent[one] = asyncio.get_running_loop().call_later(PATIENCE, self._turn_away, one)
        return one

    def heard(self, one: P) -> None:
        """A request has come."""
        timer = self._silent.pop(one, None)
        if timer is not None:
            timer.cancel()

    def _turn_away(self, one: P) -> None:
        del self._silent[one]
        one.force_close()


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a fault that aiohttp logs is the server's: nonsense that strangers send need not fill its log with traces."""
    from aiohttp.http_exceptions import HttpProcessingError

    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
