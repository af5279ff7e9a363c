"""FedDyn: federated learning with dynamic regularisation.

    trainer:  y_k  = argmin_w F_k(w) - <g_k, w> + alpha / 2 ||w - x||^2
              g_k' = g_k - alpha (y_k - x)
    server:   h'   = h - alpha s (mean_k y_k - x)
              x'   = mean_k y_k - h' / alpha

with s the share of trainers that took part, and means weighted by samples (in the paper all have equally many).

Acar, Zhao, Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic Regularization. ICLR 2021,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from flame.sdk.optimizers.base import Regularizer, Update, Weights
from flame.sdk.optimizers.layout import Array, Flat, Run
from flame.sdk.optimizers.population import Population
from flame.sdk.optimizers.serverstep import ServerStep
from flame.sdk.optimizers.sums import WeightedSum
from flame.sdk.optimizers.terms import QuadraticTerm, trained
from flame.sdk.plugins import integer, number


class FedDyn(ServerStep):
    """Dynamic regularisation.

    :param alpha: strength, above 0; the paper takes 0.001 to 0.1.
    :param num_trainers: how many trainers there are; None: as many as were seen.
    """

    sort = "feddyn"
    vectors = ("h",)

    def __init__(self, alpha: float, num_trainers: int | None = None) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha, above=0)
        self.population = Population(None if num_trainers is None else integer("num_trainers", num_trainers, low=1))
        self._share = 0.0

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        super().begin(weights, round)
        self.population.begin()

    def accept(self, update: Update, runs: list[Run]) -> None:
        """See :meth:`FedAvg.accept`."""
        self.population.note(update)

    def close(self, total: WeightedSum) -> Flat:
        """See :meth:`FedAvg.close`."""
        self._share = self.population.share()
        return super().close(total)

    def move(self, current: Array, mean: Array, *states: Array) -> None:
        """See :meth:`ServerStep.move`."""
        (h,) = states
        h -= self.alpha * self._share * (mean - current)
        mean -= h / self.alpha

    def regularizer(self) -> Regularizer:
        """See :meth:`Optimizer.regularizer`."""
        return FedDynTerm(self.alpha)

    def state(self) -> dict[str, Array]:
        """See :meth:`Optimizer.state`."""
        return super().state() | self.population.state()

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Optimizer.load_state`."""
        super().load_state(state)
        self.population.load_state(state)


class FedDynTerm(QuadraticTerm):
    """The trainer's side; keeps -g_k as :attr:`linear`."""

    def finish(self, weights: Weights, steps: int, learning_rate: float) -> Weights:
        """See :meth:`Regularizer.finish`."""
        moved = {name: self.strength * (values - self.start[name]) for name, values in trained(weights).items()}
        self.linear = {name: self.linear[name] + each if self.linear else each for name, each in moved.items()}
        return super().finish(weights, steps, learning_rate)

    def state(self) -> dict[str, Array]:
        """See :meth:`Regularizer.state`."""
        return dict(self.linear)

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Regularizer.load_state`."""
        self.linear = dict(state)
