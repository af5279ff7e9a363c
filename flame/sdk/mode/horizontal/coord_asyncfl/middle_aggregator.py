"""The middle aggregator of coordinated asynchronous aggregation: its group is what the coordinator said last.

A trainer that is taken away from it while it works still answers it, and is taken in; it is given nothing more from here.
"""

from __future__ import annotations

from flame.sdk.channel import Channel
from flame.sdk.mode.horizontal.asyncfl.middle_aggregator import MiddleAggregator as AsyncMiddleAggregator
from flame.sdk.mode.horizontal.coord_syncfl.top_aggregator import TAG_COORDINATE
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE
from flame.sdk.mode.message import MessageType

__all__ = ["TAG_AGGREGATE", "TAG_COORDINATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]


class MiddleAggregator(AsyncMiddleAggregator):
    """Aggregates the updates of the trainers that it has. There is nothing that a user must write."""

    _trainers: frozenset[str] = frozenset()

    def _join_channels(self) -> None:
        """See :class:`Role`: all of them at once, as nobody need be waited for (:meth:`_await_group`)."""
        self.cm.join_all()

    def _idle(self, channel: Channel) -> list[str]:
        """See :class:`BufferedAggregator`: of its own trainers."""
        return [end for end in super()._idle(channel) if end in self._trainers]

    def _turned(self) -> bool:
        """See :class:`BufferedAggregator`: the coordinator has said something."""
        return bool(self.channel(TAG_COORDINATE).heard())

    def _choose(self, channel: Channel) -> list[str]:
        """See :class:`BufferedAggregator`; first the coordinator is heard."""
        coordinator = self.channel(TAG_COORDINATE)
        for end in coordinator.heard():
            while not coordinator.is_rxq_empty(end):
                message, _ = coordinator.recv(end)
                if message is not None and MessageType.COORDINATED_ENDS in message:
                    self._trainers = frozenset(message[MessageType.COORDINATED_ENDS])
        return super()._choose(channel)

    def _await_group(self, channel: Channel) -> None:
        """Nobody need be waited for: who is in the group and when is the coordinator's affair."""
        self._met = True

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_COORDINATE]
