"""Flame's data plane: the library in which a worker's machine learning is written.

    from flame.sdk import Config, Trainer

    class MyTrainer(Trainer):
        def __init__(self, config): self.config = config
        def load_data(self): ...
        def initialize(self): self.model = ...
        def train(self): ...; self.dataset_size = ...
        def evaluate(self): ...

    trainer = MyTrainer(Config("config.json"))
    trainer.compose()
    trainer.run()

Names are imported when they are first used: what a role does not need costs it no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame.sdk.channel import Channel
    from flame.sdk.channel_manager import ChannelManager
    from flame.sdk.config import Config
    from flame.sdk.dataset import Dataset
    from flame.sdk.mode.composer import CloneComposer, Composer
    from flame.sdk.mode.horizontal.syncfl.middle_aggregator import MiddleAggregator
    from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator
    from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator as Aggregator
    from flame.sdk.mode.horizontal.syncfl.trainer import Trainer
    from flame.sdk.mode.message import MessageType
    from flame.sdk.mode.role import Role
    from flame.sdk.mode.tasklet import Loop, Tasklet

_PLACES = {
    "Aggregator": "flame.sdk.mode.horizontal.syncfl.top_aggregator:TopAggregator",
    "Channel": "flame.sdk.channel:Channel",
    "ChannelManager": "flame.sdk.channel_manager:ChannelManager",
    "CloneComposer": "flame.sdk.mode.composer:CloneComposer",
    "Composer": "flame.sdk.mode.composer:Composer",
    "Config": "flame.sdk.config:Config",
    "Dataset": "flame.sdk.dataset:Dataset",
    "Loop": "flame.sdk.mode.tasklet:Loop",
    "MessageType": "flame.sdk.mode.message:MessageType",
    "MiddleAggregator": "flame.sdk.mode.horizontal.syncfl.middle_aggregator:MiddleAggregator",
    "Role": "flame.sdk.mode.role:Role",
    "Tasklet": "flame.sdk.mode.tasklet:Tasklet",
    "TopAggregator": "flame.sdk.mode.horizontal.syncfl.top_aggregator:TopAggregator",
    "Trainer": "flame.sdk.mode.horizontal.syncfl.trainer:Trainer",
}

__all__ = [
    "Aggregator",
    "Channel",
    "ChannelManager",
    "CloneComposer",
    "Composer",
    "Config",
    "Dataset",
    "Loop",
    "MessageType",
    "MiddleAggregator",
    "Role",
    "Tasklet",
    "TopAggregator",
    "Trainer",
]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = place.partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
