"""A region: there is nothing to write."""

from flame.sdk import Config
from flame.sdk.mode.horizontal.eager_syncfl.middle_aggregator import MiddleAggregator

region = MiddleAggregator(Config("config.json"))
region.compose()
region.run()
