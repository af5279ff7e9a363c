"""Models as files in the safetensors format (https://huggingface.co/docs/safetensors), written and read with numpy alone.

A file is in place whole or not at all: it is written beside its place and moved there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk import tensors

#: Largest header that is read; the format's own limit.
HEADER_LIMIT = 100_000_000


def save(path: str | os.PathLike[str], weights: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays (of numpy or PyTorch).

    :param metadata: texts kept in the header.
    :raises flame.errors.CodecError: an array has a type that the format does not know.
    :raises OSError: the file cannot be written.
    """
    # Wide types first, so that every array begins at a multiple of its element's size.
    parts = sorted(
        ((name, *tensors.flatten(value, name)) for name, value in weights.items()),
        key=lambda part: -tensors.SIZES[part[1]],
    )
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, code, shape, array in parts:
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (offset, offset + array.nbytes)}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, _, _, array in parts:
                file.write(array.reshape(-1).view(np.uint8).data)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Read a file; gives the arrays and the metadata. bfloat16 comes as float32.

    :raises flame.errors.WorkerError: the file is none of this format, or is damaged.
    :raises OSError: the file cannot be read.
    """
    data = np.fromfile(path, np.uint8)
    try:
        size = int.from_bytes(data[:8].tobytes(), "little")
        if size > min(HEADER_LIMIT, len(data) - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(data[8 : 8 + size].tobytes())
        metadata = header.pop("__metadata__", {})
        body = data[8 + size :]
        arrays = {name: _array(body, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise WorkerError(f"{path} is no model file (safetensors): {error}.") from error
    return arrays, {str(key): str(value) for key, value in metadata.items()}


def _array(body: npt.NDArray[np.uint8], dtype: str, shape: list[int], data_offsets: list[int]) -> npt.NDArray[Any]:
    begin, end = data_offsets
    if not 0 <= begin <= end <= len(body) or min(shape, default=0) < 0:
        raise ValueError("an array lies outside of it")
    if end - begin != math.prod(shape) * tensors.SIZES[dtype]:
        raise ValueError("an array's length is not that of its shape")
    raw = body[begin:end].tobytes()  # the file may place an array at any address
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(raw, tensors.numpy_dtype(dtype)).reshape(shape).copy()
