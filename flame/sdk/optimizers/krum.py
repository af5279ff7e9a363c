"""Krum and Multi-Krum: the updates that are nearest to their neighbours.

    score(i) = sum of ||y_i - y_j||^2 over the n - f - 2 nearest j

Krum takes the update of least score, Multi-Krum the mean of the m of least score.

Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent.
NIPS 2017, section 4.
"""

from __future__ import annotations

import numpy as np

from flame.errors import RoundFailed
from flame.sdk.optimizers.keepall import KeepAll
from flame.sdk.optimizers.layout import COUNTED, Array, Flat
from flame.sdk.optimizers.sums import blocks
from flame.sdk.plugins import integer


class MultiKrum(KeepAll):
    """Right as long as at most ``f`` of at least 2 f + 3 trainers lie.

    :param f: how many trainers may lie.
    :param m: how many updates are averaged; None: n - f.
    """

    sort = "multikrum"

    def __init__(self, f: int = 1, m: int | None = None) -> None:
        super().__init__()
        self.f = integer("f", f, low=0)
        self.m = None if m is None else integer("m", m, low=1)

    def combine(self, updates: list[Flat]) -> Flat:
        """See :meth:`KeepAll.combine`."""
        if len(updates) < 2 * self.f + 3:
            raise RoundFailed(
                f"{self.sort} with f={self.f} needs at least {2 * self.f + 3} updates, this round has {len(updates)}: "
                f"wait for more trainers (policy.minTrainers), or lower f."
            )
        near = np.sort(squared_distances(updates), axis=1)[:, 1 : len(updates) - self.f - 1]  # without itself
        best = np.argsort(near.sum(axis=1), kind="stable")[: self.m or len(updates) - self.f]
        return _mean([updates[i] for i in sorted(best.tolist())])


class Krum(MultiKrum):
    """The one update of least score.

    :param f: how many trainers may lie.
    """

    sort = "krum"

    def __init__(self, f: int = 1) -> None:
        super().__init__(f, 1)


def squared_distances(updates: list[Flat]) -> Array:
    """All squared distances between updates (n x n, float64), over their floating tensors.

    They come from inner products, for which a block is read once and not n times. The block's mean over the
    updates is taken off first, so that the products are of the distances' size and little is lost in their difference.
    """
    products = np.zeros((len(updates), len(updates)))
    for group, vector in updates[0].items():
        if group == COUNTED:
            continue
        for part in blocks(vector.size, np.dtype(np.float64).itemsize * len(updates)):
            rows = np.stack([each[group][part] for each in updates]).astype(
                np.complex128 if vector.dtype.kind == "c" else np.float64
            )
            rows -= rows.mean(axis=0)
            products += (rows @ rows.conj().T).real
    norms = np.diag(products)
    distances: Array = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0)
    return distances


def _mean(chosen: list[Flat]) -> Flat:
    """The mean of the chosen updates, in the vectors of the first."""
    total, *others = chosen
    for group, vector in total.items():
        for part in blocks(vector.size, vector.itemsize):
            for other in others:
                vector[part] += other[group][part]
            vector[part] /= len(chosen)
    return total
