"""A dataset as an aggregator may keep it, for analysis beside the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.errors import UsageError


class Dataset:
    """Data and labels as arrays: given as such, or the first batch of a loader.

    :param x: data, ``[samples, ...]``.
    :param y: labels, ``[samples, ...]``.
    :param dataloader: gives batches ``(data, labels)`` of arrays or PyTorch tensors; used where ``x`` and ``y`` are not given.
    :raises flame.errors.UsageError: neither is given, or only one of ``x`` and ``y``.
    """

    def __init__(self, x: Any = None, y: Any = None, dataloader: Iterable[Any] | None = None) -> None:
        if dataloader is not None:
            x, y = next(iter(dataloader))[:2]
        if x is None or y is None:
            raise UsageError("A Dataset needs both x and y, or a dataloader.")
        self.x: npt.NDArray[Any] = np.asarray(x)
        self.y: npt.NDArray[Any] = np.asarray(y)

    def get(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Data and labels."""
        return self.x, self.y
