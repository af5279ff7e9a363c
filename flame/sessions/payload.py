"""What a task is given and what it answers, as bytes: anything that msgpack can say, with numpy arrays in it.

An array travels as its type (named as safetensors names it), its shape, and its memory; it is read as a view of the received
bytes, without a copy and not to be written to. Nothing here makes an object of a class that the sender names.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from flame.errors import CodecError, UsageError

_ARRAY = 1
_ALIGNMENT = 64
_plain = msgspec.msgpack.Encoder().encode
_head = msgspec.msgpack.Decoder(tuple[str, list[int]]).decode


def dumps(value: Any) -> bytes:
    """A value as bytes.

    :raises flame.errors.UsageError: something in it cannot travel.
    """
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, CodecError) as error:
        raise UsageError(
            f"{_short(value)} cannot be sent to or from a task: {error}. "
            "What msgpack knows and numpy arrays can; for other things send what they are made from."
        ) from error


def loads(data: bytes | memoryview) -> Any:
    """The value again.

    :raises flame.errors.CodecError: the bytes are none.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise CodecError(f"What a task was given or has answered is damaged: {error}.") from error


def _extend(value: Any) -> Any:
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


def _restore(code: int, data: memoryview) -> Any:
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


_encoder = msgspec.msgpack.Encoder(enc_hook=_extend)
_decoder = msgspec.msgpack.Decoder(ext_hook=_restore)
