"""The interface of a selector: which of a channel's ends take part.

Each channel has a selector of its own, which may remember things from round to round. It only ever answers with ends
that are there: one that has left is forgotten, so nobody waits for it, and one that comes back is a newcomer.
"""

from __future__ import annotations

import abc
import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, Protocol

#: What a role notes about an end for the selectors that use it: the sum over its samples of how useful they are (see
#: :mod:`flame.sdk.selectors.oort`), and how long its last round took, from sending the model to the update's arrival.
PROP_STAT_UTILITY = "stat_utility"
PROP_ROUND_DURATION = "round_duration"

#: A property of the channel and one of an end, as :mod:`flame.sdk.channel` and :mod:`flame.sdk.end` write them.
STATE = "state"
SEND, RECV = "send", "recv"
RECEIVED, NONE = "recvd", "none"


class EndLike(Protocol):
    """What a selector sees of an end."""

    def get_property(self, key: str) -> Any:
        """The value noted under ``key``; None where there is none."""

    def set_property(self, key: str, value: Any) -> None:
        """Note a value."""


class Selector(abc.ABC):
    """One rule. Constructed with its keyword arguments from the job, once for each channel that uses it."""

    sort: ClassVar[str]
    #: Whether its choices depend on how long things take.
    timed: ClassVar[bool] = False

    @abc.abstractmethod
    def select(self, ends: Mapping[str, EndLike], channel_props: Mapping[str, Any]) -> list[str]:
        """The ends that take part.

        :param ends: everyone who is there, by id; in an order that is the same in every run of a job, while ids differ.
        :param channel_props: ``round``, and ``state``: ``send`` or ``recv``, what the ends are wanted for.
        :returns: ids, each one of ``ends``, none twice.
        """

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values (for the checkpoint)."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier process."""


class OncePerRound(Selector):
    """Base of rules that choose anew when a round begins, and stand by their choice until the next.

    :param seed: makes the choices repeatable; None: they differ from run to run.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.random = random.Random(seed)
        self.round: int | None = None
        self.chosen: list[str] = []

    def select(self, ends: Mapping[str, EndLike], channel_props: Mapping[str, Any]) -> list[str]:
        """See :meth:`Selector.select`. Without a ``round``, each question but one for ``recv`` begins a new one."""
        number = channel_props.get("round")
        self.chosen = [end for end in self.chosen if end in ends]
        same = number == self.round if number is not None else channel_props.get(STATE) == RECV
        if not (same and self.chosen):
            self.chosen = self.choose(ends, 0 if number is None else int(number))
            self.round = number
        return list(self.chosen)

    @abc.abstractmethod
    def choose(self, ends: Mapping[str, EndLike], number: int) -> list[str]:
        """The choice for round ``number``."""

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        version, words, gauss = self.random.getstate()
        return {"round": self.round, "chosen": self.chosen, "random": [version, list(words), gauss]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        self.round, self.chosen = state["round"], list(state["chosen"])
        version, words, gauss = state["random"]
        self.random.setstate((version, tuple(words), gauss))


def seconds(duration: Any) -> float | None:
    """A duration that a role has noted, as seconds; None where there is none."""
    if duration is None:
        return None
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
