"""Half as many bytes: each number in 16 bits.

float16 keeps 11 bits of each number, between 6e-8 and 65504; bfloat16 keeps 8 bits, over the whole range of float32.
Both round to the nearest, ties to even (IEEE 754), so the relative error is at most 2**-11 and 2**-8.

A model that is averaged and rounded in each round stands still once its steps are below the last place. So what a message
loses is carried over to the next one (error feedback, see :mod:`flame.sdk.compression.int8`), for one more model's memory
at its sender.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flame.errors import CodecError
from flame.sdk.compression.base import (
    Array,
    Arrays,
    Compressor,
    check_finite,
    damaged,
    floating_dtype,
    is_floating,
)


class _Cast(Compressor):
    """What the two have in common.

    :param feedback: carry the error over to the next message.
    """

    #: How an array travels, and the largest number that can be said.
    sent_as: ClassVar[str]
    limit: ClassVar[str]

    def __init__(self, feedback: bool = True) -> None:
        self._feedback = bool(feedback)
        self._errors: dict[str, Array] = {}

    def compress(self, weights: Arrays) -> tuple[dict[str, Array], dict[str, Any]]:
        """See the base class. Refuses numbers that are too large."""
        arrays, types = dict(weights), {}
        errors: dict[str, Array] = {}
        for name, array in weights.items():
            if not is_floating(array) or array.itemsize == 2:
                continue
            error = self._errors.get(name)
            with np.errstate(over="ignore"):
                wanted = array if error is None or error.shape != array.shape else array + error
                wanted = wanted.astype(np.float32, copy=False)
                arrays[name] = self._shrink(wanted)
            if not self._finite(arrays[name]):
                check_finite(name, array, self.sort)
                raise CodecError(f"The array {name!r} holds numbers beyond {self.limit}, which {self.sort} cannot say.")
            if self._feedback:
                errors[name] = wanted - self._grow(arrays[name])
            types[name] = array.dtype.name
        self._errors.update(errors)
        return arrays, {"types": types}

    def decompress(self, arrays: Arrays, metadata: Mapping[str, Any]) -> dict[str, Array]:
        """See the base class."""
        types = metadata.get("types")
        if not isinstance(types, Mapping):
            raise damaged("it does not say the types of its arrays")
        weights = dict(arrays)
        for name, text in types.items():
            if name not in arrays or arrays[name].dtype.name != self.sent_as:
                raise damaged(f"{name!r} is not there as {self.sent_as}")
            weights[name] = self._grow(arrays[name]).astype(floating_dtype(text), copy=False)
        return weights

    @abc.abstractmethod
    def _shrink(self, array: Array) -> Array:
        """float32 to what travels; what is too large becomes infinite."""

    @abc.abstractmethod
    def _grow(self, array: Array) -> Array:
        """What has travelled as a new array of float32."""

    @abc.abstractmethod
    def _finite(self, array: Array) -> bool:
        """Whether all that travels is finite."""


class Float16(_Cast):
    """Send floating arrays as IEEE 754 half precision."""

    sort: ClassVar[str] = "float16"
    sent_as: ClassVar[str] = "float16"
    limit: ClassVar[str] = "65504"

    def _shrink(self, array: Array) -> Array:
        return array.astype(np.float16)

    def _grow(self, array: Array) -> Array:
        return array.astype(np.float32)

    def _finite(self, array: Array) -> bool:
        return bool(np.isfinite(array).all())


class BFloat16(_Cast):
    """Send floating arrays as the upper half of float32. They travel as uint16, since numpy has no such type."""

    sort: ClassVar[str] = "bfloat16"
    sent_as: ClassVar[str] = "uint16"
    limit: ClassVar[str] = "3.38e38"

    def _shrink(self, array: Array) -> Array:
        bits = array.view(np.uint32)
        # To the nearest, ties to even: add just below one half of the last place, and its last bit.
        bits = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
        bits >>= np.uint32(16)
        return bits.astype(np.uint16)

    def _grow(self, array: Array) -> Array:
        bits = array.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)

    def _finite(self, array: Array) -> bool:
        exponent = np.uint16(0x7F80)
        return not ((array & exponent) == exponent).any()
