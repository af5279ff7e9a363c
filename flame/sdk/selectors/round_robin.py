"""Everyone in turn: each round the ``k`` ends that have waited longest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.sdk.plugins import integer
from flame.sdk.selectors.base import EndLike, OncePerRound


class RoundRobin(OncePerRound):
    """The ends in the order in which they are given, ``k`` a round, and from the beginning again.

    :param k: how many; all where there are fewer.
    """

    sort = "round_robin"

    def __init__(self, k: int) -> None:
        super().__init__(0)
        self.k = integer("k", k, low=1)
        self.turns: dict[str, int] = {}  # of each end, its place in the order in which they were chosen last

    def choose(self, ends: Mapping[str, EndLike], number: int) -> list[str]:
        """See :meth:`OncePerRound.choose`."""
        chosen = sorted(ends, key=lambda end: self.turns.get(end, 0))[: self.k]
        first = max(self.turns.values(), default=0) + 1
        self.turns.update({end: turn for turn, end in enumerate(chosen, first)})
        return chosen

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        return super().state() | {"turns": self.turns}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        super().load_state(state)
        self.turns = dict(state["turns"])
