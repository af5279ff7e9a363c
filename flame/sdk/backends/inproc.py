"""Workers in one process: for tests and simulation.

A message is joined into one piece of bytes, once for all receivers, and handed to them in the sender's own thread.
Workers meet by job, channel and group; there is nothing else to agree on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

from flame.sdk.backends.base import Backend, BackendContext, Frames, Member, Sink

Room = tuple[str, str, str]  # job, channel, group

# One lock for all rooms: whoever joins or leaves is told to the others before anyone else joins or leaves.
_lock = threading.RLock()
_rooms: dict[Room, dict[str, tuple[Member, Sink]]] = {}


class InprocBackend(Backend):
    """Hands messages over within the process."""

    sort: ClassVar[str] = "inproc"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._joined: set[Room] = set()

    def join(self, channel: str, group: str, sink: Sink) -> None:
        """See the base class."""
        me = self.context.me
        with _lock:
            room = self._room(channel, group)
            self._joined.add(room)
            members = _rooms.setdefault(room, {})
            for member, other in list(members.values()):
                if member.end != me.end:
                    if other.wants(me):
                        other.on_join(me)
                    if sink.wants(member):
                        sink.on_join(member)
            members[me.end] = me, sink

    def leave(self, channel: str, group: str) -> None:
        """See the base class."""
        end = self.context.me.end
        with _lock:
            room = self._room(channel, group)
            self._joined.discard(room)
            members = _rooms.get(room, {})
            # A newer attempt of this task may have taken the place.
            if end in members and members[end][0] is self.context.me:
                del members[end]
                for _, sink in list(members.values()):
                    sink.on_leave(end, "left the channel")
            if not members:
                _rooms.pop(room, None)

    def send(
        self, channel: str, group: str, ends: Sequence[str], frames: Frames, timeout: float | None
    ) -> dict[str, str]:
        """See the base class. The time limit is not needed: nothing is waited for."""
        data = b"".join((frames.head, *frames.buffers))
        with _lock:
            members = _rooms.get(self._room(channel, group), {})
            found = {end: members[end][1] for end in ends if end in members}
        for sink in found.values():
            sink.on_frames(self.context.me.end, data)
        return {end: "is not there" for end in ends if end not in found}

    def close(self) -> None:
        """See the base class."""
        with _lock:
            for _, channel, group in list(self._joined):
                self.leave(channel, group)

    def _room(self, channel: str, group: str) -> Room:
        return self.context.job, channel, group
