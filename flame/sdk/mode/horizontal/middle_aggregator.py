"""The synchronous middle aggregator, under the shorter name that Flame's scripts use."""

from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.middle_aggregator import MiddleAggregator
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]
