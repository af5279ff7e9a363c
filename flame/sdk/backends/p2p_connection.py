"""One connection between two workers, for one channel and group, after the handshake.

It carries records (:mod:`.p2p_records`). Reading happens in the loop's thread, straight into the buffer in which the
message will be used. Writing happens in the thread that sends (:mod:`.p2p_send`), so that a message costs no hand-over. A
lock keeps messages whole. The loop's own short records never wait for that lock: whoever holds it sends them along.

A connection per channel costs little and makes back-pressure simple: what does not fit the channel's window stays in
the socket, and at last with the sender.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from flame.sdk.backends.base import Member
from flame.sdk.backends.p2p_loop import GONE, READ, WRITE, Loop
from flame.sdk.backends.p2p_memory import SMALL, STALL_SECONDS, Pool, Window
from flame.sdk.backends.p2p_records import ACCEPT, DATA, GOODBYE, MARK, RECORD, RELEASE, SEGMENT, control_record
from flame.sdk.backends.p2p_stream import Broken, Stream

if TYPE_CHECKING:
    from flame.sdk.backends.base import Sink
    from flame.sdk.backends.shm import Segment, Segments

log = logging.getLogger(__name__)

#: Most that is read of one connection before the others have their turn.
_SLICE = 8 << 20
#: Segments on their way to one peer that it has not taken in yet.
CREDIT = 2


class Connection:
    """See the module. Made in the loop's thread.

    :param loop: whose thread reads.
    :param stream: connected and past the handshake.
    :param member: who is at the other end.
    :param sink: where messages go.
    :param window: the channel's.
    :param pool: where memory for large messages comes from.
    :param scratch: the loop's buffer for small ones.
    :param limit: the longest message that is taken in.
    :param shared: this worker's segments, where the peer is on the same host; else None.
    :param on_end: called once, in the loop's thread, with the reason, when the connection is over.
    """

    def __init__(
        self,
        *,
        loop: Loop,
        stream: Stream,
        member: Member,
        sink: Sink,
        window: Window,
        pool: Pool,
        scratch: memoryview,
        limit: int,
        shared: Segments | None,
        on_end: Callable[[Connection, str], None],
    ) -> None:
        self.end = member.end
        self.member = member
        self.stream = stream
        self.lock = threading.Lock()
        self.broken: str | None = None
        self.progress = time.monotonic()
        self.shared = shared
        self.segments: dict[int, Segment] = {}  # those that the peer uses
        self.credit = CREDIT
        self.credited = threading.Condition()
        self._loop = loop
        self._sink = sink
        self._window = window
        self._pool = pool
        self._scratch = scratch
        self._limit = limit
        self._on_end = on_end
        self._control: deque[bytes] = deque()
        self._rest = b""  # of a control record that the kernel did not take whole
        self._leftover = b""  # read, but not a whole record yet
        self._target: memoryview | None = None  # of the large message that is being read
        self._memory: mmap.mmap | None = None
        self._at = 0
        self._asked = -1  # the size that the window was asked for, until it is used
        self._parked: tuple[int, int] | None = None  # a segment that waits for the window; short records may pass it
        self._held = False  # nothing more is read before the window opens
        self._departing = False
        self._watching = READ
        loop.register(stream.sock, READ, self._on_events)
        if stream.pending:
            loop.call(self._read)

    # Reading; all in the loop's thread.

    def _on_events(self, events: int) -> None:
        if events & WRITE:
            self._flush_control()
        if self._held:
            if events & GONE:
                self._hold(gone=True)
        elif events & ~WRITE:
            self._read()

    def _read(self) -> None:
        budget = _SLICE
        try:
            if self._departing:
                self._drop()
                return
            while budget > 0 and not self._held and self.broken is None:
                if self._target is not None:
                    wanted = len(self._target) - self._at
                    count = self.stream.receive(self._target[self._at :])
                    self._at += count
                    self.progress = time.monotonic()
                    if count == wanted:
                        self._complete()
                    else:
                        self.stream.expect(wanted - count)
                        if not self.stream.pending:
                            return
                else:
                    known = len(self._leftover)
                    self._scratch[:known] = self._leftover
                    count = self.stream.receive(self._scratch[known:])
                    if not count:
                        return
                    self._leftover = b""
                    self._take_records(self._scratch[: known + count])
                    if count < len(self._scratch) - known and not self.stream.pending and self._target is None:
                        return
                budget -= count
        except Broken as error:
            if self._parked is None:
                self.end_with(str(error))
            else:  # what it sent before still counts; the end is met again after that
                self._hold(gone=True)
            return
        if self.stream.pending:
            self._loop.call(self._read)

    def _take_records(self, view: memoryview) -> None:
        """Take in all whole records; keep the rest for later."""
        at = 0
        while len(view) - at >= RECORD.size:
            kind, _, magic, number, length = RECORD.unpack_from(view, at)
            if magic != MARK:
                raise Broken("sent something that is no record")
            taken: int | None = 0
            if self._parked is not None and kind not in (ACCEPT, RELEASE):
                self._hold()
                break
            if kind == DATA:
                taken = self._take_data(view[at:], length)
            elif kind == SEGMENT:
                self._take_segment(number, length)
            else:
                self._take_control(kind, number)
            if taken is None:
                break
            at += RECORD.size + taken
            if self._target is not None or self.broken is not None:
                break
        self._leftover = bytes(view[at:]) if at < len(view) else b""

    def _take_data(self, view: memoryview, length: int) -> int | None:
        """A message: whole if it is small, else its beginning. Returns how much of it was in ``view``; None: come again."""
        if length > self._limit:
            raise Broken(f"sent a message of {length} bytes, at most {self._limit} are taken in")
        body = view[RECORD.size :]
        if length <= SMALL and len(body) < length:
            return None
        if not self._enter(length):
            self._hold()
            return None
        if length <= SMALL:
            data = bytes(body[:length])
            self._deliver(data, length, None)
            return length
        try:
            memory = self._pool.take(length)
        except (OSError, MemoryError, ValueError, OverflowError):
            raise Broken(f"sent a message of {length} bytes, for which there is no memory") from None
        self._memory = memory
        self._target = memoryview(memory)[:length]
        count = min(length, len(body))
        self._target[:count] = body[:count]
        self._at = count
        if count == length:
            self._complete()
        return count

    def _enter(self, length: int) -> bool:
        """Ask the window; when it is full, :meth:`proceed` is called later."""
        if self._asked == length:
            self._asked = -1
            return True
        if self._window.enter(self, length):
            return True
        self._asked = length
        self._loop.later(STALL_SECONDS, self._look_again)
        return False

    def _hold(self, *, gone: bool = False) -> None:
        """Read no more until the window opens. A socket at its end is not even watched: the loop would spin."""
        self._held = True
        if not gone:
            self._watch()
        elif self._watching != -1:
            self._loop.unregister(self.stream.sock)
            self._watching = -1

    def _look_again(self) -> None:
        """Timer: another one may have stalled in mid-message, and need not be waited for."""
        if self.held and self.broken is None:
            self._window.resume(self._loop.call)
            self._loop.later(STALL_SECONDS, self._look_again)

    def proceed(self) -> None:
        """The window has let the next message in."""
        if self.broken is not None or self._asked < 0:
            return
        self._held = False
        parked, self._parked = self._parked, None
        leftover, self._leftover = self._leftover, b""
        try:
            if parked is not None:
                self._take_segment(*parked)
            self._take_records(memoryview(leftover))
        except Broken as error:
            self.end_with(str(error))
            return
        self._watch()
        if not self._held:
            self._read()

    def _complete(self) -> None:
        """The large message is whole."""
        target, memory, self._target, self._memory = self._target, self._memory, None, None
        if target is None or memory is None:
            return
        length, pool = len(target), self._pool
        self._window.arrived(self)
        self.stream.expect(0)
        self._deliver(target, length, lambda: pool.give(memory))

    def _deliver(self, data: memoryview | bytes, length: int, give_back: Callable[[], object] | None) -> None:
        loop, window = self._loop, self._window

        def release() -> None:
            # From whichever thread, perhaps in the middle of a garbage collection: no locks here.
            if give_back is not None:
                give_back()
            window.returned.append(length)
            if window.waiting:
                loop.call(window.resume, loop.call)

        self._sink.on_frames(self.end, data, release)

    def _take_segment(self, number: int, length: int) -> None:
        """A message that lies in a segment of the peer."""
        if self.shared is None or not self.stream.fds:
            raise Broken("sent a shared segment that cannot be used here")
        if length > self._limit:
            raise Broken(f"sent a message of {length} bytes, at most {self._limit} are taken in")
        if not self._enter(length):
            self._parked = number, length
            return
        fd = self.stream.fds.pop(0)
        self.shared.unmap_idle()
        mappings = self.shared.mappings
        try:
            view = mappings.open(self, number, fd, length)
        except (OSError, ValueError) as error:
            raise Broken(f"sent a shared segment that cannot be used: {error}") from None
        finally:
            os.close(fd)
        self._window.arrived(self)
        self.say(ACCEPT, number)

        def done() -> None:
            mappings.done(self, number)
            self._loop.call(self.say, RELEASE, number)

        self._deliver(view, length, done)

    def _take_control(self, kind: int, number: int) -> None:
        if kind == GOODBYE:
            raise Broken("left the channel")
        if kind == ACCEPT:
            with self.credited:
                self.credit += 1
                self.credited.notify_all()
        elif kind == RELEASE:
            segment = self.segments.pop(number, None)
            if segment is not None and self.shared is not None:
                self.shared.done(segment, self)
        else:
            raise Broken(f"sent a record of unknown kind {kind}")

    def _watch(self) -> None:
        """Wait for what is of interest now."""
        if self.broken is not None:
            return
        events = (0 if self._held else READ) | (WRITE if self._rest else 0)
        if self._watching == -1:
            self._loop.register(self.stream.sock, events, self._on_events)
        elif events != self._watching:
            self._loop.modify(self.stream.sock, events)
        self._watching = events

    # Writing.

    def say(self, kind: int, number: int = 0) -> None:
        """Send a short record, without waiting; in the loop's thread."""
        if self.broken is not None:
            return
        self._control.append(control_record(kind, number))
        self._flush_control()

    def _flush_control(self) -> None:
        # Who holds the lock looks here again after letting it go.
        while (self._control or self._rest) and self.lock.acquire(blocking=False):
            try:
                unsent = self.take_unsent()
                if unsent:
                    self._rest = unsent[self.stream.send([unsent]) :]
            except Broken as error:
                self._loop.call(self.end_with, str(error))
                return
            finally:
                self.lock.release()
            if self._rest:
                break
        if self._departing and not self._rest and not self._control:
            self.stream.finish()
        self._watch()

    def take_unsent(self) -> bytes:
        """The short records that are to be sent before anything else; for who holds the lock."""
        unsent, self._rest = self._rest, b""
        return unsent + b"".join(self._control.popleft() for _ in range(len(self._control)))

    def put_back(self, unsent: bytes) -> None:
        """Nothing of :meth:`take_unsent` could be sent; for who holds the lock."""
        self._rest = unsent

    def unlock(self) -> None:
        """Let go of :attr:`lock` after sending."""
        self.lock.release()
        if self.broken is not None:
            self._loop.call(self._close)
        elif self._control or self._rest:
            self._loop.call(self._flush_control)

    def fail(self, reason: str) -> None:
        """The stream cannot be used any more; from any thread."""
        self._loop.call(self.end_with, reason)

    def end_with(self, reason: str) -> None:
        """Close the connection; in the loop's thread."""
        if self.broken is not None:
            return
        self.broken = reason
        if self._watching != -1:
            self._loop.unregister(self.stream.sock)
        self._give_up_reading()
        with self.credited:
            self.credited.notify_all()
        self.forsake()
        if self.shared is not None:
            self.shared.mappings.drop_idle(self)
        self.stream.abort()
        self._close()
        self._on_end(self, reason)

    def _give_up_reading(self) -> None:
        self._window.leave(self, self._asked)
        self._asked, self._parked = -1, None
        if self._memory is not None:
            self._target = None
            self._pool.give(self._memory)
            self._memory = None
        self._window.resume(self._loop.call)

    def take_credit(self, seconds: float | None) -> bool:
        """Wait until the peer may be sent one more segment; False when that took too long, or the connection is over.

        Segments cost the peer nothing until it takes them in, so nothing else would hold back a quick sender.
        """
        with self.credited:
            if not self.credited.wait_for(lambda: self.credit > 0 or self.broken is not None, seconds):
                return False
            if self.broken is not None:
                return False
            self.credit -= 1
            return True

    def forsake(self) -> None:
        """The peer will never say that it is done with the segments that it has."""
        while self.shared is not None and self.segments:
            try:
                _, segment = self.segments.popitem()
            except KeyError:
                break
            self.shared.done(segment, self, lost=True)

    def depart(self) -> None:
        """Say good-bye after what was sent, then wait for the peer to close; what still comes is dropped. In the loop's thread."""
        if self.broken is not None or self._departing:
            return
        self._departing = True
        self._give_up_reading()
        self._held = False
        self._watch()
        self.say(GOODBYE)

    @property
    def held(self) -> bool:
        """Whether a message waits for room in the window."""
        return self._asked >= 0

    def _drop(self) -> None:
        while self.stream.receive(self._scratch):
            pass

    def _close(self) -> None:
        # A sender in another thread may be about to use the socket's number; it holds the lock, and calls this again.
        if self.lock.acquire(blocking=False):
            self.stream.close()
            self.lock.release()
