"""The top aggregator of coordinated asynchronous aggregation: the asynchronous one, which also tells the coordinator of the end."""

from __future__ import annotations

from flame.sdk.mode.farewell import say_done
from flame.sdk.mode.horizontal.asyncfl.top_aggregator import TopAggregator as AsyncTopAggregator
from flame.sdk.mode.horizontal.coord_syncfl.top_aggregator import TAG_COORDINATE
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE

__all__ = ["TAG_AGGREGATE", "TAG_COORDINATE", "TAG_DISTRIBUTE", "TopAggregator"]


class TopAggregator(AsyncTopAggregator):
    """See :class:`flame.sdk.mode.horizontal.asyncfl.top_aggregator.TopAggregator`."""

    def inform_end_of_training(self) -> None:
        """See the base class; the coordinator is told, too."""
        say_done(self.channel(TAG_COORDINATE))
        super().inform_end_of_training()

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_COORDINATE]
