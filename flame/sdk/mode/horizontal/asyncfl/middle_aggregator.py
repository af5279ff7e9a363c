"""The aggregator between two tiers of asynchronous federated learning.

It is given a version of the model, keeps its group at work on it, and answers when its own buffer is full: with the sum of
the differences, discounted for how old they were here, that stands for all of them. The top discounts it further for how
old it is there. While the answer is on its way, the group works on.
"""

from __future__ import annotations

from flame.sdk.mode.horizontal.asyncfl.buffer import BufferedAggregator
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.middle_aggregator import SHARE
from flame.sdk.mode.horizontal.syncfl.middle_aggregator import MiddleAggregator as SyncMiddleAggregator
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE
from flame.sdk.mode.message import MessageType

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]


class MiddleAggregator(BufferedAggregator, SyncMiddleAggregator):
    """Aggregates its group's updates as they come. There is nothing that a user must write."""

    def _join_channels(self) -> None:
        """See :class:`Role`: first the group's channel alone; see :meth:`_fetch_weights`."""
        self.cm.join(self.config.func_tag_map[TAG_DISTRIBUTE])

    def _fetch_weights(self, tag: str) -> None:
        """Be seen above when the group is there: another group, whose trainers began a second earlier, would do all the work."""
        if not self.cm.is_joined(self.config.func_tag_map[tag]):
            group = self.channel(TAG_DISTRIBUTE)
            if self.attempt == 1:
                expected = self.config.peers.get(group.name(), 1)
                self.wait_for_ends(group, expected, SHARE * self.config.policy.join_deadline)
            self.cm.join_all()
        super()._fetch_weights(tag)

    def _distribute_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        self._open_round(channel, self._given, None if self._seconds is None else SHARE * self._seconds)
        assert self._outgoing is not None
        if self._extra:
            self._outgoing[MessageType.EXTRA] = self._extra
        if not self._met:
            self._await_group(channel)
        self._serve(channel)

    def _aggregate_weights(self, tag: str) -> None:
        self._fill(self.channel(tag), self.config.policy.join_deadline)
        self._outgoing = None

    def _called_away(self) -> bool:
        """See :class:`BufferedAggregator`: the tier above has sent something else (the end, say), or is gone."""
        channel, source = self.channel(TAG_FETCH), self._source
        return source is None or not channel.has(source) or not channel.is_rxq_empty(source)
