r"""Only the largest changes: a fraction ``k`` of each array, as the difference to the model that both sides have.

With the global model :math:`w` that a trainer was given, its own model :math:`v` after training, and the error :math:`e`,

.. math:: p_t = v_t - w_t + e_t, \quad \text{send } \mathrm{top}_k(p_t), \quad e_{t+1} = p_t - \mathrm{top}_k(p_t),

and the receiver reads :math:`w_t + \mathrm{top}_k(p_t)` (Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", 2018).
What is small now adds up in :math:`e` until it is large enough to be sent. Indices take 4 bytes a number and values 4,
so ``k`` = 0.01 sends a fiftieth of a float32 model.

Only what answers a model can be such a difference: the model itself travels whole, so that newcomers, and those who
missed rounds, have the same reference as everyone else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flame.errors import CodecError
from flame.sdk.compression.base import Array, Arrays, Compressor, check_finite, damaged, floating_dtype, is_floating
from flame.sdk.plugins import number

INDICES, VALUES = "__indices__", "__values__"
SAMPLE_STEP = 97  # no power of two, so that the sample does not follow a matrix's rows
_ERROR = "error/"
_LARGEST = np.iinfo(np.uint32).max


class TopK(Compressor):
    """Send the ``k`` largest changes.

    :param k: the fraction of each array's numbers that travels, above 0 and at most 1; at least one number does.
    :param feedback: carry what was not sent over to the next message.
    :raises flame.errors.SpecError: an argument cannot be.
    """

    sort: ClassVar[str] = "topk"
    needs_reference: ClassVar[bool] = True

    def __init__(self, k: float = 0.01, feedback: bool = True) -> None:
        self._k = min(1.0, number("k", k, above=0, below=1 + 1e-9))
        self._feedback = bool(feedback)
        self._reference: Arrays = {}
        self._errors: dict[str, Array] = {}

    def reference(self, weights: Arrays) -> None:
        """See the base class."""
        self._reference = weights

    def compress(self, weights: Arrays) -> tuple[dict[str, Array], dict[str, Any]]:
        """See the base class.

        :raises flame.errors.CodecError: also when the reference has other arrays.
        """
        arrays: dict[str, Array] = {}
        indices, values, sent = [], [], []
        errors: dict[str, Array] = {}
        for name, array in weights.items():
            if name in (INDICES, VALUES):
                raise CodecError(f"An array cannot be named {name!r} on a channel with topk compression; rename it.")
            if not is_floating(array):
                arrays[name] = array
                continue
            before = self._reference.get(name)
            if before is None or before.shape != array.shape:
                raise CodecError(
                    f"The array {name!r} cannot be sent as a difference: the model that was received has no such one."
                )
            if array.size > _LARGEST:
                raise CodecError(f"The array {name!r} is too large for topk compression ({array.size} numbers).")
            with np.errstate(over="ignore", invalid="ignore"):
                change = np.subtract(array, before, dtype=np.float64 if array.itemsize == 8 else np.float32).reshape(-1)
                change = change.astype(np.float32, copy=False)
            error = self._errors.get(name)
            if error is not None and error.size == change.size:
                change += error
            check_finite(name, change, "topk")
            chosen = self._largest(change)
            indices.append(chosen)
            values.append(change[chosen])
            sent.append((name, array.dtype.name, len(chosen)))
            if self._feedback:
                change[chosen] = 0
                errors[name] = change
        self._errors.update(errors)
        if sent:
            arrays[INDICES] = np.concatenate(indices)
            arrays[VALUES] = np.concatenate(values)
        return arrays, {"sent": sent, "order": list(weights)}

    def state(self) -> dict[str, Any]:
        """See the base class."""
        return {f"{_ERROR}{name}": error for name, error in self._errors.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See the base class."""
        errors = {name.removeprefix(_ERROR): each for name, each in state.items() if name.startswith(_ERROR)}
        self._errors = {name: np.array(error) for name, error in errors.items()}

    def decompress(self, arrays: Arrays, metadata: Mapping[str, Any]) -> dict[str, Array]:
        """See the base class.

        :raises flame.errors.CodecError: also when it does not fit the reference.
        """
        sent, order = metadata.get("sent"), metadata.get("order")
        if not isinstance(sent, list | tuple) or not isinstance(order, list | tuple):
            raise damaged("it does not say what was sent")
        weights = dict(arrays)
        indices = weights.pop(INDICES, np.empty(0, np.uint32))
        values = weights.pop(VALUES, np.empty(0, np.float32))
        if indices.dtype.name != "uint32" or values.dtype.name != "float32":
            raise damaged("indices or values have another type")
        if indices.ndim != 1 or indices.shape != values.shape:
            raise damaged("indices and values do not agree")
        at = 0
        for entry in sent:
            try:
                name, text, count = entry
            except (TypeError, ValueError):
                raise damaged("it does not say what was sent") from None
            before = self._reference.get(name) if isinstance(name, str) else None
            if before is None or floating_dtype(text) != before.dtype:
                raise damaged(f"there is no model in which {name!r} could have changed")
            if not isinstance(count, int) or not 0 <= count <= min(before.size, len(indices) - at):
                raise damaged(f"{count!r} is no number of changes")
            chosen = indices[at : at + count]
            if count and int(chosen.max()) >= before.size:
                raise damaged(f"a change lies outside {name!r}")
            array = before.copy()
            flat = array.reshape(-1)
            flat[chosen] += values[at : at + count]
            weights[name] = array
            at += count
        if at != len(indices) or sorted(map(str, order)) != sorted(weights):
            raise damaged("it holds something that it does not name")
        return {name: weights[name] for name in order}

    def _largest(self, change: Array) -> Array:
        """The places of the largest magnitudes, in rising order; uint32."""
        count = max(1, min(change.size, round(self._k * change.size)))
        if count == change.size:
            return np.arange(count, dtype=np.uint32)
        sizes = np.abs(change)
        # Sorting out a large array takes long. A sample tells above which size about twice as many as needed lie; with
        # these alone the result is the same, as long as they are enough.
        places = None
        sample = sizes[::SAMPLE_STEP]
        wanted = 2 * count // SAMPLE_STEP + 8
        if wanted < sample.size // 2:
            bound = np.partition(sample, sample.size - wanted)[sample.size - wanted]
            places = np.flatnonzero(sizes >= bound)
            sizes = sizes[places]
        if sizes.size < count:
            places, sizes = None, np.abs(change)
        chosen = np.argpartition(sizes, sizes.size - count)[sizes.size - count :]
        chosen.sort()
        return (chosen if places is None else places[chosen]).astype(np.uint32)
