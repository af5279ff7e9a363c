"""The interface of a privacy: what happens to an update before it leaves, and what that is worth."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

from flame.sdk.optimizers.base import Weights


class Privacy(abc.ABC):
    """One rule. Constructed with its keyword arguments from the job, at the trainers and at the aggregator.

    A trainer calls :meth:`apply` on each update. The aggregator calls :meth:`step` for each round, reports
    :meth:`metrics`, and ends the job when :meth:`affords` says that another round would be one too many.
    """

    sort: ClassVar[str]

    @abc.abstractmethod
    def apply(self, weights: Weights, start: Weights) -> Weights:
        """The update in place of which nothing else may leave the trainer.

        :param weights: the trainer's model after local training.
        :param start: the global model that it started from.
        """

    def step(self) -> None:
        """A round was made of private updates."""

    def affords(self) -> bool:
        """False when another round would spend more than was allowed."""
        return True

    def metrics(self) -> dict[str, float]:
        """What was spent so far, for the round's metrics."""
        return {}

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier process."""
