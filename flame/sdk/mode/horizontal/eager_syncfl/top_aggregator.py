"""The top aggregator of an eager tree.

It is the synchronous one, which folds every update on arrival and takes a group's update in parts as well as in one piece.
"""

from flame.sdk.mode.horizontal.syncfl.top_aggregator import TAG_AGGREGATE, TAG_DISTRIBUTE
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator as SyncTopAggregator

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TopAggregator"]


class TopAggregator(SyncTopAggregator):
    """See :class:`flame.sdk.mode.horizontal.syncfl.top_aggregator.TopAggregator`."""
