"""Messages as bytes: a small envelope, then the tensors in the layout of safetensors.

A message is a mapping with tensors anywhere inside. On the wire it is::

    prefix    24 bytes: magic, version, flags, length of the envelope, length of the head, length of it all
    envelope  msgpack: sender, round, attempt, kind, metadata, and the message with each tensor replaced by a reference
    (zeros up to a multiple of 8)
    tensors   8 bytes length, JSON header, buffers: a safetensors file as it stands
              (https://huggingface.co/docs/safetensors, format)

All but the buffers is the *head*, a few kilobytes that are joined; the buffers are views of the tensors where they lie,
so encoding costs the same for a model of 1 MB and of 1 GB, and so does decoding, which gives views of the received
bytes. The head is padded so that the buffers begin at a multiple of 64 bytes.

What arrives is not trusted: every length and offset is checked against what is really there before anything is made
of it, the tensors must follow each other without a hole, and nothing is unpickled.
"""

from __future__ import annotations

import enum
import itertools
import math
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flame.errors import CodecError
from flame.sdk import tensors
from flame.sdk.backends.base import Frames
from flame.sdk.msgpackcheck import check_counts

if TYPE_CHECKING:
    import numpy.typing as npt

MAGIC = b"FLM\x89"
VERSION = 1
#: Largest message that is read where the caller says nothing else.
LIMIT = 1 << 40
#: How deep a message may be nested.
DEPTH = 64

_PREFIX = struct.Struct("<4sHHIIQ")
_LENGTH = struct.Struct("<Q")
_ONE = struct.Struct("<I")
_RUN = struct.Struct("<III")
# Codes of the msgpack extensions: a tensor, a numpy scalar, a whole mapping of tensors.
_TENSOR, _SCALAR, _MAPPING = 1, 2, 3
_NO_TENSORS = _LENGTH.pack(8) + b"{}      "
_METADATA = "__metadata__"
#: The mapping under this key keeps its own names in the safetensors header; other tensors are named by their path.
_WEIGHTS = "weights"


class Message(Mapping[Any, Any]):
    """A received message: a mapping, with what the envelope said of it.

    Keys are strings; an enum's member finds the key that :func:`encode` made of it. Tensors are read-only numpy arrays
    that share the received bytes: who keeps one keeps all of them. bfloat16 comes as PyTorch's tensors where that is loaded.

    :ivar data: the mapping itself.
    :ivar sender: the end that sent it.
    :ivar round: the sender's round; 0 where it has none.
    :ivar attempt: the sender's attempt.
    :ivar kind: what sort of message it is.
    :ivar metadata: small values beside the data.
    :ivar nbytes: its length on the wire.
    """

    __slots__ = ("attempt", "data", "kind", "metadata", "nbytes", "round", "sender")

    def __init__(
        self,
        data: dict[Any, Any],
        *,
        sender: str = "",
        round: int = 0,
        attempt: int = 1,
        kind: str = "",
        metadata: Mapping[str, Any] | None = None,
        nbytes: int = 0,
    ) -> None:
        self.data = data
        self.sender = sender
        self.round = round
        self.attempt = attempt
        self.kind = kind
        self.metadata = metadata or {}
        self.nbytes = nbytes

    def __getitem__(self, key: Any) -> Any:
        return self.data[_plain_key(key)]

    def __contains__(self, key: object) -> bool:
        return _plain_key(key) in self.data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Message({sorted(map(str, self.data))}, sender={self.sender!r}, round={self.round}, kind={self.kind!r})"


class _Envelope(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What stands before the tensors. ``order[i]`` is the place in the message of the i-th tensor on the wire."""

    sender: str
    round: int
    attempt: int
    kind: str
    metadata: dict[str, Any]
    count: int
    order: list[int] | None
    digest: bytes | None
    data: msgspec.Raw


class _Entry(msgspec.Struct):
    """A tensor in the safetensors header. The defaults let ``__metadata__`` pass, and are refused elsewhere."""

    dtype: str = ""
    shape: list[int] = []
    data_offsets: tuple[int, int] = (-1, -1)


class _Tensor(NamedTuple):
    name: str
    code: str
    shape: tuple[int, ...]
    array: npt.NDArray[Any]


_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode
_read_envelope = msgspec.msgpack.Decoder(_Envelope).decode
_read_header = msgspec.json.Decoder(dict[str, _Entry]).decode


def _plain_key(key: Any) -> Any:
    """An enum's member as a key: its value where that is a string, else its name in lower case."""
    if isinstance(key, enum.Enum):
        return key.value if isinstance(key.value, str) else key.name.lower()
    return key


class _Packer:
    """Takes the tensors out of one message."""

    def __init__(self) -> None:
        self.found: list[_Tensor] = []
        self.names: set[str] = {_METADATA}

    def pack(self, value: Any, path: tuple[str, ...]) -> Any:
        """``value`` with each tensor replaced by a reference."""
        if value is None or type(value) in (str, int, float, bool, bytes):
            return value
        if tensors.is_tensor(value):
            return self._reference(value, path)
        if len(path) > DEPTH:
            raise CodecError(f"A message may be nested {DEPTH} deep; this one is deeper, at {'.'.join(path[:4])} ...")
        if isinstance(value, Message):
            value = value.data
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, list | tuple):
            return [self.pack(item, (*path, str(i))) for i, item in enumerate(value)]
        if isinstance(value, bytearray | memoryview):
            return bytes(value)
        return value

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        prefix = "".join(f"{part}." for part in path)
        if path == (_WEIGHTS,):
            prefix = ""
        if value and all(type(k) is str and tensors.is_tensor(v) and not _is_scalar(v) for k, v in value.items()):
            names = [prefix + key for key in value]
            if self.names.isdisjoint(names):
                start = len(self.found)
                self.names.update(names)
                self.found.extend(
                    _Tensor(name, *tensors.flatten(item, name))
                    for name, item in zip(names, value.values(), strict=True)
                )
                return msgspec.msgpack.Ext(_MAPPING, _RUN.pack(start, len(names), len(prefix)))
        packed = {}
        for key, item in value.items():
            plain = _plain_key(key)
            if plain in packed:
                raise CodecError(f"Two keys of a message become the same on the wire: {plain!r}.")
            packed[plain] = self.pack(item, (*path, str(plain)))
        return packed

    def _reference(self, value: Any, path: tuple[str, ...]) -> msgspec.msgpack.Ext:
        name = ".".join(path[1:] if path[0] == _WEIGHTS and len(path) > 1 else path)
        while name in self.names:
            name += "'"
        self.names.add(name)
        self.found.append(_Tensor(name, *tensors.flatten(value, name)))
        code = _SCALAR if _is_scalar(value) else _TENSOR
        return msgspec.msgpack.Ext(code, _ONE.pack(len(self.found) - 1))


def _is_scalar(value: Any) -> bool:
    import numpy as np

    return isinstance(value, np.generic)


def encode(
    message: Mapping[Any, Any],
    *,
    sender: str = "",
    round: int = 0,
    attempt: int = 1,
    kind: str = "",
    metadata: Mapping[str, Any] | None = None,
    digest: bool = False,
) -> Frames:
    """A message as frames. The tensors' memory is referred to, not copied: leave it unchanged until the frames are sent.

    :param message: keys are strings, or enum members (see :class:`Message`); values anything that msgpack can say, with
        tensors of numpy and PyTorch anywhere inside. Those under ``weights`` keep their names in the safetensors header.
    :param sender: this worker's end.
    :param round: the round it belongs to.
    :param attempt: this worker's attempt.
    :param kind: what sort of message it is.
    :param metadata: small values beside the message.
    :param digest: add a BLAKE2b digest of the tensors, which :func:`decode` checks. It reads all bytes once.
    :raises flame.errors.CodecError: something in the message cannot be sent; the text names it.
    """
    packer = _Packer()
    try:
        data = packer.pack(message, ())
        order, section, buffers, size = _lay_out(packer.found)
        envelope = _Envelope(
            sender,
            round,
            attempt,
            kind,
            dict(metadata or {}),
            len(packer.found),
            order,
            b"\0" * _DIGEST if digest else None,
            msgspec.Raw(_pack(data)),
        )
        packed = _pack(envelope)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise CodecError(f"The message cannot be sent: {error}.") from error
    start = _align(_PREFIX.size + len(packed), 8)
    # Spaces after the JSON text bring the buffers to a multiple of 64 bytes.
    section += b" " * (-(start + 8 + len(section)) % 64 if buffers else -len(section) % 8)
    section = _LENGTH.pack(len(section)) + section
    if digest:
        envelope.digest = _digest(section, buffers)
        packed = _pack(envelope)
    head = _PREFIX.pack(MAGIC, VERSION, 0, len(packed), start + len(section), start + len(section) + size)
    gap = b"\0" * (start - _PREFIX.size - len(packed))
    return Frames(head=b"".join((head, packed, gap, section)), buffers=buffers, nbytes=start + len(section) + size)


def _lay_out(found: list[_Tensor]) -> tuple[list[int] | None, bytes, list[memoryview], int]:
    """The order on the wire, the JSON header, the buffers and their size in all.

    Wide types come first, so that each tensor lies at a multiple of its element's size.
    """
    if not found:
        return None, b"{}", [], 0
    widths = [tensors.SIZES[tensor.code] for tensor in found]
    order = None
    if any(a < b for a, b in itertools.pairwise(widths)):
        order = sorted(range(len(found)), key=lambda i: -widths[i])
        found = [found[i] for i in order]
    header: dict[str, Any] = {}
    buffers = []
    offset = 0
    for name, code, shape, array in found:
        end = offset + array.nbytes
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (offset, end)}
        if end != offset:
            buffers.append(array.data.cast("B"))
        offset = end
    return order, _json(header), buffers, offset


def decode(buffer: Any, *, limit: int = LIMIT, release: Callable[[], None] | None = None) -> Message:
    """A message from its bytes. The tensors are views of ``buffer``.

    :param buffer: the whole message, bytes-like; must stay unchanged until ``release``.
    :param limit: the largest message to accept, in bytes.
    :param release: called once when nothing of the message uses ``buffer`` any more, from whichever thread
        drops the last view; also when decoding fails.
    :raises flame.errors.CodecError: the bytes are no message, of another version, too long, or do not agree with themselves.
    """
    view = memoryview(buffer).cast("B")
    if release is None:
        return _decode(view, None, limit)
    import numpy as np

    # Every array made of the message has this one as its base, so its end is the end of all of them.
    root = np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
    weakref.finalize(root, release).atexit = False
    return _decode(view, root, limit)


def _decode(view: memoryview, root: npt.NDArray[Any] | None, limit: int) -> Message:
    envelope, start, base = _open(view, limit)
    header = _check_header(view, start, base, envelope.count)
    if envelope.digest is not None and envelope.digest != _digest(view[start:base], [view[base:]]):
        raise CodecError("The message was damaged on its way: the digest of its tensors does not agree.")
    names: list[str] = []
    arrays: list[Any] = []
    if header:
        import numpy as np

        if root is None:
            root = np.frombuffer(view, np.uint8)
        names, arrays = _views(header, root, base)
    if envelope.order is not None:
        if sorted(envelope.order) != list(range(len(arrays))):
            raise CodecError("The message is damaged: its tensors' order is not one.")
        places = sorted(range(len(arrays)), key=envelope.order.__getitem__)
        names, arrays = [names[i] for i in places], [arrays[i] for i in places]

    def resolve(code: int, data: memoryview) -> Any:
        if code == _MAPPING:
            first, count, strip = _RUN.unpack(data)
            last = first + count
            if last > len(arrays):
                raise IndexError("a mapping of tensors that are not there")
            return dict(zip((name[strip:] for name in names[first:last]), arrays[first:last], strict=True))
        (index,) = _ONE.unpack(data)
        if code == _SCALAR:
            return arrays[index][()]
        if code != _TENSOR:
            raise ValueError(f"an unknown extension {code}")
        return arrays[index]

    try:
        data = msgspec.msgpack.decode(envelope.data, ext_hook=resolve)
    except (msgspec.MsgspecError, ValueError, IndexError, struct.error, RecursionError, TypeError) as error:
        raise CodecError(f"The message is damaged: {error}.") from error
    if not isinstance(data, dict):
        raise CodecError("The message is damaged: it is not a mapping.")
    return Message(
        data,
        sender=envelope.sender,
        round=envelope.round,
        attempt=envelope.attempt,
        kind=envelope.kind,
        metadata=envelope.metadata,
        nbytes=len(view),
    )


def _open(view: memoryview, limit: int) -> tuple[_Envelope, int, int]:
    """The envelope, where the safetensors part begins, where its buffers begin."""
    if len(view) < _PREFIX.size:
        raise CodecError(f"The message is cut short: {len(view)} bytes are no whole head.")
    magic, version, flags, length, head, total = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise CodecError("This is no message of Flame: it does not begin as one.")
    if version != VERSION:
        raise CodecError(
            f"The message has version {version}, this worker reads version {VERSION}: run the same release."
        )
    if total > limit:
        raise CodecError(f"The message is too long: {total} bytes, at most {limit} are accepted.")
    if total != len(view):
        raise CodecError(f"The message is cut short or too long: {len(view)} bytes are there, it says {total}.")
    start = _align(_PREFIX.size + length, 8)
    if flags or head > total or start + 8 > head or any(view[_PREFIX.size + length : start]):
        raise CodecError("The message is damaged: its lengths do not agree.")
    packed = view[_PREFIX.size : _PREFIX.size + length]
    check_counts(packed, DEPTH + 2)
    try:
        envelope = _read_envelope(packed)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"The message is damaged: {error}.") from error
    (size,) = _LENGTH.unpack_from(view, start)
    if start + 8 + size != head:
        raise CodecError("The message is damaged: its lengths do not agree.")
    return envelope, start, head


def _check_header(view: memoryview, start: int, base: int, count: int) -> dict[str, _Entry]:
    """The safetensors header, checked: the tensors follow each other without a hole and end where the message ends."""
    try:
        header = _read_header(view[start + 8 : base]) if view[start:base] != _NO_TENSORS else {}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"The message is damaged: {error}.") from error
    header.pop(_METADATA, None)
    # A name that stands twice in the JSON text is one here, which the count betrays.
    if len(header) != count:
        raise CodecError(f"The message is damaged: {count} tensors are said to be there, {len(header)} are described.")
    position = 0
    for name, entry in header.items():
        begin, end = entry.data_offsets
        width = tensors.SIZES.get(entry.dtype)
        if width is None:
            raise CodecError(f"The tensor {name!r} has the type {entry.dtype!r}, which is not known here.")
        if begin != position or min(entry.shape, default=0) < 0 or end - begin != math.prod(entry.shape) * width:
            raise CodecError(f"The message is damaged: the tensor {name!r} does not lie where it should.")
        position = end
    if position != len(view) - base:
        raise CodecError("The message is damaged: its tensors do not fill it.")
    return header


def _views(header: dict[str, _Entry], root: npt.NDArray[Any], base: int) -> tuple[list[str], list[Any]]:
    """Names and arrays, in the order on the wire."""
    import numpy as np

    locked = root.view()
    locked.setflags(write=False)
    make, dtype_of = np.ndarray, tensors.numpy_dtype
    arrays: list[Any] = []
    for name, entry in header.items():
        shape = tuple(entry.shape)
        offset = base + entry.data_offsets[0]
        try:
            if entry.dtype == "BF16":
                arrays.append(tensors.restore_bfloat16(root, offset, shape))
            else:
                arrays.append(make(shape, dtype_of(entry.dtype), locked, offset))
        except (ValueError, OverflowError, TypeError, RuntimeError) as error:
            raise CodecError(f"The tensor {name!r} cannot be made: {error}.") from error
    return list(header), arrays


_DIGEST = 32


def _digest(section: bytes | memoryview, buffers: list[memoryview]) -> bytes:
    import hashlib

    total = hashlib.blake2b(section, digest_size=_DIGEST)
    for buffer in buffers:
        total.update(buffer)
    return total.digest()


def _align(number: int, step: int) -> int:
    return -(-number // step) * step
