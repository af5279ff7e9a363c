"""Models as a few flat vectors.

All optimizers do their arithmetic on flat vectors, one for each accumulating type, because a model of 160 small
tensors would else cost hundreds of numpy calls for each update. Tensors that lie next to each other in memory (the codec's
views of one received message, the models we make ourselves) are taken as one long array, a *run*.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Weights, check_update

#: The group of integer and boolean tensors: averaged in float64 and rounded back, never trained.
COUNTED = "counted"

#: What frameworks call the running statistics of normalisation layers. They are floating but not trained: an adaptive
#: server step or a drift correction could make a variance negative, so they are only ever averaged.
STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")

#: Models up to this size are copied together before they are added up.
SMALL_BYTES = 64 * 1024

#: bfloat16 as numpy sees it here: the upper half of a float32, as bits. numpy has no such type of its own, so such
#: tensors come as PyTorch's or ml_dtypes' and leave as they came.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])

Array = npt.NDArray[Any]
#: Group -> one vector.
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
    """The type in which sums of ``dtype`` are kept; :mod:`flame.sdk.optimizers.sums` says why.

    :raises flame.errors.WorkerError: such arrays cannot be averaged (text, objects, times).
    """
    if dtype.kind in "iub":
        return np.dtype(np.float64)
    if dtype.kind in "fc" and dtype.itemsize >= 4:
        return dtype.newbyteorder("=")
    if dtype in {np.dtype(np.float16), BFLOAT16}:
        return np.dtype(np.float32)
    raise WorkerError(f"A tensor of type {dtype} cannot be averaged; use floating, integer or boolean tensors.")


def is_trained(name: str, array: Array) -> bool:
    """True for a floating tensor that is a parameter, as far as its name and type tell."""
    return (array.dtype.kind == "f" or array.dtype == BFLOAT16) and not name.endswith(STATISTICS)


def plain(tensor: Any) -> Array:
    """A tensor of a model as a numpy array of the same memory; bfloat16 as :data:`BFLOAT16`."""
    if isinstance(tensor, np.ndarray):
        return tensor.view(BFLOAT16) if tensor.dtype.name == "bfloat16" else tensor
    from flame.sdk.tensors import flatten

    code, shape, array = flatten(tensor, "of the model")
    return (array.view(BFLOAT16) if code == "BF16" else array).reshape(shape)


def widen(array: Array) -> Array:
    """The values of an array, as float32 if it is a :data:`BFLOAT16` one, else as it is."""
    if array.dtype != BFLOAT16:
        return array
    bits = array["bfloat16"].astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def narrow(values: Array) -> Any:
    """float32 values as bfloat16, rounded to the nearest (ties to even), in the library that is there for it."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
    import ml_dtypes

    return rounded.view(ml_dtypes.bfloat16)


class Layout:
    """How a model's tensors lie in flat vectors, one vector a group.

    :param weights: the model; only names, shapes and dtypes are kept.
    :param apart: keep running statistics in groups of their own, for algorithms that do more than average.
    """

    def __init__(self, weights: Weights, *, apart: bool = False) -> None:
        self.sizes: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.trained: set[str] = set()
        self.slots: list[Slot] = []
        for name, tensor in weights.items():
            array = plain(tensor)
            dtype = accumulating(array.dtype)
            group = COUNTED if array.dtype.kind in "iub" else dtype.name
            if is_trained(name, array) or (not apart and group != COUNTED):
                self.trained.add(group)
            elif group != COUNTED:
                group = f"{group} averaged"
            start = self.sizes.get(group, 0)
            self.sizes[group] = start + array.size
            self.dtypes[group] = dtype
            self.slots.append(Slot(name, group, start, start + array.size, array.shape, array.dtype))

        self.small = sum(size * self.dtypes[group].itemsize for group, size in self.sizes.items()) <= SMALL_BYTES

    def empty(self) -> Flat:
        """Vectors for all groups, with no values yet."""
        return {group: np.empty(size, self.dtypes[group]) for group, size in self.sizes.items()}

    def full(self, value: float) -> Flat:
        """Vectors of ``value`` for the trained groups: an optimizer's state at its start."""
        return {group: np.full(self.sizes[group], value, self.dtypes[group]) for group in sorted(self.trained)}

    def fits(self, weights: Weights) -> bool:
        """True when ``weights`` has these names, shapes and dtypes, in this order."""
        return len(weights) == len(self.slots) and all(
            name == slot.name and array.shape == slot.shape and array.dtype == slot.dtype
            for (name, array), slot in zip(_plain(weights).items(), self.slots, strict=True)
        )

    def runs(self, weights: Weights, end: str) -> list[Run]:
        """The model ``weights`` as long arrays, as few as its place in memory allows.

        :param end: whose model it is, for the message.
        :raises flame.errors.WorkerError: names, shapes or dtypes differ from the layout's.
        """
        arrays = self._checked(weights, end)
        if self.small:
            return self._gathered(arrays)
        found: list[Run] = []
        # By group and dtype, the stretch that grows: its first slot and array, the address and index where it goes on.
        growing: dict[tuple[str, np.dtype[Any]], tuple[Slot, Array, int, int]] = {}
        for slot, array in zip(self.slots, arrays, strict=True):
            if slot.stop == slot.start:
                continue
            if not array.flags.c_contiguous:
                found.append(Run(slot.group, slot.start, array.reshape(-1)))
                continue
            address = array.__array_interface__["data"][0]
            key = (slot.group, slot.dtype)
            begun = growing.get(key)
            if begun is not None and begun[2] == address and begun[3] == slot.start:
                growing[key] = (begun[0], begun[1], address + array.nbytes, slot.stop)
                continue
            if begun is not None:
                found.append(_run(begun))
            growing[key] = (slot, array, address + array.nbytes, slot.stop)
        found.extend(_run(begun) for begun in growing.values())
        return found

    def _checked(self, weights: Weights, end: str) -> list[Array]:
        """The tensors in the order of the slots."""
        weights = _plain(weights)
        if len(weights) != len(self.slots):
            self._misfit(weights, end)
        arrays = []
        for name, _, _, _, shape, dtype in self.slots:
            array = weights.get(name)
            if array is None or array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
                self._misfit(weights, end)
            arrays.append(array)
        return arrays

    def _gathered(self, arrays: list[Array]) -> list[Run]:
        """One run a group, copied together: of a small model that is cheaper than to look where its tensors lie."""
        parts: dict[str, list[Array]] = {group: [] for group in self.sizes}
        for slot, array in zip(self.slots, arrays, strict=True):
            parts[slot.group].append(widen(array))
        return [
            Run(group, 0, np.concatenate(each, axis=None, dtype=self.dtypes[group], casting="unsafe"))
            for group, each in parts.items()
        ]

    def weights(self, flat: Flat) -> dict[str, Array]:
        """The model whose values are in ``flat``: views of it where the dtype is the accumulating one."""
        model = {}
        for slot in self.slots:
            values = flat[slot.group][slot.start : slot.stop]
            if slot.dtype == BFLOAT16:
                values = narrow(values)
            elif slot.dtype != values.dtype:
                if slot.group == COUNTED:
                    values = np.rint(values)
                values = values.astype(slot.dtype)
            model[slot.name] = values.reshape(slot.shape)
        return model

    def named(self, prefix: str, flat: Flat) -> dict[str, Array]:
        """An optimizer's state by tensor, ``PREFIX.NAME``, as views: the form that a checkpoint keeps."""
        return {
            f"{prefix}{slot.name}": flat[slot.group][slot.start : slot.stop].reshape(slot.shape)
            for slot in self.slots
            if slot.group in flat
        }

    def unnamed(self, prefix: str, state: Mapping[str, Array]) -> Flat:
        """The reverse of :meth:`named`.

        :raises flame.errors.WorkerError: the state is not of this model.
        """
        flat = self.full(0.0)
        for slot in self.slots:
            if slot.group in flat:
                values = state.get(f"{prefix}{slot.name}")
                if values is None or values.shape != slot.shape:
                    raise WorkerError(f"The optimizer's saved state does not fit the model: see {prefix}{slot.name}.")
                flat[slot.group][slot.start : slot.stop] = values.reshape(-1)
        return flat

    def _misfit(self, weights: Weights, end: str) -> NoReturn:
        check_update(
            {slot.name: np.broadcast_to(np.zeros((), slot.dtype), slot.shape) for slot in self.slots}, weights, end
        )
        raise WorkerError(f"The update of {end} does not fit the model.")


def _plain(weights: Weights) -> Weights:
    """The model with every tensor as :func:`plain` gives it; the same mapping if all are so already."""
    if all(type(tensor) is np.ndarray and tensor.dtype.kind in "fiubc" for tensor in weights.values()):
        return weights
    return {name: plain(tensor) for name, tensor in weights.items()}


def _run(begun: tuple[Slot, Array, int, int]) -> Run:
    slot, first, _, stop = begun
    if stop == slot.stop:
        return Run(slot.group, slot.start, first.reshape(-1))
    # The tensors up to `stop` follow `first` in memory, and the caller's mapping keeps them alive.
    longer = np.lib.stride_tricks.as_strided(first, (stop - slot.start,), (first.itemsize,), writeable=False)
    return Run(slot.group, slot.start, longer)
