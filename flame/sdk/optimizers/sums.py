"""Weighted sums of models, at memory bandwidth and without temporaries of a model's size.

An aggregator may hold the model, one accumulator and one update in flight. So everything works in place, in
blocks that stay in a core's second-level cache; numpy releases the GIL within each block.

**Precision.** Sums are kept in float32 for float32, float16 and bfloat16 tensors, in float64 for float64, integers and
booleans (the counters of normalisation layers are few and small). A float64 sum of a float32 model would be twice its
size, and a compensated one too, and break the memory bound. The error of a float32 sum of n terms is at most (n-1) u
of the sum of magnitudes, with u = 6e-8, and about sqrt(n) u in practice: 6e-7 for a hundred trainers, 2e-6 for a
thousand.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import numpy as np

from flame.errors import WorkerError
from flame.sdk.optimizers.layout import COUNTED, Array, Flat, Layout, Run, widen
from flame.sdk.tensors import forget

#: Bytes of accumulator handled at once: with the update's block and a temporary this stays within 1 MiB of cache.
BLOCK_BYTES = 256 * 1024
#: Bytes of a received update that stay resident behind the place where it is read.
FORGET_BYTES = 4 << 20


def blocks(size: int, itemsize: int) -> Iterator[slice]:
    """Slices that cut a vector of ``size`` elements into pieces of :data:`BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // itemsize)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def passing(array: Array, itemsize: int) -> Iterator[slice]:
    """The same for a received array that is gone through: of one in shared memory only the part at hand is resident."""
    behind = 0
    for part in blocks(array.size, itemsize):
        yield part
        if (part.stop - behind) * array.itemsize >= FORGET_BYTES or part.stop == array.size:
            forget(array[behind : part.stop])
            behind = part.stop


def check_finite(runs: list[Run], end: str) -> None:
    """Refuse values that are not finite, before any of them touches a sum: a sum cannot be cleaned again.

    A sum of squares is not finite if a value isn't, and costs one reading at memory bandwidth. It can also overflow, so
    only then the values themselves are looked at.

    :raises flame.errors.WorkerError: there is a NaN or an infinity; the text names the end.
    """
    for run in runs:
        if run.group == COUNTED:
            continue
        narrow = run.array.dtype.itemsize < 4  # their squares overflow all the time, and BLAS has no such types
        for part in passing(run.array, run.array.itemsize):
            piece = widen(run.array[part])
            if (narrow or not math.isfinite(abs(np.vdot(piece, piece)))) and not np.isfinite(piece).all():
                raise WorkerError(
                    f"The update of {end} has values that are not finite (NaN or infinity), so it is left out; "
                    f"its training has probably diverged: try a smaller learning rate."
                )


class WeightedSum:
    """The sum of factor * model over the models added so far, and of the factors.

    :param flat: the vectors to sum into; their values are overwritten by the first model.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.count = 0
        self._scratch = {
            vector.dtype: np.empty(min(vector.size, BLOCK_BYTES // vector.itemsize), vector.dtype)
            for vector in sorted(flat.values(), key=len)
        }
        self._total = 0.0
        self._unit = 1.0

    @property
    def total(self) -> float:
        """The sum of the factors."""
        return self._total * self._unit

    def add(self, runs: list[Run], factor: float) -> None:
        """Add one model. Factors are taken relative to the first one, so that equal ones cost no multiplication.

        :param factor: its weight (> 0), such as its number of samples.
        """
        if self.count == 0:
            self._unit = factor
        scale = factor / self._unit
        for run in runs:
            target = self.flat[run.group][run.start : run.start + run.array.size]
            _accumulate(target, run.array, scale, None if self.count == 0 else self._scratch[target.dtype])
        self.count += 1
        self._total += scale

    def divide(self, divisor: float | None = None) -> Flat:
        """Turn the sum into the mean, in place, and give the vectors away.

        :param divisor: divide floating tensors by this instead of the sum of the factors.
        """
        for group, vector in self.flat.items():
            by = self._total if divisor is None or group == COUNTED else divisor / self._unit
            if by != 1.0:
                for part in blocks(vector.size, vector.itemsize):
                    np.divide(vector[part], by, out=vector[part])
        return self.flat


def _accumulate(target: Array, values: Array, scale: float, scratch: Array | None) -> None:
    """``target += scale * values``, or without ``scratch`` (a block) ``target = scale * values``."""
    for part in passing(values, target.itemsize):
        into, piece = target[part], widen(values[part])
        if scratch is None:
            np.multiply(piece, scale, out=into, dtype=target.dtype)
        elif scale == 1.0:
            np.add(into, piece, out=into, dtype=target.dtype)
        else:
            scaled = scratch[: into.size]
            np.multiply(piece, scale, out=scaled, dtype=target.dtype)
            np.add(into, scaled, out=into)


class Buffers:
    """Vectors that are used again, round after round: the old model's become the next accumulator's.

    A buffer is handed out again only when nobody refers to it any more; whoever still holds the model of an earlier
    round (a slow receiver, a background upload) keeps it unchanged, and another one is made.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._kept: list[tuple[Flat, list[int]]] = []

    def take(self, layout: Layout) -> Flat:
        """Vectors of that layout that nobody else uses, with any values."""
        if layout is not self._layout:
            self._layout = layout
            self._kept.clear()
        for index, (_, unused) in enumerate(self._kept):
            if self._references(index) == unused:
                return self._kept[index][0]
        del self._kept[:-1]  # two at most: the model and the accumulator
        self._kept.append((layout.empty(), []))
        self._kept[-1][1].extend(self._references(-1))
        return self._kept[-1][0]

    def _references(self, index: int) -> list[int]:
        return [sys.getrefcount(vector) for vector in self._kept[index][0].values()]
