"""FedBuff: asynchronous aggregation in a buffer of K updates.

    x' = x + eta / K sum_{i in buffer} s(t - t_i) (y_i - x_{t_i}),     s(d) = 1 / (1 + d)^alpha

with t the server's version and t_i the one from which update i started. An update that an aggregator below sends for m trainers
counts as m.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered Asynchronous Aggregation.
AISTATS 2022, algorithm 1; the weight s is that of its experiments with alpha = 1/2, and the polynomial one of Xie, Koyejo, Gupta:
Asynchronous Federated Optimization, 2019.
"""

from __future__ import annotations

import numpy as np

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Optimizer, Update, Weights, trainers_of
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.optimizers.layout import COUNTED, Flat, Run, widen
from flame.sdk.optimizers.sums import WeightedSum, blocks
from flame.sdk.plugins import integer, number


class FedBuff(FedAvg):
    """Buffered asynchronous aggregation. Updates are differences; counters are averaged with the weights s.

    :param agg_goal: K, the number of updates after which :attr:`full` says that the buffer is to be emptied; None: the
        caller decides.
    :param eta: the server's learning rate, above 0.
    :param alpha: how fast stale updates lose weight, at least 0 (0: not at all).
    """

    sort = "fedbuff"
    differences = True

    def __init__(self, agg_goal: int | None = None, eta: float = 1.0, alpha: float = 0.5) -> None:
        super().__init__()
        self.agg_goal = None if agg_goal is None else integer("agg_goal", agg_goal, low=1)
        self.eta = number("eta", eta, above=0)
        self._trainers = 0
        self.alpha = number("alpha", alpha, low=0)

    @property
    def full(self) -> bool:
        """True when as many updates were folded as the goal says."""
        return self.agg_goal is not None and self._sum is not None and self._sum.count >= self.agg_goal

    def weigh(self, update: Update) -> float:
        """See :meth:`FedAvg.weigh`: how much a stale update counts.

        :raises flame.errors.WorkerError: it starts from a version that is yet to come.
        """
        staleness = self.round - update.version
        if staleness < 0:
            raise WorkerError(
                f"The update of {update.end} starts from round {update.version}; this is round {self.round}."
            )
        return float((1.0 + staleness) ** -self.alpha) * trainers_of(update)

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`FedAvg.begin`."""
        super().begin(weights, round)
        self._trainers = 0

    def accept(self, update: Update, runs: list[Run]) -> None:
        """See :meth:`FedAvg.accept`."""
        self._trainers += trainers_of(update)

    def middle(self) -> Optimizer:
        """See :meth:`Optimizer.middle`."""
        from flame.sdk.optimizers.groupmean import GroupBuff

        return GroupBuff(self.alpha)

    def close(self, total: WeightedSum) -> Flat:
        """See :meth:`FedAvg.close`."""
        moved = total.divide(self._trainers / self.eta)
        if self.layout is None:
            raise WorkerError("A round must begin before it can be finished.")
        for run in self.layout.runs(self.current, "the global model"):
            if run.group == COUNTED:
                continue
            target = moved[run.group][run.start : run.start + run.array.size]
            for part in blocks(target.size, target.itemsize):
                np.add(target[part], widen(run.array[part]), out=target[part])
        return moved
