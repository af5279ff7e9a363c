"""A city: there is nothing to write."""

from flame.sdk import Config
from flame.sdk.mode.horizontal.eager_syncfl.middle_aggregator import MiddleAggregator

city = MiddleAggregator(Config("config.json"))
city.compose()
city.run()
