"""Constants that scripts written for Flame's library name."""

from __future__ import annotations

from enum import Enum

#: Where Flame's workers found mounted datasets.
DATA_FOLDER_PATH = "/flame/data"


class DeviceType(Enum):
    """Where tensors lie."""

    CPU = 1
    GPU = 2


class TrainState(Enum):
    """Where a trainer stands in a round."""

    PRE = "pre"
    DURING = "during"
    POST = "post"
