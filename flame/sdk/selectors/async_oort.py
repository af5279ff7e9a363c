"""Oort's choice under FedBuff's bounded concurrency: whoever makes room is followed by the most useful idle end.

Nguyen et al., AISTATS 2022, section 3, with the utility of Lai et al., OSDI 2021.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flame.errors import SpecError
from flame.sdk.plugins import suggest
from flame.sdk.selectors.base import EndLike
from flame.sdk.selectors.fedbuff import FedBuff
from flame.sdk.selectors.oort import Oort


class AsyncOort(FedBuff):
    """See :class:`FedBuff` and :class:`Oort`.

    :param c: how many ends may train at the same time.
    :param oort: the further arguments of :class:`Oort`.
    """

    sort = "async_oort"

    def __init__(self, c: int, seed: int | None = None, **oort: Any) -> None:
        super().__init__(c, seed)
        known = inspect.signature(Oort).parameters.keys() - {"k", "aggr_num", "seed"}
        for key in oort.keys() - known:
            raise SpecError(f"The selector 'async_oort' takes no argument {key!r}. {suggest(key, {'c', *known})}")
        self.oort = Oort(k=self.c, seed=seed, **oort)
        self._round: int | None = None

    def pick(self, idle: Mapping[str, EndLike], room: int, channel_props: Mapping[str, Any]) -> list[str]:
        """See :meth:`FedBuff.pick`. Epsilon decays when the round (the model's version) goes on."""
        number = channel_props.get("round") or 0
        chosen = self.oort.pick(idle, room, number) if room else []
        if number != self._round:
            self._round = number
            self.oort.epsilon = max(self.oort.epsilon * self.oort.decay, self.oort.least)
        return chosen

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        return super().state() | {"oort": self.oort.state(), "round": self._round}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        super().load_state(state)
        self.oort.load_state(state["oort"])
        self._round = state["round"]
