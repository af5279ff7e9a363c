"""What travels on a connection between two workers: records of 16 bytes, each with what follows it.

=======  ==============================================================================================
DATA     a message of ``length`` bytes follows
SEGMENT  a message of ``length`` bytes lies in the shared segment ``number``, whose descriptor comes along
ACCEPT   the segment has been taken in: another one may be sent
RELEASE  the segment ``number`` is not used any more
GOODBYE  nothing more will follow
=======  ==============================================================================================
"""

from __future__ import annotations

import struct

from flame.sdk.backends.base import Frames

RECORD = struct.Struct("<BBHIQ")
DATA, SEGMENT, ACCEPT, RELEASE, GOODBYE = range(1, 6)
#: In each record, to notice when two sides no longer agree where one begins.
MARK = 0x464C


def data_record(frames: Frames) -> list[bytes | memoryview]:
    """The buffers of a message that travels whole."""
    return [RECORD.pack(DATA, 0, MARK, 0, frames.nbytes) + frames.head, *frames.buffers]


def segment_record(number: int, length: int) -> list[bytes | memoryview]:
    """The buffers of a message that lies in a segment."""
    return [RECORD.pack(SEGMENT, 0, MARK, number, length)]


def control_record(kind: int, number: int) -> bytes:
    """A record that nothing follows."""
    return RECORD.pack(kind, 0, MARK, number, 0)
