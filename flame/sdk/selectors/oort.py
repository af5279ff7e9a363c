"""Oort: those whose data teach the model most, and who are fast enough.

    U(i)    = |B_i| sqrt(1 / |B_i| sum_{b in B_i} loss(b)^2)        statistical utility, told by the end
    Util(i) = min(U(i), 95th percentile) + sqrt(0.1 log R / L(i))   R: this round, L(i): i's last one
    Util(i) = Util(i) (T / t_i)^alpha                               if i takes longer than T

Of K places, a share epsilon goes to ends that were never tried, the faster ones first; the others go, with chances
proportional to Util, to ends whose Util is at least 95 % of that of the (1 - epsilon) K th. Epsilon decays. T is a
percentile of the durations, and is raised (the pacer) when what was gained in the last rounds is less than in those
before.

Lai, Zhu, Madhyastha, Chowdhury: Oort: Efficient Federated Learning via Guided Participant Selection. OSDI 2021,
algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from flame.errors import SpecError
from flame.sdk.plugins import integer, number
from flame.sdk.selectors.base import PROP_ROUND_DURATION, PROP_STAT_UTILITY, EndLike, OncePerRound, seconds

#: An end is in reach of the places if its utility is at least this share of the last one's that gets one.
CUTOFF = 0.95
#: Utilities above this share of them are taken for outliers and clipped.
CLIP = 0.95


class Oort(OncePerRound):
    """Guided selection. The ends' ``stat_utility`` and ``round_duration`` are noted by the role.

    :param k: K, how many ends a round has; ``aggr_num`` is the same, as in Flame's library.
    :param overcommitment: choose so many times K. The job's ``policy.overSelection`` also ends the round at K updates.
    :param exploration_factor: epsilon at the start, in [0, 1].
    :param exploration_factor_decay: what epsilon is multiplied with after each round.
    :param min_exploration_factor: the least epsilon.
    :param alpha: how hard slow ends are punished.
    :param round_threshold: T at the start, a percentile of the ends' durations; 100: no end is too slow.
    :param pacer_delta: by how many points T's percentile is raised.
    :param pacer_step: how many rounds the pacer compares with as many before.
    :param blocklist_threshold: an end is not chosen more often than this; -1: there is no limit.
    :param seed: makes the choices repeatable.
    """

    sort = "oort"
    timed = True

    def __init__(
        self,
        k: int | None = None,
        *,
        aggr_num: int | None = None,
        overcommitment: float = 1.0,
        exploration_factor: float = 0.9,
        exploration_factor_decay: float = 0.98,
        min_exploration_factor: float = 0.2,
        alpha: float = 2.0,
        round_threshold: float = 30.0,
        pacer_delta: float = 5.0,
        pacer_step: int = 20,
        blocklist_threshold: int = -1,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        if (k is None) == (aggr_num is None):
            raise SpecError(
                "The selector 'oort' needs k, the number of ends a round (or aggr_num, not both).", "kwargs"
            )
        places = integer("k", aggr_num if k is None else k, low=1)
        self.k = math.ceil(places * number("overcommitment", overcommitment, low=1))
        self.epsilon = number("exploration_factor", exploration_factor, low=0)
        self.decay = number("exploration_factor_decay", exploration_factor_decay, low=0)
        self.least = number("min_exploration_factor", min_exploration_factor, low=0)
        self.alpha = number("alpha", alpha, low=0)
        self.threshold = number("round_threshold", round_threshold, above=0)
        self.pacer_delta = number("pacer_delta", pacer_delta, low=0)
        self.pacer_step = integer("pacer_step", pacer_step, low=1)
        self.blocklist_threshold = integer("blocklist_threshold", blocklist_threshold, low=-1)
        self.last_round: dict[str, int] = {}
        self.times: dict[str, int] = {}
        self.gains: list[float] = []

    def choose(self, ends: Mapping[str, EndLike], number: int) -> list[str]:
        """See :meth:`OncePerRound.choose`."""
        for known in (self.last_round, self.times):
            for gone in known.keys() - ends.keys():
                del known[gone]
        chosen = self.pick(ends, min(self.k, len(ends)), number)
        self.epsilon = max(self.epsilon * self.decay, self.least)
        return chosen

    def pick(self, ends: Mapping[str, EndLike], places: int, number: int) -> list[str]:
        """Choose ``places`` of ``ends`` and remember the choice."""
        allowed = [
            end for end in ends if self.blocklist_threshold < 0 or self.times.get(end, 0) < self.blocklist_threshold
        ]
        told = {end: ends[end].get_property(PROP_STAT_UTILITY) for end in allowed}
        durations = {end: seconds(ends[end].get_property(PROP_ROUND_DURATION)) for end in allowed}
        utility = {end: float(each) for end, each in told.items() if each is not None and math.isfinite(each)}
        unexplored = [end for end in allowed if end not in utility]
        exploring = min(round(places * self.epsilon) if utility else places, len(unexplored))
        # Places that one side cannot fill go to the other.
        exploring = max(exploring, min(places - len(utility), len(unexplored)))
        exploited = self.exploit(utility, durations, places - exploring, number)
        chosen = [*exploited, *self.explore(unexplored, durations, exploring)]
        if exploited:
            self.gains.append(sum(utility[end] for end in exploited))
            self.pace()
        for end in chosen:
            self.last_round[end] = max(number, 1)
            self.times[end] = self.times.get(end, 0) + 1
        return chosen

    def total_utility(
        self, utility: Mapping[str, float], durations: Mapping[str, float | None], number: int
    ) -> dict[str, float]:
        """Util(i) of the ends that have told theirs."""
        ceiling = percentile(utility.values(), CLIP)
        preferred = self.preferred_duration(durations.values())
        total = {}
        for end, own in utility.items():
            value = min(own, ceiling) + math.sqrt(0.1 * math.log(max(number, 1)) / self.last_round.get(end, 1))
            duration = durations.get(end)
            if duration is not None and duration > preferred:
                value *= (preferred / duration) ** self.alpha
            total[end] = value
        return total

    def preferred_duration(self, durations: Iterable[float | None]) -> float:
        """T in seconds."""
        known = [each for each in durations if each is not None]
        return percentile(known, self.threshold / 100) if known and self.threshold < 100 else math.inf

    def exploit(
        self, utility: Mapping[str, float], durations: Mapping[str, float | None], places: int, number: int
    ) -> list[str]:
        """Choose among ends that were tried before, by their utility."""
        if places <= 0 or not utility:
            return []
        total = self.total_utility(utility, durations, number)
        order = sorted(total, key=lambda end: (-total[end], end))
        cutoff = CUTOFF * total[order[min(places, len(order)) - 1]]
        return self.draw({end: total[end] for end in order if total[end] >= cutoff}, places)

    def explore(self, unexplored: list[str], durations: Mapping[str, float | None], places: int) -> list[str]:
        """Choose among ends that were never tried, by their speed where it is known."""
        usual = [each for each in durations.values() if each is not None]
        middle = percentile(usual, 0.5) if usual else 1.0
        speed = {end: 1.0 / max(durations[end] or middle, 1e-9) for end in sorted(unexplored)}
        return self.draw(speed, places)

    def draw(self, weights: Mapping[str, float], places: int) -> list[str]:
        """Up to ``places`` ends without repetition, each draw with chances proportional to the weights left.

        The largest u^(1/w) with u uniform give just that (Efraimidis, Spirakis 2006); here as logarithms.
        """
        keys = {end: -self.random.expovariate(1.0) / max(weight, 1e-300) for end, weight in weights.items()}
        return sorted(keys, key=lambda end: (-keys[end], end))[:places]

    def pace(self) -> None:
        """Raise T when the last rounds gained less than those before them."""
        step = self.pacer_step
        if len(self.gains) >= 2 * step and len(self.gains) % step == 0:
            if sum(self.gains[-2 * step : -step]) > sum(self.gains[-step:]):
                self.threshold = min(100.0, self.threshold + self.pacer_delta)
            del self.gains[:-step]

    def state(self) -> dict[str, Any]:
        """See :meth:`Selector.state`."""
        own = {"epsilon": self.epsilon, "threshold": self.threshold, "gains": self.gains}
        return super().state() | own | {"last_round": self.last_round, "times": self.times}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Selector.load_state`."""
        super().load_state(state)
        self.epsilon, self.threshold, self.gains = state["epsilon"], state["threshold"], list(state["gains"])
        self.last_round, self.times = dict(state["last_round"]), dict(state["times"])


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which a share of them lies (nearest rank)."""
    order = sorted(values)
    return order[max(0, math.ceil(share * len(order)) - 1)]
