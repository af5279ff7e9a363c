"""How often an address may be wrong.

Tokens and keys have 256 bits, so nobody finds one by trying. What a limit keeps small is the work and the noise that trying makes:
signatures to check, lines in the log of who did what. It counts failures alone: whoever shows a good token is not held up by a
neighbour behind the same address who does not.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

#: So many failures at once, and one more every so many seconds.
BURST = 20
EVERY = 3.0
#: Of so many addresses. The one that has been quiet for longest is forgotten first, which costs an attacker with that many
#: addresses nothing: they have as many bursts.
ADDRESSES = 10_000


class Limiter:
    """Counts failures by address: a bucket that each failure empties a little, and time fills.

    :param clock: seconds, never going back.
    """

    def __init__(
        self, *, burst: int = BURST, every: float = EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._every = every
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when each bucket is full again

    def blocked(self, address: str) -> int:
        """For how many seconds an address has to wait until it may be wrong again; 0: it may be now."""
        wait = self._full_at.get(address, 0.0) - self._clock() - (self._burst - 1) * self._every
        return int(wait) + 1 if wait > 0 else 0

    def failed(self, address: str) -> None:
        """An address was wrong."""
        if self.blocked(address):
            return
        self._full_at[address] = max(self._full_at.get(address, 0.0), self._clock()) + self._every
        self._full_at.move_to_end(address)
        if len(self._full_at) > ADDRESSES:
            self._full_at.popitem(last=False)
