"""What a task is given and what it answers, as bytes: anything that msgpack can say, with numpy arrays in it.

An array travels as its type (named as safetensors names it), its shape, and its memory; it is read as a view of the received
bytes, without a copy and not to be written to. Nothing here makes an object of a class that the sender names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec

from flame.errors import CodecError, UsageError
from flame.sessions.wire import REFERENCE

_ARRAY = 1
_plain = msgspec.msgpack.Encoder().encode
_head = msgspec.msgpack.Decoder(tuple[str, list[int]]).decode


class Reference:
    """What stands for an object in a payload; see :mod:`flame.sessions.objects`. Where a task runs, its value takes its place.

    :ivar digest: the SHA-256 of the object, in hex.
    """

    __slots__ = ("digest",)  # no tuple and no dataclass, which msgspec would write out by itself

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Reference({self.digest!r})"


#: What takes the place of a reference when a payload is read; None leaves references as they are.
resolve: Callable[[Reference], Any] | None = None


def dumps(value: Any) -> bytes:
    """A value as bytes.

    :raises flame.errors.UsageError: something in it cannot travel.
    """
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, CodecError) as error:
        raise refuse(value, error) from error


def refuse(value: Any, error: Exception) -> UsageError:
    """The error for a value that cannot travel."""
    return UsageError(
        f"{_short(value)} cannot be sent to or from a task: {error}. "
        "What msgpack knows and numpy arrays can; for other things send what they are made from."
    )


def loads(data: bytes | memoryview) -> Any:
    """The value again.

    :raises flame.errors.CodecError: the bytes are none.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"What a task was given or has answered is damaged: {error}.") from error


def extend(value: Any) -> Any:
    """What msgpack does not know of itself, as an extension.

    :raises TypeError: it cannot travel.
    """
    if isinstance(value, Reference):
        return msgspec.msgpack.Ext(REFERENCE, bytes.fromhex(value.digest))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        from flame.sdk.tensors import flatten

        code, shape, array = flatten(value, "an array")
        head = _plain((code, shape if isinstance(value, numpy.ndarray) else [-1]))
        # The elements begin at a multiple of their size from the end of the extension's head.
        return msgspec.msgpack.Ext(
            _ARRAY, b"".join((bytes((len(head),)), head, array.data.cast("B") if array.size else b""))
        )
    if isinstance(value, set | frozenset):
        return list(value)
    raise TypeError(f"objects of the class {type(value).__qualname__} are none of them")


def restore(code: int, data: memoryview) -> Any:
    """What an extension stands for.

    :raises ValueError: it is none of ours.
    """
    if code == REFERENCE:
        reference = Reference(data.hex())
        return reference if resolve is None else resolve(reference)
    if code != _ARRAY:
        raise ValueError(f"an unknown extension {code}")
    import numpy as np

    from flame.sdk.tensors import SIZES, numpy_dtype, restore_bfloat16

    length = data[0]
    name, shape = _head(data[1 : 1 + length])
    if name not in SIZES:
        raise ValueError(f"an array of the unknown type {name!r}")
    root = np.frombuffer(data, np.uint8, offset=1 + length)
    scalar = shape == [-1]
    size = tuple([] if scalar else shape)
    if name == "BF16":
        return restore_bfloat16(root, 0, size)
    dtype = numpy_dtype(name)
    if root.ctypes.data % dtype.itemsize:  # as it lies in a message; arithmetic on it would be slow
        root = root.copy()
    array = np.ndarray(size, dtype, root)
    array.setflags(write=False)
    return array[()] if scalar else array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_encoder = msgspec.msgpack.Encoder(enc_hook=extend)
_decoder = msgspec.msgpack.Decoder(ext_hook=restore)
