"""Federated averaging.

    x' = sum_k n_k y_k / sum_k n_k

with y_k the model of trainer k after its local training and n_k its number of samples.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

import math

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Optimizer, Update, Weights
from flame.sdk.optimizers.flat import Buffers, Flat, Layout, WeightedSum, check_finite


class FedAvg(Optimizer):
    """The mean of the updates, weighted by their number of samples. Also the base of those that step on from it."""

    sort = "fedavg"

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.current: Weights = {}
        self.round = 0
        self._buffers = Buffers()
        self._sum: WeightedSum | None = None

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        if self.layout is None or not self.layout.fits(weights):
            self.layout = Layout(weights)
            self.prepare(self.layout)
        self.current = weights
        self.round = round
        self._sum = WeightedSum(self.layout, self._buffers.take(self.layout))

    def fold(self, update: Update) -> None:
        """See :meth:`Optimizer.fold`."""
        if self.layout is None or self._sum is None:
            raise WorkerError(f"The update of {update.end} came outside of a round.")
        factor = self.weigh(update)
        if not (factor > 0 and math.isfinite(factor)):
            raise WorkerError(
                f"The update of {update.end} stands for {update.count} samples; it must be more than none."
            )
        runs = self.layout.runs(update.weights, update.end)
        check_finite(runs, update.end)
        self._sum.add(runs, factor)

    def finish(self) -> Weights:
        """See :meth:`Optimizer.finish`."""
        total, self._sum = self._sum, None
        if self.layout is None or total is None or total.count == 0:
            return self.current
        flat = total.divide()
        self.step(flat, total.count)
        self.current = {}  # the old model's buffer is the next accumulator
        return self.layout.weights(flat)

    def prepare(self, layout: Layout) -> None:
        """For algorithms that build on this one: the model's layout is known now."""

    def weigh(self, update: Update) -> float:
        """The weight of an update in the mean: its number of samples."""
        return update.count

    def step(self, mean: Flat, count: int) -> None:
        """For algorithms that build on this one: turn the mean of ``count`` updates into the next model, in place."""
