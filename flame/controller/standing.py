"""What is open, and by which right: so that it ends when the right does.

A request is answered at once, so it is enough to ask for its right when it comes. A stream or a session's connection stays open
for days: whoever takes a right back must reach what was opened by it. So each such thing is written down here under the rights
that it rests on (:data:`Right`), and whoever ends a right says so, in one call, whatever it is that is open. Nobody asks now and
then whether a right still holds; one that ends by itself, as a token does, has a timer.

Something is written down *before* its right is looked at. Written down after it, what is taken back in between would go on.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flame.errors import FlameError, Unauthorized

#: ``("user", name)``, ``("token", id)``, ``("invite", id)``, or ``("task", id, attempt)``: the key of an attempt.
Right = tuple[str | int, ...]


class Stay:
    """Something that is open. What it does is done within it, as a context manager: that is what is interrupted.

    :ivar ended: why it has to end; None: it may go on.
    """

    def __init__(self, standing: Standing) -> None:
        self.ended: FlameError | None = None
        self._standing = standing
        self._rights: list[Right] = []
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timer: asyncio.TimerHandle | None = None

    def under(self, *rights: Right, until: float = math.inf) -> None:
        """Say by which rights it is open.

        :param until: when they end by themselves, in seconds since the epoch.
        """
        self._rights += rights
        for right in rights:
            self._standing.stays.setdefault(right, set()).add(self)
        if until < math.inf:
            self._wind(until)

    def end(self, error: FlameError) -> None:
        """It may not go on.

        :param error: what to tell whoever has it open.
        """
        if self.ended is None:
            self.ended = error
            if self._task is not None:
                self._task.cancel()

    def close(self) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()
        for right in self._rights:
            stays = self._standing.stays[right]
            stays.discard(self)
            if not stays:
                del self._standing.stays[right]
        self._rights.clear()

    def __enter__(self) -> None:
        if self.ended is not None:
            raise self.ended
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        if self.ended is not None and task is not None:
            alone = task.uncancel() <= self._cancelling  # nobody else wants this task to end
            if alone and kind is asyncio.CancelledError:
                raise self.ended

    def _wind(self, until: float) -> None:
        left = until - time.time()
        if left <= 0:
            self.end(Unauthorized("This token has expired."))
        else:  # a clock that was set back makes it too early, and it is wound again
            self._timer = asyncio.get_running_loop().call_later(left, self._wind, until)


class Standing:
    """All that is open on a server.

    :ivar stays: what is open, by right.
    """

    def __init__(self) -> None:
        self.stays: dict[Right, set[Stay]] = {}

    @contextmanager
    def stay(self) -> Iterator[Stay]:
        """Something that may stay open, for as long as the context lasts."""
        stay = Stay(self)
        try:
            yield stay
        finally:
            stay.close()

    def end(self, right: Right, error: FlameError) -> None:
        """A right has ended: so does all that is open by it.

        :param error: what to tell whoever has it open.
        """
        for stay in list(self.stays.get(right, ())):
            stay.end(error)
