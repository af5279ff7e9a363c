"""Which share of all trainers took part in a round, for algorithms that keep an average over all of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flame.sdk.optimizers.base import Update, population_of
from flame.sdk.optimizers.layout import Array


class Population:
    """All trainers that were ever seen, with their numbers of samples.

    :param size: how many trainers there are in all; None: those seen so far, which is exact from the round on in
        which each has taken part once.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self._counts: dict[str, float] = {}
        self._members: dict[str, int] = {}
        self._round: dict[str, float] = {}

    def begin(self) -> None:
        """A round begins."""
        self._round.clear()

    def note(self, update: Update) -> None:
        """An update takes part in this round.

        One of an aggregator below also says how many trainers it has seen so far, and how many samples they have; in
        parts, the last part's word counts.
        """
        members, everybody = population_of(update)
        self._members[update.end] = members
        self._round[update.end] = self._round.get(update.end, 0.0) + update.count
        self._counts[update.end] = max(everybody, self._round[update.end])

    def share(self) -> float:
        """This round's samples among everybody's; with equal numbers, the share of trainers |S| / N."""
        known = sum(self._counts.values())
        seen = sum(self._members.get(end, 1) for end in self._counts)
        return sum(self._round.values()) / (known * max(1.0, (self.size or 0) / seen))

    def state(self) -> dict[str, Array]:
        """For the checkpoint: the ends as text in bytes, one a line, and their numbers of samples."""
        return {
            "population.ends": np.frombuffer("\n".join(self._counts).encode(), np.uint8),
            "population.counts": np.array(list(self._counts.values()), np.float64),
            "population.members": np.array([self._members.get(end, 1) for end in self._counts], np.int64),
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Take up a checkpoint."""
        ends = state["population.ends"].tobytes().decode().split("\n")
        self._counts = dict(zip(ends, state["population.counts"].tolist(), strict=False))
        self._members = dict(zip(ends, state["population.members"].tolist(), strict=False))
