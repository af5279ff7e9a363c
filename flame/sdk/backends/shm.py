"""Large messages between processes of one host: written once into shared memory, mapped by each receiver.

A segment is a memory file (``memfd_create``): it has no name, so nothing can be left behind in ``/dev/shm`` when a process is
killed; the kernel frees it with the last descriptor and mapping. Its descriptor travels over the unix socket that
connects the two workers. The file is sealed against shrinking, which a receiver checks before it maps it: nobody can
make it read behind the end (SIGBUS).

Fresh pages cost several times what the copy does, so a segment is used again when all its readers have said that
they are done. One whose reader was lost is not: the reader may still be looking at it.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from flame.errors import BackendError
from flame.sdk.backends.base import Frames

if TYPE_CHECKING:
    from flame.sdk.backends.p2p_connection import Connection

#: Messages from this size (bytes) on go through a segment; smaller ones are quicker through the socket.
THRESHOLD = 512 << 10
#: Segments up to this size stay mapped at the writer between messages.
KEEP_MAPPED = 16 << 20
_PARALLEL = 4 << 20
_GRAIN = 2 << 20


def available() -> bool:
    """Whether this system has sealed memory files."""
    return hasattr(os, "memfd_create") and hasattr(mmap, "MAP_POPULATE")


class Segment:
    """One memory file of a writer.

    :ivar number: names it on the connections.
    :ivar fd: its descriptor; -1 once it is closed.
    :ivar size: its capacity in bytes.
    """

    def __init__(self, number: int, size: int) -> None:
        import fcntl

        self.number = number
        self.size = size
        self.fd = os.memfd_create("flame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError:
            self.close()
            raise
        self.users: set[Connection] = set()
        self.writing = True
        self.tainted = False
        self._mapped: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        """The memory, to write to."""
        if self._mapped is None:
            self._mapped = mmap.mmap(self.fd, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return self._mapped

    def written(self) -> None:
        """Writing is over: a large segment is unmapped, so that it does not count as this process's memory too."""
        if self.size > KEEP_MAPPED:
            self._mapped = None

    def close(self) -> None:
        """Let go of it; it lives on while readers have it."""
        self._mapped = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Segments:
    """The segments of one writer. All calls may come from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._free: list[Segment] = []
        self._helpers: ThreadPoolExecutor | None = None
        self._closed = False

    def write(self, frames: Frames) -> Segment:
        """Copy a message into a segment; call :meth:`sent` once it is on its way to its readers.

        :raises flame.errors.BackendError: there is no memory for it.
        """
        segment = self._take(frames.nbytes)
        try:
            self._copy(segment.map(), [memoryview(frames.head), *frames.buffers])
        except (OSError, ValueError) as error:
            segment.close()
            raise BackendError(f"No shared memory for a message of {frames.nbytes} bytes: {error}.") from error
        segment.written()
        return segment

    def use(self, segment: Segment, connection: Connection) -> None:
        """``connection`` is about to be told of the segment."""
        with self._lock:
            segment.users.add(connection)
            connection.segments[segment.number] = segment

    def sent(self, segment: Segment) -> None:
        """All readers have been told; from now on the last one that is done frees it."""
        with self._lock:
            segment.writing = False
            self._retire(segment)

    def done(self, segment: Segment, connection: Connection, *, lost: bool = False) -> None:
        """A reader does not use the segment any more, or (``lost``) nobody knows."""
        with self._lock:
            segment.users.discard(connection)
            segment.tainted |= lost
            self._retire(segment)

    def close(self) -> None:
        """Free what is not in use; the rest goes with its readers."""
        with self._lock:
            self._closed = True
            for segment in self._free:
                segment.close()
            self._free.clear()
        if self._helpers is not None:
            self._helpers.shutdown()

    def _take(self, size: int) -> Segment:
        size = -(-size // _GRAIN) * _GRAIN
        with self._lock:
            for segment in self._free:
                if size <= segment.size <= 2 * size:
                    self._free.remove(segment)
                    segment.writing = True
                    return segment
        try:
            return Segment(next(self._numbers) & 0xFFFFFFFF, size)
        except OSError as error:
            raise BackendError(f"No shared memory for a message of {size} bytes: {error}.") from error

    def _retire(self, segment: Segment) -> None:
        """With the lock held: keep the segment for the next message if nobody has it, in place of an older one."""
        if segment.users or segment.writing:
            return
        if segment.tainted or self._closed:
            segment.close()
            return
        self._free.append(segment)
        while len(self._free) > 1:
            self._free.pop(0).close()

    def _copy(self, memory: mmap.mmap, buffers: Sequence[memoryview]) -> None:
        """Copy the buffers one behind the other, with a second core where there is one and it pays."""
        import numpy as np

        target = np.frombuffer(memory, np.uint8)
        total = sum(len(buffer) for buffer in buffers)
        workers = min(2, len(os.sched_getaffinity(0)))
        half = total if workers == 1 or total < _PARALLEL else -(-total // (2 * 4096)) * 4096
        parts: tuple[list[Any], list[Any]] = ([], [])
        at = 0
        for buffer in buffers:
            source = np.frombuffer(buffer, np.uint8)
            cut = min(max(half - at, 0), len(source))
            if cut:
                parts[0].append((target[at : at + cut], source[:cut]))
            if cut < len(source):
                parts[1].append((target[at + cut : at + len(source)], source[cut:]))
            at += len(source)
        if parts[1]:
            if self._helpers is None:
                self._helpers = ThreadPoolExecutor(1, thread_name_prefix="flame-copy")
            other = self._helpers.submit(_copy_parts, parts[1])
            _copy_parts(parts[0])
            other.result()
        else:
            _copy_parts(parts[0])


def _copy_parts(parts: Sequence[tuple[Any, Any]]) -> None:
    for target, source in parts:
        target[:] = source  # numpy lets go of the interpreter's lock meanwhile


def open_segment(fd: int, length: int) -> memoryview:
    """A received segment's first ``length`` bytes. Writing to them changes this process's copy alone.

    :raises ValueError: the file is not sealed, or too short: reading it could end this process.
    """
    import fcntl

    wanted = fcntl.F_SEAL_SHRINK
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("it is not a memory file") from error
    if seals & wanted != wanted or os.fstat(fd).st_size < length:
        raise ValueError("it is not sealed, or too short")
    # Private, so that a write through a tensor library that knows no read-only memory neither faults nor reaches others.
    return memoryview(mmap.mmap(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
