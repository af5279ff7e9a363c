"""Memory for large messages on their way in, and how much of it a channel may have.

Two costs would otherwise dominate: fresh memory (the kernel clears it page by page, which takes longer than the copy
itself), so buffers are used again; and many updates at once (an aggregator of 40 trainers would hold 40 models), so
each channel has a window, and what does not fit stays with its sender.
"""

from __future__ import annotations

import mmap
import sys
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

#: Messages up to this size (bytes) are read along with others and do not count against the window of large ones.
SMALL = 64 << 10
#: A large message that has not grown for so many seconds does not keep others waiting any longer.
STALL_SECONDS = 2.0
_HUGE = 4 << 20


def allocate(size: int) -> mmap.mmap:
    """Private memory, not touched yet: what is not written to costs nothing."""
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
    return memory


class Pool:
    """Buffers that are used again. :meth:`give` may be called from a finalizer in any thread.

    :param keep: how many bytes are kept for later; one buffer is kept whatever its size.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._free: deque[mmap.mmap] = deque()

    def take(self, size: int) -> mmap.mmap:
        """A buffer of at least ``size`` bytes; its content is anything."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if size <= len(memory) <= max(2 * size, _HUGE):
                return memory
            self._free.append(memory)
        self._shrink(size)
        return allocate(size)

    def give(self, memory: mmap.mmap) -> None:
        """Take a buffer back."""
        self._free.append(memory)

    def _shrink(self, wanted: int) -> None:
        """Make room: drop the oldest until no more than ``keep`` is held besides what is about to be taken."""
        while self._free and sum(len(memory) for memory in self._free) + wanted > self.keep:
            try:
                self._free.popleft()
            except IndexError:
                break


class Receiver(Protocol):
    """A connection that the window may hold back."""

    end: str
    progress: float

    def proceed(self) -> None:
        """The window has room now: go on reading."""


class Window:
    """How much of a channel's arrived messages is held, and who waits for room. Belongs to the loop's thread, but for :meth:`want`.

    :param limit: bytes; one message is let in whatever its size.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.small = 0
        self.returned: deque[int] = deque()  # sizes of messages that are not used any more; added to from any thread
        self.wanted: Collection[str] = ()
        self.waiting: deque[tuple[Receiver, int]] = deque()
        self.reading: dict[Receiver, int] = {}

    def want(self, ends: Collection[str]) -> bool:
        """Someone waits for one of ``ends``, and nothing of theirs is there. From any thread.

        :returns: whether :meth:`resume` is due.
        """
        # First the wish, then the look; enter() first joins the queue, then looks for the wish: one of both sees the other.
        self.wanted = ends
        return bool(ends) and bool(self.waiting)

    def enter(self, receiver: Receiver, size: int) -> bool:
        """Ask for room for a message that is about to be read; False when it must wait for :meth:`Receiver.proceed`."""
        if size <= SMALL:
            self._collect()
            if not self._small_fits(size):
                self.waiting.append((receiver, size))
                self._collect()  # once more: what was returned before we waited told nobody
                if not (self._small_fits(size) or self._called_for(receiver)):
                    return False
                self.waiting.remove((receiver, size))
            self.small += size
            return True
        self.waiting.append((receiver, size))
        self._collect()
        if (len(self.waiting) == 1 and self._fits(size)) or self._called_for(receiver):
            self.waiting.remove((receiver, size))
            self._let_in(receiver, size)
            return True
        return False

    def arrived(self, receiver: Receiver) -> None:
        """The message that was let in last for this receiver is complete."""
        self.reading.pop(receiver, None)

    def leave(self, receiver: Receiver, asked: int) -> None:
        """The connection is gone, and with it a message that it waits for room for, or has not read to its end.

        :param asked: the size that it has asked room for and not begun to read; negative if it has not.
        """
        waiting = len(self.waiting)
        self.waiting = deque(entry for entry in self.waiting if entry[0] is not receiver)
        size = self.reading.pop(receiver, 0)
        if not size and asked > 0 and len(self.waiting) == waiting:
            size = asked  # let in, but not told so yet
        if size:
            self.returned.append(size)

    def _collect(self) -> None:
        while self.returned:
            size = self.returned.popleft()
            if size <= SMALL:
                self.small -= size
            else:
                self.used -= size

    def resume(self, call: Callable[[Callable[[], object]], object]) -> None:
        """Let in who fits now, in the order in which they came.

        :param call: has :meth:`Receiver.proceed` called, once this is through.
        """
        self._collect()
        for entry in list(self.waiting):
            receiver, size = entry
            fits = self._small_fits(size) if size <= SMALL else self._fits(size)
            if (fits or self._called_for(receiver)) and entry in self.waiting:
                self.waiting.remove(entry)
                if size <= SMALL:
                    self.small += size
                else:
                    self._let_in(receiver, size)
                call(receiver.proceed)

    def _let_in(self, receiver: Receiver, size: int) -> None:
        receiver.progress = time.monotonic()
        self.reading[receiver] = size
        self.used += size

    def _small_fits(self, size: int) -> bool:
        return not self.small or self.small + size <= self.limit

    def _fits(self, size: int) -> bool:
        used = self.used
        if used and self.reading:
            late = time.monotonic() - STALL_SECONDS
            used -= sum(n for receiver, n in self.reading.items() if receiver.progress <= late)
        return used <= 0 or used + size <= self.limit

    def _called_for(self, receiver: Receiver) -> bool:
        """A consumer waits for this end with nothing at hand: holding it back could hold up everything for ever."""
        wanted = self.wanted
        return receiver.end in wanted and not any(
            other.end in wanted and time.monotonic() - other.progress < STALL_SECONDS for other in self.reading
        )
