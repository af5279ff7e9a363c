"""Federated averaging.

    x' = sum_k n_k y_k / sum_k n_k

with y_k the model of trainer k after its local training and n_k its number of samples.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

import math
from typing import ClassVar

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Optimizer, Update, Weights
from flame.sdk.optimizers.layout import Flat, Layout, Run
from flame.sdk.optimizers.sums import Buffers, WeightedSum, check_finite


class FedAvg(Optimizer):
    """The mean of the updates, weighted by their number of samples. Also the base of those that go on from a mean.

    Memory: the model and one accumulator, which take turns.
    """

    sort = "fedavg"
    #: True for algorithms that do more than average, see :class:`flame.sdk.optimizers.layout.Layout`.
    apart: ClassVar[bool] = False

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.current: Weights = {}
        self.round = 0
        self._buffers = Buffers()
        self._sum: WeightedSum | None = None

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        if self.layout is None or not self.layout.fits(weights):
            self.layout = Layout(weights, apart=self.apart)
            self.prepare(self.layout)
        self.current = weights
        self.round = round
        self._sum = WeightedSum(self._buffers.take(self.layout))

    def fold(self, update: Update) -> None:
        """See :meth:`Optimizer.fold`."""
        if self.layout is None or self._sum is None:
            raise WorkerError(f"The update of {update.end} came outside of a round.")
        factor = self.weigh(update)
        if not (factor > 0 and math.isfinite(factor)):
            raise WorkerError(f"The update of {update.end} has the weight {factor}; it must be a number above 0.")
        runs = self.layout.runs(update.weights, update.end)
        check_finite(runs, update.end)
        self.accept(update, runs)
        self._sum.add(runs, factor)

    def finish(self) -> Weights:
        """See :meth:`Optimizer.finish`."""
        total, self._sum = self._sum, None
        if self.layout is None or total is None or total.count == 0:
            return self.current
        flat = self.close(total)
        self.current = {}  # whose buffer is the next accumulator
        return self.layout.weights(flat)

    def prepare(self, layout: Layout) -> None:
        """For algorithms that build on this one: the model's layout is known now."""

    def weigh(self, update: Update) -> float:
        """The weight of an update in the mean: its number of samples."""
        return update.count

    def accept(self, update: Update, runs: list[Run]) -> None:
        """For algorithms that build on this one: an update fits and is about to be added; raise to refuse it."""

    def close(self, total: WeightedSum) -> Flat:
        """Make the next model of the round's sum, in its vectors."""
        return total.divide()
