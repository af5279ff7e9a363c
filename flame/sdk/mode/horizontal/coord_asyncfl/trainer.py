"""The trainer of coordinated asynchronous aggregation: it does what that of coordinated rounds does."""

from flame.sdk.mode.horizontal.coord_syncfl.trainer import TAG_FETCH, TAG_GET_AGGREGATOR, TAG_UPLOAD
from flame.sdk.mode.horizontal.coord_syncfl.trainer import Trainer as CoordinatedTrainer

__all__ = ["TAG_FETCH", "TAG_GET_AGGREGATOR", "TAG_UPLOAD", "Trainer"]


class Trainer(CoordinatedTrainer):
    """Trains whatever version it is given; see :class:`flame.sdk.mode.horizontal.coord_syncfl.trainer.Trainer`."""
