"""The trainer of distributed learning: no server; the members average their models by a ring all-reduce.

How they agree on each round is in :mod:`.member`, the all-reduce in :mod:`.ring`.
"""

from __future__ import annotations

from flame.errors import RoundFailed
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.average import RingMean
from flame.sdk.mode.distributed.member import Member
from flame.sdk.mode.distributed.peer import only_averages
from flame.sdk.optimizers.base import Optimizer

TAG_RING_ALLREDUCE = "ring_allreduce"


class Trainer(Member):
    """Trains on its own data, and averages with the others. See :class:`flame.sdk.mode.training.Training` for what the user writes."""

    TAG = TAG_RING_ALLREDUCE
    STEP = "ring_allreduce"
    _mean: RingMean

    def internal_init(self) -> None:
        """See :class:`Role`; also takes a place at the table."""
        super().internal_init()
        self._mean = RingMean(self._table, self.link.warning)

    def _use(self, optimizer: Optimizer) -> None:
        only_averages(optimizer, "Distributed")

    def _combine(self, plan: Plan) -> None:
        assert self._update is not None
        mean, total = self._mean(plan, *self._update)
        if total <= 0:
            raise RoundFailed(
                f"Round {plan.round} has no samples: every member's dataset_size is 0, or its training diverged."
            )
        self._take_up(mean)
        self.is_committer = plan.ring[0] == self._table.me.end

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_RING_ALLREDUCE]
