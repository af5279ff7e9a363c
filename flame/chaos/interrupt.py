"""Work that is told to end ends what it has started first, however it is told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Told(Exception):
    """It was told to end."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run something to its end, as :func:`asyncio.run` does.

    Ctrl-C, SIGTERM and the end of the terminal cancel it once: it has time to undo what it has done, and is not disturbed in that.

    :raises KeyboardInterrupt: it was cancelled so.
    """

    async def watched() -> T:
        doing = asyncio.ensure_future(work)
        told = False

        def interrupt() -> None:
            nonlocal told
            if not told:
                told = True
                doing.cancel()

        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                loop.add_signal_handler(number, interrupt)
        try:
            return await doing
        except asyncio.CancelledError:
            if told:
                raise _Told from None
            raise

    try:
        return asyncio.run(watched())
    except _Told:
        raise KeyboardInterrupt from None
