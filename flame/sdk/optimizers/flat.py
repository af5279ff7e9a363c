"""Models as a few flat vectors: the arithmetic of all optimizers, at memory bandwidth.

An aggregator may hold the model, one accumulator and one update, so everything here works in place and in blocks
that stay in a core's second-level cache; no temporary has a model's size. numpy releases the GIL in each block.

**Precision.** Sums are kept in float32 for float32, float16 and bfloat16 tensors, in float64 for float64, and in float64 for
integers and booleans (counters are few and small). A float64 sum of a float32 model would be twice the model and
break the memory bound, and a compensated one too. The error of a float32 sum of n terms is at most (n-1) u relative to the sum of
the magnitudes, with u = 6e-8, and about sqrt(n) u in practice: 6e-7 for a hundred trainers, 2e-6 for a thousand,
which is below what a step of local training changes. A mean of equal float32 models is off by a few ulp at most.

**Small tensors.** Tensors that lie next to each other in memory (the codec's views of one received message, our own models) are
treated as one long array, so that a model of 160 small tensors costs a handful of numpy calls, not 500.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Weights, check_update

#: Bytes of accumulator handled at once: with the update's block and a temporary this stays within 1 MiB of L2.
BLOCK_BYTES = 256 * 1024

#: The group of integer and boolean tensors: averaged and rounded back, never trained.
COUNTED = "counted"

Array = npt.NDArray[Any]
#: Group -> one vector. Floating tensors of the same accumulating type form a group, named by that type.
Flat = dict[str, Array]


class Slot(NamedTuple):
    """Where one tensor lies in the flat vectors."""

    name: str
    group: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Run(NamedTuple):
    """A stretch of a model that is one array in memory: ``array[i]`` belongs at ``start + i`` of the group's vector."""

    group: str
    start: int
    array: Array


def accumulating(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which sums of ``dtype`` are kept; see the module's text.

    :raises flame.errors.WorkerError: such arrays cannot be averaged (text, objects, times).
    """
    if dtype.kind in "iub":
        return np.dtype(np.float64)
    if dtype.kind in "fc" and dtype.itemsize >= 4:
        return dtype.newbyteorder("=")
    if dtype == np.float16 or dtype.name == "bfloat16":
        return np.dtype(np.float32)
    raise WorkerError(f"A tensor of type {dtype} cannot be averaged; use floating, integer or boolean tensors.")


class Layout:
    """How a model's tensors lie in flat vectors, one vector a group.

    :param weights: the model; only names, shapes and dtypes are kept.
    """

    def __init__(self, weights: Weights) -> None:
        self.sizes: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.slots: list[Slot] = []
        for name, array in weights.items():
            dtype = accumulating(array.dtype)
            group = COUNTED if array.dtype.kind in "iub" else dtype.name
            start = self.sizes.get(group, 0)
            self.sizes[group] = start + array.size
            self.dtypes[group] = dtype
            self.slots.append(Slot(name, group, start, start + array.size, array.shape, array.dtype))

    def empty(self) -> Flat:
        """Vectors for all groups, with no values yet."""
        return {group: np.empty(size, self.dtypes[group]) for group, size in self.sizes.items()}

    def zeros(self) -> Flat:
        """Vectors of zeros for the trained groups: an optimizer's state."""
        return {group: np.zeros(size, self.dtypes[group]) for group, size in self.sizes.items() if group != COUNTED}

    def fits(self, weights: Weights) -> bool:
        """True when ``weights`` has these names, shapes and dtypes, in this order."""
        return len(weights) == len(self.slots) and all(
            name == slot.name and array.shape == slot.shape and array.dtype == slot.dtype
            for (name, array), slot in zip(weights.items(), self.slots, strict=True)
        )

    def runs(self, weights: Weights, end: str) -> list[Run]:
        """The model ``weights`` as long arrays, as few as its place in memory allows.

        :param end: whose model it is, for the message.
        :raises flame.errors.WorkerError: names, shapes or dtypes differ from the layout's.
        """
        if len(weights) != len(self.slots):
            self._misfit(weights, end)
        found: list[Run] = []
        # By dtype: where the stretch that grows began (slot, array), and the memory address and index at which it goes on.
        open_runs: dict[np.dtype[Any], tuple[Slot, Array, int, int]] = {}
        for slot in self.slots:
            array = weights.get(slot.name)
            if array is None or array.shape != slot.shape or array.dtype != slot.dtype:
                self._misfit(weights, end)
            if slot.stop == slot.start:
                continue
            if not array.flags.c_contiguous:
                found.append(Run(slot.group, slot.start, array.reshape(-1)))
                continue
            address = array.__array_interface__["data"][0]
            begun = open_runs.get(slot.dtype)
            if begun is not None:
                if begun[2] == address and begun[3] == slot.start:
                    open_runs[slot.dtype] = (begun[0], begun[1], address + array.nbytes, slot.stop)
                    continue
                found.append(_close(begun))
            open_runs[slot.dtype] = (slot, array, address + array.nbytes, slot.stop)
        found.extend(_close(begun) for begun in open_runs.values())
        return found

    def weights(self, flat: Flat) -> dict[str, Array]:
        """The model whose values are in ``flat``: views of it where the dtype is the accumulating one."""
        model = {}
        for slot in self.slots:
            values = flat[slot.group][slot.start : slot.stop].reshape(slot.shape)
            if slot.dtype != values.dtype:
                if slot.group == COUNTED:
                    values = np.rint(values)
                values = values.astype(slot.dtype)
            model[slot.name] = values
        return model

    def named(self, prefix: str, flat: Flat) -> dict[str, Array]:
        """An optimizer's state by tensor, ``PREFIX.NAME``, as views: the form that a checkpoint keeps."""
        return {
            f"{prefix}.{slot.name}": flat[slot.group][slot.start : slot.stop].reshape(slot.shape)
            for slot in self.slots
            if slot.group in flat
        }

    def unnamed(self, prefix: str, state: Mapping[str, Array]) -> Flat:
        """The reverse of :meth:`named`.

        :raises flame.errors.WorkerError: the state is not of this model.
        """
        flat = self.zeros()
        for slot in self.slots:
            if slot.group in flat:
                values = state.get(f"{prefix}.{slot.name}")
                if values is None or values.shape != slot.shape:
                    raise WorkerError(f"The optimizer's saved state does not fit the model: see {prefix}.{slot.name}.")
                flat[slot.group][slot.start : slot.stop] = values.reshape(-1)
        return flat

    def _misfit(self, weights: Weights, end: str) -> NoReturn:
        mine = {slot.name: np.broadcast_to(np.zeros((), slot.dtype), slot.shape) for slot in self.slots}
        check_update(mine, weights, end)
        raise WorkerError(f"The update of {end} does not fit the model.")


def _close(begun: tuple[Slot, Array, int, int]) -> Run:
    slot, first, _, stop = begun
    if stop == slot.stop:
        return Run(slot.group, slot.start, first.reshape(-1))
    # The tensors up to `stop` follow `first` in memory, and the caller's mapping keeps them alive.
    size = stop - slot.start
    longer = np.lib.stride_tricks.as_strided(first, (size,), (first.itemsize,), writeable=False)
    return Run(slot.group, slot.start, longer)


def blocks(size: int, itemsize: int) -> Iterator[slice]:
    """Slices that cut a vector of ``size`` elements into pieces of :data:`BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // itemsize)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def check_finite(runs: list[Run], end: str) -> None:
    """Refuse values that are not finite, before any of them touches a sum.

    A sum of squares is not finite if a value isn't, and takes one pass at memory bandwidth. It may also overflow, so
    only then the values themselves are looked at.

    :raises flame.errors.WorkerError: there is a NaN or an infinity; the text names the end.
    """
    for run in runs:
        if run.group == COUNTED:
            continue
        exact = run.array.dtype.itemsize < 4
        for part in blocks(run.array.size, run.array.itemsize):
            piece = run.array[part]
            if (exact or not math.isfinite(abs(np.vdot(piece, piece)))) and not np.isfinite(piece).all():
                raise WorkerError(
                    f"The update of {end} has values that are not finite (NaN or infinity), so it is left out; "
                    f"its training has probably diverged: try a smaller learning rate."
                )


class WeightedSum:
    """The sum of factor * model over the models added so far, and of the factors.

    :param layout: of the models.
    :param flat: the vectors to sum into; their values are overwritten by the first model.
    """

    def __init__(self, layout: Layout, flat: Flat) -> None:
        self.layout = layout
        self.flat = flat
        self.count = 0
        self.total = 0.0
        self._unit = 1.0

    def add(self, runs: list[Run], factor: float) -> None:
        """Add one model. The factors are taken relative to the first one, so that equal ones cost no multiplication.

        :param factor: its weight (> 0), such as its number of samples.
        """
        if self.count == 0:
            self._unit = factor
        scale = factor / self._unit
        for run in runs:
            target = self.flat[run.group][run.start : run.start + run.array.size]
            _accumulate(target, run.array, scale, first=self.count == 0)
        self.count += 1
        self.total += scale

    def divide(self, divisor: float | None = None) -> Flat:
        """Turn the sum into the mean, in place, and give the vectors away.

        :param divisor: divide by this instead of the sum of the factors.
        """
        by = self.total if divisor is None else divisor / self._unit
        if by != 1.0:
            for vector in self.flat.values():
                for part in blocks(vector.size, vector.itemsize):
                    np.divide(vector[part], by, out=vector[part])
        return self.flat


def _accumulate(target: Array, values: Array, scale: float, *, first: bool) -> None:
    """``target += scale * values``, or ``target = scale * values`` the first time."""
    if first and scale == 1.0:
        np.copyto(target, values)
        return
    scratch = np.empty(min(target.size, BLOCK_BYTES // target.itemsize), target.dtype)
    for part in blocks(target.size, target.itemsize):
        into, piece = target[part], values[part]
        if first:
            np.multiply(piece, scale, out=into, dtype=target.dtype)
        elif scale == 1.0:
            np.add(into, piece, out=into, dtype=target.dtype)
        else:
            scaled = scratch[: into.size]
            np.multiply(piece, scale, out=scaled, dtype=target.dtype)
            np.add(into, scaled, out=into)


class Buffers:
    """Vectors that are used again, round after round: the old model's become the next accumulator's.

    A buffer is handed out again only when nobody refers to it any more; whoever still holds the model of an earlier round
    (a slow receiver, a background upload) keeps it unchanged, and another one is made.
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
