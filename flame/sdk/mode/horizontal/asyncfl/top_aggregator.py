"""The top aggregator of asynchronous federated learning; see :mod:`flame.sdk.mode.horizontal.asyncfl.buffer`.

Beside FedBuff's own, a user's class is that of the synchronous top aggregator: only the base class differs.
"""

from __future__ import annotations

from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.mode.horizontal.asyncfl.buffer import BufferedAggregator
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE, Tally
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator as SyncTopAggregator
from flame.sdk.weights import get_weights, set_weights

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TopAggregator"]


class TopAggregator(BufferedAggregator, SyncTopAggregator):
    """Makes a new version of the model whenever enough updates are in; ``rounds`` says how many versions."""

    _nobody: set[str]

    def internal_init(self) -> None:
        """See :class:`Role`."""
        super().internal_init()
        self._nobody = set()

    def _distribute_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        if not self._met:
            self._await_trainers(channel)
        self._open_round(channel, get_weights(self.model), self.config.policy.round_deadline)
        self._serve(channel)

    def _aggregate_weights(self, tag: str) -> None:
        least = min(self.config.policy.min_trainers, self._goal)
        if not self._fill(self.channel(tag), self.config.policy.join_deadline) and self._tally.trainers < least:
            raise self._too_few(least)
        self._outgoing = None
        self._kept.settle()
        set_weights(self.model, self._optimizer.finish())
        self._privacy.step()
        self.update_metrics(self._privacy.metrics())

    def _take(self, channel: Channel, tally: Tally, end: str, message: Message | None) -> None:
        """See :class:`RoundAggregator`; when all say that they have nobody to train, there is nothing to wait for."""
        empty = len(tally.empty)
        super()._take(channel, tally, end, message)
        if len(tally.empty) > empty:
            self._nobody.add(end)
            if self._nobody.issuperset(channel.all_ends()):
                raise self._too_few(min(self.config.policy.min_trainers, self._goal))
        else:
            self._nobody.discard(end)
