"""The aggregator between two tiers that does not wait for its whole group.

Every update is folded on arrival. After each ``aggGoal`` of them (half of the group where the job does not say) what there is goes up
as a part of this group's update, and the next part is begun from the same model. The tier above folds parts as they come, each with
the number of samples that it stands for, so the result is the weighted mean, whatever the parts:

    sum_p N_p (sum_{k in p} n_k y_k / N_p) / sum_p N_p  =  sum_k n_k y_k / sum_k n_k,      N_p = sum_{k in p} n_k

What this is good for: when the last trainer of a group is in, most of the group's work is done in all tiers above; and when a
round's deadline comes first, only the late ones' updates are lost, not their groups'.
"""

from __future__ import annotations

from flame.sdk.channel import Channel
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.middle_aggregator import MiddleAggregator as SyncMiddleAggregator
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE, TOLD_MORE, Tally
from flame.sdk.mode.message import MessageType

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]


class MiddleAggregator(SyncMiddleAggregator):
    """Aggregates its group for the tier above, in parts. There is nothing that a user must write."""

    _parts: int = 0

    def _distribute_weights(self, tag: str) -> None:
        self._parts = 0
        super()._distribute_weights(tag)

    def _folded(self, channel: Channel, tally: Tally) -> None:
        """See :class:`RoundAggregator`: send a part up, if it is one and not the last."""
        goal = self.config.hyperparameters.aggregation_goal or max(1, (tally.target + 1) // 2)
        last = not tally.pending or tally.answered >= tally.target
        # A rule that needs all of a group's updates at once (a robust one) cannot do with parts of them.
        # Nor can a deterministic round, which must be the same when this worker is replaced in its middle: parts cannot be taken back.
        replaced = self._strict and self.config.restart.of(self.config.role).attempts > 0
        if last or replaced or not self._optimizer.streaming or tally.samples == self._sent[1]:
            return
        self._parts += 1
        if self._parts < goal:
            return
        self._parts = 0
        message = self._part()
        message[MessageType.METADATA][TOLD_MORE] = True
        self._answer(self.channel(TAG_UPLOAD), message)
        del message  # whose memory the next part may have
        self._optimizer.begin(self._given, self._round)
