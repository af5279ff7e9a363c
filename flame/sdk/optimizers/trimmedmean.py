"""Coordinate-wise trimmed mean: without the floor(beta n) largest and smallest values, the mean of the others.

Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.
ICML 2018, definition 2.
"""

from __future__ import annotations

import math

from flame.sdk.optimizers.keepall import CoordinateWise
from flame.sdk.optimizers.layout import Array
from flame.sdk.plugins import number


class TrimmedMean(CoordinateWise):
    """Right as long as at most a share ``beta`` of the trainers lie.

    :param beta: the share that is cut off at each side, in [0, 0.5).
    """

    sort = "trimmedmean"

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = number("beta", beta, low=0, below=0.5)

    def reduce(self, values: Array) -> Array:
        """See :meth:`CoordinateWise.reduce`."""
        cut = math.floor(self.beta * len(values) + 1e-9)  # 0.1 * 10 is to be 1
        values.sort(axis=0)
        result: Array = values[cut : len(values) - cut].mean(axis=0)
        return result
