"""The interface of a compressor: what is done to a model's arrays before they travel, and undone after."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from flame.errors import CodecError

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class Compressor(abc.ABC):
    """One way to make a model smaller. Made with its keyword arguments from the schema; registered in
    :mod:`flame.sdk.compression`.

    A worker has one for each channel that asks for it, so what it remembers (the error of the last round) is this
    worker's own. Only floating arrays are changed; integers (BatchNorm's counters) travel as they are.
    """

    sort: ClassVar[str]
    #: True for one that sends differences to a model that both sides have (see :meth:`reference`).
    needs_reference: ClassVar[bool] = False

    def reference(self, weights: Arrays) -> None:
        """The model that differences are taken to from now on: the last global model that both sides have.

        Who calls it, and when, is in :mod:`flame.sdk.compression.exchange`.

        :param weights: kept by reference, not changed.
        """

    @abc.abstractmethod
    def compress(self, weights: Arrays) -> tuple[dict[str, Array], dict[str, Any]]:
        """What to send in place of ``weights``. What is lost here may be made up for in the next call.

        :param weights: name -> C-contiguous array.
        :returns: the arrays, and small values that :meth:`decompress` needs (whatever msgpack can say).
        :raises flame.errors.CodecError: a value is not finite, or cannot be said in the smaller type.
        """

    @abc.abstractmethod
    def decompress(self, arrays: Arrays, metadata: Mapping[str, Any]) -> dict[str, Array]:
        """The weights again, in the types and shapes they had.

        :param arrays: what :meth:`compress` gave; may be read-only, and comes from another worker: not to be trusted.
        :raises flame.errors.CodecError: arrays and metadata do not fit together.
        """

    def state(self) -> dict[str, Any]:
        """All that a restart needs: arrays, which are not changed any more, and plain values, by name."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an earlier process, or of an earlier round; what is not in it is forgotten."""


def is_floating(array: Array) -> bool:
    """Whether a compressor acts on it: floating, and not empty."""
    return array.dtype.kind == "f" and array.size > 0


def check_finite(name: str, array: Array, what: str) -> None:
    """:raises flame.errors.CodecError: the array holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise CodecError(f"The array {name!r} holds values that are not finite; {what} cannot send them.")


def damaged(what: str) -> CodecError:
    """The error for compressed arrays that do not fit together."""
    return CodecError(f"The compressed message is damaged: {what}.")


def floating_dtype(text: Any) -> np.dtype[Any]:
    """The data type that a sender names.

    :raises flame.errors.CodecError: it is no floating type.
    """
    if text not in ("float16", "float32", "float64"):
        raise damaged(f"{text!r} is no floating type")
    dtype: np.dtype[Any] = np.dtype(text)
    return dtype
