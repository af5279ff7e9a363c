r"""A quarter of the bytes: 8-bit integers with a scale for each block, and the error carried over to the next round.

A block :math:`x` of numbers is sent as :math:`q = \mathrm{round}(x / s)` with :math:`s = \max|x| / 127`, and read as
:math:`s q`. Rounding to the nearest errs by at most :math:`s/2`; stochastic rounding, up with the probability of the
fraction, errs by less than :math:`s` and is right on average (QSGD: Alistarh et al., "QSGD: Communication-efficient SGD
via gradient quantization and encoding", 2017).

With error feedback a sender adds what the last message lost to the next one,

.. math:: p_t = x_t + e_t, \quad \text{send } Q(p_t), \quad e_{t+1} = p_t - Q(p_t),

so that all messages together say the truth but for the last error: :math:`\sum_t Q(p_t) = \sum_t x_t - e_{T+1}`
(Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", 2019; the idea is that of
Seide et al., "1-bit stochastic gradient descent", 2014). The error takes one more model's memory at its sender.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flame.errors import CodecError, SpecError
from flame.sdk.compression.base import Array, Arrays, Compressor, check_finite, damaged, floating_dtype, is_floating
from flame.sdk.plugins import integer

#: Where the scales of all arrays travel, one after the other.
SCALES = "__scales__"
LEVELS = 127
_ERROR, _RANDOM = "error/", "random"


class Int8(Compressor):
    """Quantise floating arrays to 8 bits.

    :param block: how many numbers share a scale; 0: one scale for each array.
    :param rounding: ``nearest`` or ``stochastic``.
    :param feedback: carry the error over to the next message.
    :param seed: for stochastic rounding; None draws one.
    :raises flame.errors.SpecError: an argument cannot be.
    """

    sort: ClassVar[str] = "int8"

    def __init__(
        self, block: int = 1024, rounding: str = "nearest", feedback: bool = True, seed: int | None = None
    ) -> None:
        self._block = integer("block", block, low=0)
        if rounding not in ("nearest", "stochastic"):
            raise SpecError(f"rounding must be nearest or stochastic, not {rounding!r}.", "kwargs")
        self._random = np.random.default_rng(seed) if rounding == "stochastic" else None
        self._feedback = bool(feedback)
        self._errors: dict[str, Array] = {}

    def compress(self, weights: Arrays) -> tuple[dict[str, Array], dict[str, Any]]:
        """See the base class."""
        if SCALES in weights:
            raise CodecError(f"An array cannot be named {SCALES!r} on a channel with int8 compression; rename it.")
        arrays, types, scales = dict(weights), {}, []
        errors: dict[str, Array] = {}
        for name, array in weights.items():
            if not is_floating(array):
                continue
            check_finite(name, array, "int8")
            with np.errstate(over="ignore"):
                wanted = array.astype(np.float32).reshape(-1)
            error = self._errors.get(name)
            if error is not None and error.size == wanted.size:
                wanted += error
            check_finite(name, wanted, "int8")
            blocks = _Blocks(wanted.size, self._block)
            scale = blocks.largest(wanted) / np.float32(LEVELS)
            steps = blocks.spread(np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 1e-38))
            steps *= wanted
            if self._random is None:
                np.rint(steps, out=steps)
            else:
                steps += self._random.random(steps.size, np.float32)
                np.floor(steps, out=steps)
            np.clip(steps, -LEVELS, LEVELS, out=steps)
            if self._feedback:
                errors[name] = wanted - steps * blocks.spread(scale)
            arrays[name] = steps.astype(np.int8).reshape(array.shape)
            types[name] = array.dtype.name
            scales.append(scale)
        self._errors.update(errors)
        if scales:
            arrays[SCALES] = np.concatenate(scales)
        return arrays, {"types": types, "block": self._block}

    def state(self) -> dict[str, Any]:
        """See the base class."""
        state: dict[str, Any] = {f"{_ERROR}{name}": error for name, error in self._errors.items()}
        if self._random is not None:
            state[_RANDOM] = self._random.bit_generator.state
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        errors = {name.removeprefix(_ERROR): each for name, each in state.items() if name.startswith(_ERROR)}
        self._errors = {name: np.array(error) for name, error in errors.items()}
        if self._random is not None and _RANDOM in state:
            self._random.bit_generator.state = state[_RANDOM]

    def decompress(self, arrays: Arrays, metadata: Mapping[str, Any]) -> dict[str, Array]:
        """See the base class."""
        types, block = metadata.get("types"), metadata.get("block")
        if not isinstance(types, Mapping) or not isinstance(block, int) or block < 0:
            raise damaged("it does not say the types of its arrays")
        weights = dict(arrays)
        scales = weights.pop(SCALES, np.empty(0, np.float32))
        if scales.dtype != np.float32 or scales.ndim != 1 or not np.isfinite(scales).all():
            raise damaged("its scales are no numbers")
        at = 0
        for name, text in types.items():
            dtype = floating_dtype(text)
            steps = arrays.get(name)
            if steps is None or steps.dtype != np.int8:
                raise damaged(f"{name!r} is not there as int8")
            blocks = _Blocks(steps.size, block)
            scale = scales[at : at + blocks.count]
            at += blocks.count
            if len(scale) < blocks.count:
                raise damaged("scales are missing")
            values = blocks.spread(scale)
            values *= steps.reshape(-1)
            weights[name] = values.reshape(steps.shape).astype(dtype, copy=False)
        if at != len(scales):
            raise damaged("it has more scales than blocks")
        return weights


class _Blocks:
    """How a flat array of ``size`` numbers (> 0) lies in blocks, the last of which may be shorter."""

    def __init__(self, size: int, block: int) -> None:
        self.size = size
        self.block = min(block, size) or size
        self.count = math.ceil(size / self.block) if size else 0

    def largest(self, flat: Array) -> Array:
        """The largest magnitude in each block."""
        whole = self.size // self.block * self.block
        rows = flat[:whole].reshape(-1, self.block)
        # Two passes that allocate nothing, in place of abs() of it all.
        found: Array = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        if whole < self.size:
            found = np.append(found, np.abs(flat[whole:]).max())
        return found

    def spread(self, values: Array) -> Array:
        """Each block's value for all of its numbers; a new array."""
        spread: Array = np.repeat(values, self.block)[: self.size]
        return spread
