"""FedBuff's bounded concurrency: at most ``c`` ends train at any time, and who has answered makes room for another.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered Asynchronous Aggregation.
AISTATS 2022, section 3.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from flame.sdk.plugins import integer
from flame.sdk.selectors.base import RECV, STATE, EndLike, Selector
from flame.sdk.selectors.inflight import InFlight


class FedBuff(Selector):
    """For ``send``: as many ends as there is room for, by chance. For ``recv``: those who have work in hand.

    :param c: how many ends may train at the same time.
    :param seed: makes the choices repeatable.
    """

    sort = "fedbuff"

    def __init__(self, c: int, seed: int | None = None) -> None:
        self.c = integer("c", c, low=1)
        self.random = random.Random(seed)
        self.in_flight = InFlight()

    def select(self, ends: Mapping[str, EndLike], channel_props: Mapping[str, Any]) -> list[str]:
        """See :meth:`Selector.select`."""
        self.in_flight.refresh(ends)
        if channel_props.get(STATE) == RECV:
            return list(self.in_flight.ends)
        idle = sorted(ends.keys() - set(self.in_flight.ends))
        room = min(max(0, self.c - len(self.in_flight.ends)), len(idle))
        chosen = self.pick({end: ends[end] for end in idle}, room, channel_props)
        self.in_flight.add(chosen, ends)
        return chosen

    def pick(self, idle: Mapping[str, EndLike], room: int, channel_props: Mapping[str, Any]) -> list[str]:
        """Choose ``room`` of those who have nothing to do."""
        return self.random.sample(list(idle), room)

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        return {"in_flight": list(self.in_flight.ends)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        self.in_flight.ends = list(state["in_flight"])
