"""What an aggregator below the top makes of its group's updates: one update that stands for all of them.

Server rules that go on from the weighted mean of the updates (and of the arrays that come along with them) give the same
result for the groups' means as for the trainers' own updates:

    sum_g n_g (sum_{k in g} n_k y_k / n_g) / sum_g n_g  =  sum_k n_k y_k / sum_k n_k,      n_g = sum_{k in g} n_k

So below the top only means are taken, and the job's rule is applied once, at the top.
"""

from __future__ import annotations

from typing import ClassVar

from flame.sdk.optimizers.base import Update, Weights
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.optimizers.fedbuff import FedBuff
from flame.sdk.optimizers.layout import Flat, Layout, Run
from flame.sdk.optimizers.sums import Buffers, WeightedSum, check_finite


class GroupMean(FedAvg):
    """The mean of a group's models, weighted by their numbers of samples, and the same mean of their further arrays."""

    sort: ClassVar[str] = "groupmean"

    def __init__(self) -> None:
        super().__init__()
        self._extra: Layout | None = None
        self._extras: WeightedSum | None = None
        self._pool = Buffers()

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`FedAvg.begin`."""
        super().begin(weights, round)
        self._extras = None

    def accept(self, update: Update, runs: list[Run]) -> None:
        """See :meth:`FedAvg.accept`."""
        if not update.extra:
            return
        if self._extra is None or (self._extras is None and not self._extra.fits(update.extra)):
            self._extra = Layout(update.extra)
        further = self._extra.runs(update.extra, update.end)
        check_finite(further, update.end)
        if self._extras is None:
            self._extras = WeightedSum(self._pool.take(self._extra))
        self._extras.add(further, self.weigh(update))

    def extra(self) -> Weights:
        """The mean of the further arrays of this round's updates; ends the round for them."""
        total, self._extras = self._extras, None
        return {} if total is None or self._extra is None else self._extra.weights(total.divide())


class GroupBuff(FedBuff):
    """FedBuff's sum of a group: ``1 / K sum_i s(t - t_i) (y_i - x_{t_i})``. The server's learning rate is the top's.

    :param alpha: see :class:`FedBuff`.
    """

    sort: ClassVar[str] = "groupbuff"

    def __init__(self, alpha: float) -> None:
        super().__init__(alpha=alpha)

    def close(self, total: WeightedSum) -> Flat:
        """See :meth:`FedAvg.close`: the difference itself, not the model that it leads to."""
        return total.divide(self._trainers)
