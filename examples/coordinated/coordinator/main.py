"""The coordinator: there is nothing to write. A rule of one's own would be a method `assign(trainers, aggregators)`."""

from flame.sdk import Config
from flame.sdk.mode.horizontal.coord_syncfl.coordinator import Coordinator

coordinator = Coordinator(Config("config.json"))
coordinator.compose()
coordinator.run()
