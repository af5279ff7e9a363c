"""A channel's compression: which messages are compressed, and which model a difference is taken to.

A channel has two sides that nobody names: one *gives* a model (the aggregator), the other *answers* with what became of
it (a trainer). Each side finds out which it is by what happens first: who sends weights before any were given to it gives;
who is given some answers from then on. It matters in two ways.

* A model may be given several times in a round (to who comes late), and everyone has to be given the same: what was
  made of it is kept, and recognised by the model's checksum. So error feedback is right on both sides. Whoever takes
  part in a round starts from the same given model, so what one round's rounding lost, the next one's makes up for.
* A difference (:attr:`Compressor.needs_reference`) can only be an answer. Each given model has a version; an
  answer names the one that it starts from, and the giver keeps the last ``history`` ones to read answers with. An answer to
  an older one cannot be read any more and counts as no message, as does any other answer that is too late. Where the
  algorithm lets trainers send differences anyway (``differences``), these are what is compressed, and nothing is kept.

In a message only the mapping ``weights`` is changed, and ``compression`` is added, which says how.
"""

from __future__ import annotations

import enum
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import CodecError
from flame.sdk.codec import Message
from flame.sdk.compression.base import Arrays, Compressor, damaged
from flame.sdk.weights import as_arrays

WEIGHTS = "weights"
COMPRESSION = "compression"


class Exchange:
    """Implements :class:`flame.sdk.channel.Compression` with a compressor, for one channel of one worker.

    :param compressor: this channel's own.
    :param history: how many given models are kept to read differences with. One model's memory each; synchronous rounds
        need one, asynchronous ones as many as the staleness that they allow.
    :param differences: answers are differences already, not models.
    """

    def __init__(self, compressor: Compressor, history: int = 1, *, differences: bool = False) -> None:
        self._compressor = compressor
        self._history = history
        self._keep = _zeros if differences else _copies
        self._gives = False
        self._last: tuple[object, Mapping[str, Any], Mapping[str, Any]] = (None, {}, {})
        self._given: OrderedDict[int, Arrays] = OrderedDict()
        self._version = secrets.randbits(40)  # a restarted giver does not take answers to its predecessor for its own
        self._answers: int | None = None  # the version that was given to this side
        self._lock = threading.Lock()

    def compress(self, message: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """See :class:`flame.sdk.channel.Compression`."""
        if COMPRESSION in message:
            return message
        key = next((key for key in message if _is_weights(key)), None)
        if key is None or not isinstance(message[key], Mapping):
            return message
        weights = as_arrays(message[key])
        with self._lock:
            arrays, how = self._give(weights) if self._answers is None else self._answer(weights)
        return {**message, key: arrays, COMPRESSION: how}

    def restore(self, message: Message) -> Message:
        """See :class:`flame.sdk.channel.Compression`.

        :raises flame.errors.CodecError: it is compressed in another way, damaged, or an answer to a model that is not kept.
        """
        how = message.data.pop(COMPRESSION, None)
        if how is None:
            return message
        arrays = message.data.get(WEIGHTS)
        if not isinstance(how, Mapping) or not isinstance(arrays, Mapping):
            raise damaged("it does not say how it is compressed")
        if how.get("sort") != self._compressor.sort:
            raise CodecError(f"The message is compressed with {how.get('sort')!r}, not with {self._compressor.sort!r}.")
        with self._lock:
            message.data[WEIGHTS] = self._restore(as_arrays(arrays), how)
        return message

    def state(self) -> dict[str, Any]:
        """See :class:`flame.sdk.channel.Compression`."""
        return self._compressor.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`flame.sdk.channel.Compression`."""
        with self._lock:
            self._compressor.load_state(state)
            self._last = (None, {}, {})  # a model that is given again after this is compressed again

    def _restore(self, arrays: Arrays, how: Mapping[str, Any]) -> Arrays:
        given, metadata = how.get("answers") is None, how.get("metadata")
        if given and not isinstance(how.get("version"), int):
            raise damaged("it has no version")
        if given and not self._gives:
            self._answers = how["version"]
        if self._compressor.needs_reference:
            if given:
                if self._answers is not None:
                    self._compressor.reference(self._keep(arrays))
                return arrays
            reference = self._given.get(how["answers"])
            if reference is None:
                raise CodecError("The message is the difference to a model that is not kept any more.")
            self._compressor.reference(reference)
        if not isinstance(metadata, Mapping):
            raise damaged("it does not say how it is compressed")
        return self._compressor.decompress(arrays, metadata)

    def _give(self, weights: Arrays) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """A model that others are to start from; the same again when it has not changed."""
        self._gives = True
        checksum = [
            (name, array.shape, zlib.crc32(array.data.cast("B"))) for name, array in weights.items() if array.size
        ]
        if checksum != self._last[0]:
            self._version += 1
            how: dict[str, Any] = {"sort": self._compressor.sort, "answers": None, "version": self._version}
            arrays: Mapping[str, Any] = weights
            if self._compressor.needs_reference:
                self._given[self._version] = self._keep(weights)
                while len(self._given) > self._history:
                    self._given.popitem(last=False)
            else:
                arrays, how["metadata"] = self._compressor.compress(weights)
            self._last = checksum, arrays, how
        elif self._compressor.needs_reference:
            return weights, self._last[2]
        return self._last[1], self._last[2]

    def _answer(self, weights: Arrays) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        arrays, metadata = self._compressor.compress(weights)
        return arrays, {"sort": self._compressor.sort, "answers": self._answers, "metadata": metadata}


def _copies(weights: Arrays) -> Arrays:
    # Copies: a given model's memory changes with the next round, a received one's is the channel's.
    return {name: np.array(array) for name, array in weights.items()}


def _zeros(weights: Arrays) -> Arrays:
    """As many zeros, without their memory."""
    return {name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in weights.items()}


class Nothing:
    """Implements :class:`flame.sdk.channel.Compression` by leaving everything as it is."""

    def compress(self, message: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The message itself."""
        return message

    def restore(self, message: Message) -> Message:
        """The message itself."""
        return message

    def state(self) -> dict[str, Any]:
        """There is nothing to remember."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """There is nothing to remember."""


def _is_weights(key: Any) -> bool:
    return (key.name.lower() if isinstance(key, enum.Enum) else key) == WEIGHTS
