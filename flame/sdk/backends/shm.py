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
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from flame.errors import BackendError
from flame.sdk.backends.base import Frames
from flame.sdk.tensors import SharedMap

if TYPE_CHECKING:
    from flame.sdk.backends.p2p_connection import Connection

#: Messages from this size (bytes) on go through a segment; smaller ones are quicker through the socket.
THRESHOLD = 512 << 10
#: Segments up to this size stay mapped at the writer, whatever arrives.
KEEP_MAPPED = 16 << 20
_PARALLEL = 4 << 20
_GRAIN = 2 << 20
#: How much of a segment is mapped at a time by a writer that must not have all of it resident.
_STEP = 8 << 20


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
        self.copying = True
        self.writing = True
        self.tainted = False
        self._mapped: mmap.mmap | None = None

    def map(self) -> mmap.mmap:
        """The memory, to write to, as it stays mapped."""
        if self._mapped is None:
            self._mapped = self.piece(0, self.size)
        return self._mapped

    def piece(self, begin: int, end: int) -> mmap.mmap:
        """A part of the memory, to write to; mapped until it is dropped. Both are multiples of the page size."""
        return mmap.mmap(self.fd, end - begin, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=begin)

    def unmap(self) -> None:
        """Let go of the mapping; :meth:`map` makes another."""
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
        self._all: set[Segment] = set()
        self._free: list[Segment] = []
        self._helpers: ThreadPoolExecutor | None = None
        self._closed = False
        self._receives = False
        #: The segments of others; here because what is sent and what is received make room for each other.
        self.mappings = Mappings()

    def write(self, frames: Frames) -> Segment:
        """Copy a message into a segment; call :meth:`sent` once it is on its way to its readers.

        :raises flame.errors.BackendError: there is no memory for it.
        """
        if frames.nbytes > KEEP_MAPPED:
            self.mappings.drop_idle()
        segment = self._take(frames.nbytes)
        try:
            self._copy(segment, [memoryview(frames.head), *frames.buffers])
        except (OSError, ValueError) as error:
            with self._lock:
                self._end(segment)
            raise BackendError(f"No shared memory for a message of {frames.nbytes} bytes: {error}.") from error
        with self._lock:
            segment.copying = False
        return segment

    def unmap_idle(self) -> None:
        """A large message comes in: what was sent before need not count as this process's memory meanwhile.

        Who receives such messages also does not map a segment whole to write to it, from now on.
        """
        with self._lock:
            self._receives = True
            for segment in self._all:
                if segment.size > KEEP_MAPPED and not segment.copying:
                    segment.unmap()

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
            while self._free:
                self._end(self._free.pop())
        if self._helpers is not None:
            self._helpers.shutdown()

    def _take(self, size: int) -> Segment:
        size = -(-size // _GRAIN) * _GRAIN
        with self._lock:
            for segment in self._free:
                if size <= segment.size <= 2 * size:
                    self._free.remove(segment)
                    segment.writing = segment.copying = True
                    return segment
        try:
            segment = Segment(next(self._numbers) & 0xFFFFFFFF, size)
        except OSError as error:
            raise BackendError(f"No shared memory for a message of {size} bytes: {error}.") from error
        with self._lock:
            self._all.add(segment)
        return segment

    def _retire(self, segment: Segment) -> None:
        """With the lock held: keep the segment for the next message if nobody has it, in place of an older one."""
        if segment.users or segment.writing:
            return
        if segment.tainted or self._closed:
            self._end(segment)
            return
        self._free.append(segment)
        while len(self._free) > 1:
            self._end(self._free.pop(0))

    def _end(self, segment: Segment) -> None:
        segment.close()
        self._all.discard(segment)

    def _copy(self, segment: Segment, buffers: Sequence[memoryview]) -> None:
        """Copy the buffers one behind the other, with a second core where there is one and it pays."""
        total = sum(len(buffer) for buffer in buffers)
        whole = segment.size <= KEEP_MAPPED or not self._receives
        step = segment.size if whole else _STEP
        workers = 1 if total < _PARALLEL else min(2, len(os.sched_getaffinity(0)))
        starts = range(0, total, step)
        for begin in starts:
            end = min(begin + step, segment.size)
            memory = segment.map() if whole else segment.piece(begin, end)
            self._copy_piece(memory, begin, min(end, total), buffers, workers)

    def _copy_piece(self, memory: mmap.mmap, begin: int, end: int, buffers: Sequence[memoryview], workers: int) -> None:
        """Bytes ``begin`` to ``end`` of the joined buffers to the start of ``memory``."""
        import numpy as np

        target = np.frombuffer(memory, np.uint8)
        middle = end if workers == 1 else begin + -(-(end - begin) // (2 * 4096)) * 4096
        parts: tuple[list[Any], list[Any]] = ([], [])
        at = 0
        for buffer in buffers:
            for part, low, high in ((0, begin, min(middle, end)), (1, min(middle, end), end)):
                first, last = max(at, low), min(at + len(buffer), high)
                if first < last:
                    source = np.frombuffer(buffer, np.uint8)[first - at : last - at]
                    parts[part].append((target[first - begin : last - begin], source))
            at += len(buffer)
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


class Mappings:
    """The segments of others that this process looks at.

    The last one that is done with stays mapped, for the next message in it: mapping costs a third of what copying would.
    That needs a mapping that cannot be written to. numpy keeps to that; PyTorch knows no read-only tensors, and a
    write would end the process, so where it is loaded each message gets a private mapping of its own.

    :meth:`done` is called from finalizers, so there is no lock here: each step is one operation on a dict.
    """

    def __init__(self) -> None:
        self._used: dict[tuple[object, int], mmap.mmap] = {}
        self._idle: dict[tuple[object, int], mmap.mmap] = {}

    def open(self, owner: object, number: int, fd: int, length: int) -> memoryview:
        """The first ``length`` bytes of a segment.

        :param owner: the connection that it came by.
        :param fd: its descriptor, which is not needed any more afterwards.
        :raises ValueError: the file is not sealed, or too short: reading it could end this process.
        """
        key = owner, number
        memory = self._idle.pop(key, None)
        if memory is None:
            self._idle.clear()
            memory = _map(fd, length)
        elif len(memory) < length:
            raise ValueError("it is too short")
        self._used[key] = memory
        return memoryview(memory)[:length]

    def done(self, owner: object, number: int) -> None:
        """Nobody looks at it any more."""
        memory = self._used.pop((owner, number), None)
        if memory is not None and "torch" not in sys.modules:
            self._idle.clear()
            self._idle[owner, number] = memory

    def drop_idle(self, owner: object = None) -> None:
        """Unmap what nobody looks at; with ``owner``, also forget what came by it."""
        if owner is None:
            self._idle.clear()
            return
        for mappings in (self._idle, self._used):
            for key in list(mappings):
                if key[0] is owner:
                    mappings.pop(key, None)


def _map(fd: int, length: int) -> mmap.mmap:
    import fcntl

    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError("it is not a memory file") from error
    size = os.fstat(fd).st_size
    if not seals & fcntl.F_SEAL_SHRINK or size < length or not length:
        raise ValueError("it is not sealed, or too short")
    if "torch" in sys.modules:
        return SharedMap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return SharedMap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
