"""Everyone in turn: each round the ``k`` ends that have waited longest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.sdk.plugins import integer
from flame.sdk.selectors.base import EndLike, OncePerRound


class RoundRobin(OncePerRound):
    """The ends in the order of their ids, ``k`` a round, and from the beginning again.

    :param k: how many; all where there are fewer.
    """

    sort = "round_robin"

    def __init__(self, k: int) -> None:
        super().__init__(0)
        self.k = integer("k", k, low=1)
        self.last = ""

    def choose(self, ends: Mapping[str, EndLike], number: int) -> list[str]:
        """See :meth:`OncePerRound.choose`."""
        order = sorted(ends)
        order = [end for end in order if end > self.last] + [end for end in order if end <= self.last]
        chosen = order[: self.k]
        self.last = chosen[-1] if chosen else self.last
        return chosen

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        return super().state() | {"last": self.last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        super().load_state(state)
        self.last = state["last"]
