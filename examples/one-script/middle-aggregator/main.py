"""A region, where the schema has regions: there is nothing to write."""

from importlib import import_module

from flame.sdk import Config

config = Config("config.json")
MiddleAggregator = import_module(f"flame.sdk.mode.{config.hyperparameters.mode}.middle_aggregator").MiddleAggregator

region = MiddleAggregator(config)
region.compose()
region.run()
