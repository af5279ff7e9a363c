"""Waiting for what nobody tells of, such as a file of another process, or its end: by looking again and again.

What has an event, a stream or a condition of its own is waited for by that.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Look until something has come true; gives what was found.

    :param condition: what looks; it may be a coroutine function.
    :param seconds: for how long; only a test that fails waits so long.
    """
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.01)


def blocked_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Look until something has come true, in a test without an event loop; gives what was found."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)
    return found
