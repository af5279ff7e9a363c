"""Tensors of numpy and of PyTorch as plain bytes, and back, without a copy where that is possible.

The data types are named as safetensors names them (``F32``, ``BF16`` ...), little-endian. PyTorch is never
imported here: a tensor of its can only be met where the user's code has imported it already, so a look into
:data:`sys.modules` is enough, and a job without PyTorch never pays for it. numpy is imported when the first
tensor is met, which keeps ``import flame.sdk`` quick.
"""

from __future__ import annotations

import functools
import mmap
import sys
from typing import TYPE_CHECKING, Any

from flame.errors import CodecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Bytes of one element, by safetensors' name.
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}

_NUMPY = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: code for code, name in _NUMPY.items()} | {"bfloat16": "BF16"}


@functools.cache
def _code(dtype: np.dtype[Any]) -> str | None:
    """safetensors' name of a numpy data type; None where it has none."""
    return _NAMES.get(dtype.name)


@functools.cache
def numpy_dtype(code: str) -> np.dtype[Any]:
    """The little-endian numpy data type of a safetensors name other than ``BF16``."""
    import numpy as np

    return np.dtype(_NUMPY[code]).newbyteorder("<")


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is an array or scalar of numpy, or a tensor of PyTorch."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return True
    torch = sys.modules.get("torch")
    # A module that is still being imported has no Tensor yet.
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def flatten(value: Any, name: str) -> tuple[str, tuple[int, ...], npt.NDArray[Any]]:
    """The bytes of a tensor as they lie in memory; copied only where they do not lie in one piece.

    :param value: something for which :func:`is_tensor` is True; may lie on another device.
    :param name: for the error's text.
    :returns: safetensors' name of the type, the shape, and a C-contiguous little-endian array of the elements
        (of ``int16`` in place of ``bfloat16``).
    :raises flame.errors.CodecError: the type cannot be sent.
    """
    import numpy as np

    torch = sys.modules.get("torch")
    bfloat16 = False
    if torch is not None and hasattr(torch, "Tensor") and isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise CodecError(f"The tensor {name!r} is sparse or quantized; make it dense before it is sent.")
        if value.requires_grad or value.device.type != "cpu":
            value = value.detach().cpu()
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        bfloat16 = value.dtype is torch.bfloat16
        if bfloat16:
            value = value.contiguous().view(torch.int16)
        try:
            array: npt.NDArray[Any] = value.numpy()
        except TypeError as error:
            raise CodecError(f"The tensor {name!r} has the type {value.dtype}, which cannot be sent.") from error
    else:
        array = np.asarray(value)
    code = "BF16" if bfloat16 else _code(array.dtype)
    if code is None:
        raise CodecError(f"The array {name!r} has the type {array.dtype}, which cannot be sent; convert it first.")
    shape = array.shape
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if code == "BF16":
        array = array.view(np.int16)
    elif not array.dtype.isnative or sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return code, shape, array


def restore_bfloat16(root: npt.NDArray[Any], offset: int, shape: tuple[int, ...]) -> Any:
    """A tensor of bfloat16 from received bytes: PyTorch's where that is loaded, else one of ``ml_dtypes``.

    :param root: the received bytes, uint8.
    :param offset: where the tensor begins in it.
    :raises flame.errors.CodecError: neither library is there.
    """
    import numpy as np

    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "from_numpy"):
        bits = np.ndarray(shape, "<i2", root, offset)
        # PyTorch knows no read-only tensors: memory that may not be written is copied.
        return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(torch.bfloat16)
    try:
        import ml_dtypes
    except ImportError as error:
        raise CodecError(
            "A tensor of bfloat16 has arrived, which numpy alone cannot hold: "
            "import torch in this role, or pip install ml_dtypes."
        ) from error
    array = np.ndarray(shape, "<i2", root, offset).view(ml_dtypes.bfloat16)
    array.setflags(write=False)
    return array


def forget(array: npt.NDArray[Any]) -> None:
    """Say that a received array, or a piece of one, has been dealt with: it need not count as this process's memory now.

    Means something for messages that lie in shared memory, where it saves an aggregator a model of resident memory;
    for any other array nothing happens. The values stay: who reads them again maps them again, which costs a little.

    :param array: C-contiguous, made by :func:`flame.sdk.codec.decode`, or a view of one.
    """
    import numpy as np

    root: Any = array
    below: Any = array.base
    while below is not None and not isinstance(below, memoryview | SharedMap):
        if isinstance(below, np.ndarray):
            root = below
        below = getattr(below, "base", None)  # stride tricks put an object of their own between two arrays
    memory = below.obj if isinstance(below, memoryview) else below
    if not isinstance(memory, SharedMap):
        return
    begin = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    begin, end = -(-begin // _PAGE) * _PAGE, (begin + array.nbytes) // _PAGE * _PAGE
    if begin < end:
        memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class SharedMap(mmap.mmap):
    """A mapping of a segment that a peer has written: its pages are there also when this process lets go of them."""


_PAGE = mmap.PAGESIZE
