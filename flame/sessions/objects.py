"""Values that are shared: kept once at the server and once on each host, however many tasks and executors use them.

An object is a value in one run of bytes, known by the SHA-256 of them: a head that says how the value is made up, and behind it the
memory of its arrays, each at a multiple of 64 bytes. So a host keeps it as a file, every process maps that file, and its arrays are views
of the mapped memory: one copy of it, whoever reads it, and nobody can write to it. What travels in a task's input is a
:class:`~flame.sessions.payload.Reference`.

The head is msgpack, ``[value, [[type, shape, offset], ...]]``, its length before it in four bytes, big-endian; in the value an array is an
extension with its number. Types are named as safetensors names them.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flame.errors import CodecError, FlameError, NotFound, ServerUnreachable, StoreError
from flame.sessions.payload import Reference, extend, refuse, restore

if TYPE_CHECKING:
    from flame.sessions.dialing import Address

_LENGTH = struct.Struct(">I")
_NUMBER = 3
_ALIGNMENT = 64
_PIECE = 1 << 20
#: Bytes that the objects of earlier sessions may take on a host.
CACHE_BYTES = 20 << 30
#: Seconds for which a server that is away is waited for.
PATIENCE = 60.0


def pack(value: Any) -> tuple[Reference, list[bytes | memoryview]]:
    """A value as an object: its reference, and its bytes in parts, of which the arrays' are their own memory.

    :raises flame.errors.UsageError: something in it cannot travel.
    """
    table: list[tuple[str, list[int], int]] = []
    parts: list[memoryview] = []
    offset = 0

    def hook(one: Any) -> Any:
        nonlocal offset
        array = _array(one)
        if array is None:
            return extend(one)
        code, shape, flat = array
        table.append((code, shape, offset))
        parts.append(flat)
        offset += -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT
        return msgspec.msgpack.Ext(_NUMBER, msgspec.msgpack.encode(len(table) - 1))

    try:
        tree = msgspec.msgpack.Encoder(enc_hook=hook).encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, CodecError) as error:
        raise refuse(value, error) from error
    head = msgspec.msgpack.encode((msgspec.Raw(tree), table))
    begin = -(-(len(head) + _LENGTH.size) // _ALIGNMENT) * _ALIGNMENT
    whole: list[bytes | memoryview] = [(_LENGTH.pack(len(head)) + head).ljust(begin, b"\0")]
    for part in parts:
        whole.append(part)
        if rest := -part.nbytes % _ALIGNMENT:
            whole.append(bytes(rest))
    digest = hashlib.sha256()
    for piece in whole:
        digest.update(piece)
    return Reference(digest.hexdigest()), whole


def unpack(data: memoryview) -> Any:
    """The value of an object. Its arrays are views of ``data``, which nobody can write to.

    :raises flame.errors.CodecError: the bytes are none.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        head = data[_LENGTH.size : _LENGTH.size + length]
        tree, table = msgspec.msgpack.decode(head, type=tuple[msgspec.Raw, list[tuple[str, list[int], int]]])
        begin = -(-(length + _LENGTH.size) // _ALIGNMENT) * _ALIGNMENT

        def hook(code: int, number: memoryview) -> Any:
            if code != _NUMBER:
                return restore(code, number)
            return _view(data, begin, *table[msgspec.msgpack.decode(number, type=int)])

        return msgspec.msgpack.Decoder(ext_hook=hook).decode(tree)
    except (msgspec.MsgspecError, struct.error, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CodecError(f"An object is damaged: {error}.") from error


def _array(value: Any) -> tuple[str, list[int], memoryview] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray):
        return None
    from flame.sdk.tensors import flatten

    code, shape, array = flatten(value, "an array")
    return code, list(shape), array.data.cast("B") if array.size else memoryview(b"")


def _view(data: memoryview, begin: int, code: str, shape: list[int], offset: int) -> Any:
    import numpy as np

    from flame.sdk.tensors import SIZES, numpy_dtype, restore_bfloat16

    if code not in SIZES or offset < 0 or any(side < 0 for side in shape):
        raise ValueError("an array is of no known form")
    root = np.frombuffer(data, np.uint8)[begin + offset :]
    if code == "BF16":
        array = restore_bfloat16(root, 0, tuple(shape))
    else:
        array = np.ndarray(tuple(shape), numpy_dtype(code), root)
    array.setflags(write=False)
    return array


class HostObjects:
    """The objects of this host, as files that every process maps.

    :param given: a folder that has them already, where the server is on this host and keeps them as files.
    :param cache: where others are put; shared by all executors of this user.
    :param fetch: brings an object from the server, in pieces.
    """

    def __init__(self, given: Path | None, cache: Path, fetch: Callable[[str], Iterator[bytes]]) -> None:
        self._given = given
        self._cache = cache
        self._fetch = fetch
        self._mapped: dict[str, memoryview] = {}

    def get(self, reference: Reference) -> Any:
        """The value of an object.

        :raises flame.errors.FlameError: it cannot be had.
        """
        return unpack(self.map(reference.digest))

    def map(self, digest: str) -> memoryview:
        """An object's bytes: the file's memory, shared with every process that maps it."""
        data = self._mapped.get(digest)
        if data is None:
            data = self._mapped[digest] = _map(self._find(digest) or self._bring(digest))
        return data

    def _find(self, digest: str) -> Path | None:
        for folder in (self._given, self._cache):
            if folder is not None and (path := folder / digest[:2] / digest).is_file():
                return path
        return None

    def _bring(self, digest: str) -> Path:
        """Put an object into the cache; whoever else wants it meanwhile waits."""
        import fcntl

        path = self._cache / digest[:2] / digest
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._cache / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file():
                return path
            partial = self._cache / "coming"  # one at a time: what a killed process has left of another is overwritten
            try:
                self._fill(partial, digest)
                self._clean(partial.stat().st_size)
                partial.replace(path)
            except OSError as error:
                raise StoreError(
                    f"The object {digest[:12]} cannot be kept in {self._cache}: {error.strerror}."
                ) from error
            finally:
                partial.unlink(missing_ok=True)
        return path

    def _fill(self, path: Path, digest: str) -> None:
        """Fetch an object into a file; a server that is away is waited for."""
        begin, pause = time.monotonic(), 0.1
        while True:
            seen = hashlib.sha256()
            try:
                with path.open("wb") as file:
                    for piece in self._fetch(digest):
                        seen.update(piece)
                        file.write(piece)
                break
            except ServerUnreachable:
                if time.monotonic() - begin > PATIENCE:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        if seen.hexdigest() != digest:
            raise CodecError(f"The object {digest[:12]} has come with other bytes than it was given.")

    def _clean(self, coming: int) -> None:
        """Let the oldest go where there is too much; who has mapped one keeps it."""
        files = sorted(
            (entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self._cache.glob(f"??/{'?' * 64}")
        )
        total = coming + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= CACHE_BYTES:
                return
            path.unlink(missing_ok=True)
            total -= size


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")


def cache_folder() -> Path:
    """Where objects of other hosts are put: FLAME_OBJECTS_CACHE, else the user's cache."""
    if given := os.environ.get("FLAME_OBJECTS_CACHE"):
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    with contextlib.suppress(OSError):
        (folder := home / "flame" / "objects").mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir()) / f"flame-objects-{os.getuid()}"


class Remote:
    """The server's objects, for an executor: blocking, with the standard library alone, since an executor starts light.

    :param server: its address.
    :param path: where objects are: ``/v1/executors/ID/objects``.
    :param key: what proves who asks.
    """

    def __init__(self, server: str, path: str, key: str) -> None:
        from flame.sessions import dialing

        self._server, self._key = server, key
        self._address: Address = dialing.parse(server)
        self._path = f"{self._address.prefix}{path}"

    def read(self, digest: str) -> Iterator[bytes]:
        """An object's bytes, in pieces.

        :raises flame.errors.ServerUnreachable: the server has not given them.
        """
        with self._asked("GET", digest) as answer:
            while piece := answer.read(_PIECE):
                yield piece

    def write(self, digest: str, parts: Iterable[bytes | memoryview]) -> None:
        """Hand an object in.

        :raises flame.errors.ServerUnreachable: the server has not taken it.
        """
        parts = list(parts)
        with self._asked("PUT", digest, parts):
            pass

    @contextlib.contextmanager
    def _asked(self, method: str, digest: str, parts: list[bytes | memoryview] | None = None) -> Iterator[Any]:
        import http.client

        from flame.sessions import dialing

        host, port, tls, _ = self._address
        line = (
            http.client.HTTPSConnection(host, port, timeout=60, context=dialing.tls_context())
            if tls
            else http.client.HTTPConnection(host, port, timeout=60)
        )
        headers = {"Authorization": f"Bearer {self._key}"}
        if parts is not None:
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Length"] = str(sum(memoryview(part).nbytes for part in parts))
        try:
            line.request(
                method,
                f"{self._path}/{digest}?attempt=1",
                body=iter(parts) if parts is not None else None,
                headers=headers,
            )
            answer = line.getresponse()
            if answer.status >= 300:
                raise _refusal(digest, answer.status, answer.read(1 << 16))
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"The object {digest[:12]} cannot be had from {self._server}: {error}.") from error
        finally:
            line.close()


def _refusal(digest: str, status: int, body: bytes) -> FlameError:
    try:
        return NotFound(str(msgspec.json.decode(body)["error"]["message"]))
    except (msgspec.MsgspecError, LookupError, TypeError):
        return NotFound(f"The server refused the object {digest[:12]} with status {status}.")
