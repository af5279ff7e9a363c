"""The synchronous aggregator, under the shorter name that Flame's scripts use."""

from flame.sdk.mode.horizontal.syncfl.top_aggregator import TAG_AGGREGATE, TAG_DISTRIBUTE, TopAggregator

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TopAggregator"]
