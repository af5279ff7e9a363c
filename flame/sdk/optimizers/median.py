"""Coordinate-wise median of the updates: x'_j = median_k y_kj.

Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.
ICML 2018, definition 1.
"""

from __future__ import annotations

import numpy as np

from flame.sdk.optimizers.keepall import CoordinateWise
from flame.sdk.optimizers.layout import Array


class Median(CoordinateWise):
    """Right as long as fewer than half of the trainers lie."""

    sort = "median"

    def reduce(self, values: Array) -> Array:
        """See :meth:`CoordinateWise.reduce`."""
        result: Array = np.median(values, axis=0, overwrite_input=True)
        return result
