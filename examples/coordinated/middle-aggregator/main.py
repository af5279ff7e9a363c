"""An aggregator: there is nothing to write."""

from flame.sdk import Config
from flame.sdk.mode.horizontal.coord_syncfl.middle_aggregator import MiddleAggregator

aggregator = MiddleAggregator(Config("config.json"))
aggregator.compose()
aggregator.run()
