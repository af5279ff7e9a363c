"""The top aggregator of coordinated asynchronous aggregation: the asynchronous one, which also tells the coordinator of the end."""

from __future__ import annotations

from flame.sdk.mode.horizontal.asyncfl.top_aggregator import TopAggregator as AsyncTopAggregator
from flame.sdk.mode.horizontal.coord_syncfl.top_aggregator import TAG_COORDINATE
from flame.sdk.mode.horizontal.syncfl.rounds import FAREWELL_SECONDS, TAG_AGGREGATE, TAG_DISTRIBUTE
from flame.sdk.mode.message import MessageType

__all__ = ["TAG_AGGREGATE", "TAG_COORDINATE", "TAG_DISTRIBUTE", "TopAggregator"]


class TopAggregator(AsyncTopAggregator):
    """See :class:`flame.sdk.mode.horizontal.asyncfl.top_aggregator.TopAggregator`."""

    def inform_end_of_training(self) -> None:
        """See the base class; the coordinator is told, too."""
        self.channel(TAG_COORDINATE).broadcast({MessageType.EOT: True}, timeout=FAREWELL_SECONDS, kind="eot")
        super().inform_end_of_training()

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_COORDINATE]
