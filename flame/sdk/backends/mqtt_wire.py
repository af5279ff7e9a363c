"""What workers say to each other through an MQTT broker: topics, messages, and the proof of where they come from.

Topics are laid out so that a broker's access list can be written in a line (names are percent-encoded, see :func:`quote`)::

    flame/JOB/presence/END                       retained: who END is and which channels it is on; also its last will
    flame/JOB/CHANNEL/GROUP/to/END               the inbox of END
    flame/JOB/CHANNEL/GROUP/from/END/SET         chunks that END publishes once for a set of receivers

A payload is ``tag (16) | length of head (2) | head | body``: the head is msgpack, the body a message or a chunk of one, as
it is. The tag is HMAC-SHA-256, cut to 128 bits (RFC 2104), over topic, head and body, with a key that is made of the
job's. Whoever may publish at the broker and does not hold the key can therefore not put in a single byte, nor
move a payload to another topic; a repeated one is recognised by its number.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote as _percent

import msgspec
from msgspec import Meta

from flame.sdk.backends.base import Member

Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

TAG_BYTES = 16
_LENGTH = struct.Struct(">H")
#: The beat of the last message of a connection: nothing of that connection comes after it.
LAST_BEAT = (1 << 63) - 1
#: What a payload and its MQTT packet hold beyond a chunk's bytes, at most (a long topic aside).
OVERHEAD = 1024


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One life of a worker. A later one compares greater, so that it can take the place of an earlier one.

    :ivar attempt: the start of the task.
    :ivar started: nanoseconds since 1970; tells apart two lives that a person started by hand, both attempt 1.
    :ivar nonce: random; stands for the epoch in messages.
    """

    attempt: int
    started: int
    nonce: Natural


class Presence(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Who a worker is, and where.

    :ivar connection: how many times it has connected; a will speaks for its connection and the earlier ones.
    :ivar beat: counts announcements.
    :ivar seats: the (channel, group) pairs that it is in.
    :ivar left: a sentence's end that says why it is gone; empty while it is there.
    """

    member: Member
    epoch: Epoch
    connection: Natural
    beat: Natural
    seats: list[tuple[str, str]]
    left: str = ""


class Small(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A whole message in the body.

    :ivar src: the sending end; ``epoch`` its nonce, ``to`` the nonce of the receiver that is meant.
    :ivar seq: counts the messages from this life to that one.
    :ivar base: the lowest number that the sender still means to deliver.
    """

    src: str
    epoch: Natural
    to: Natural
    seq: Natural
    base: Natural


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A message that comes in chunks; repeated, it asks how far the receiver is.

    :ivar transfer: names the message among all of the sender's.
    :ivar nbytes: its length; ``chunk`` the length of each chunk but the last.
    :ivar topic: the SET part of the topic on which chunks are published; empty for the inbox.
    :ivar cursor: chunks below this one have been published.
    """

    src: str
    epoch: Natural
    to: Natural
    seq: Natural
    base: Natural
    transfer: Natural
    nbytes: Natural
    chunk: Annotated[int, Meta(ge=1, le=1 << 30)]
    topic: str
    cursor: Natural


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A piece of a message in the body. It may be for several receivers, so it names none."""

    src: str
    epoch: Natural
    transfer: Natural
    index: Natural


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """All messages below ``next`` have been delivered, or given up by their sender."""

    src: str
    epoch: Natural
    to: Natural
    next: Natural


class Status(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """How far a receiver is with an offered message.

    :ivar topic: the SET topic that it listens to for this message.
    :ivar next: it has all chunks below this one.
    :ivar limit: chunks below this one may be published; 0: not yet; -1: the message is refused.
    :ivar missing: ranges of chunks that were lost and are wanted again.
    """

    src: str
    epoch: Natural
    to: Natural
    transfer: Natural
    topic: str
    next: Natural
    limit: int
    missing: list[tuple[Natural, Natural]] = []


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Asks whether a member is still there; answered by the same with ``answer`` set."""

    src: str
    epoch: Natural
    to: Natural
    answer: bool = False


Said = Presence | Small | Offer | Chunk | Ack | Status | Ping

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)


class Seal:
    """Signs payloads, and opens those that the job's key has signed.

    :param key: the job's secret.
    """

    def __init__(self, key: bytes) -> None:
        self._hmac = hmac.new(hmac.digest(key, b"flame mqtt 1", "sha256"), digestmod=hashlib.sha256)

    def seal(self, topic: str, said: Said, body: Sequence[memoryview | bytes] = ()) -> bytes:
        """The payload of a message. ``body`` is joined to it, the only copy that is made here."""
        head = _encoder.encode(said)
        head = _LENGTH.pack(len(head)) + head
        return b"".join((self._tag(topic, head, body), head, *body))

    def open(self, topic: str, payload: bytes) -> tuple[Said, memoryview] | None:
        """A payload's message and a view of its body; None when it is not one that the job's key has signed."""
        view = memoryview(payload)
        start = TAG_BYTES + _LENGTH.size
        if len(view) < start:
            return None
        end = start + _LENGTH.unpack_from(view, TAG_BYTES)[0]
        if len(view) < end or not hmac.compare_digest(view[:TAG_BYTES], self._tag(topic, b"", [view[TAG_BYTES:]])):
            return None
        try:
            return _decoder.decode(view[start:end]), view[end:]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None  # signed, but by another version of Flame

    def _tag(self, topic: str, head: bytes, body: Sequence[memoryview | bytes]) -> bytes:
        tag = self._hmac.copy()
        tag.update(topic.encode() + b"\0" + head)
        for piece in body:
            tag.update(piece)
        return tag.digest()[:TAG_BYTES]


def quote(name: str) -> str:
    """A name as one level of a topic: ``+ # / %`` and all that is not plain are percent-encoded, nothing gives ``%``."""
    return _percent(name, safe=" ") or "%"


class Topics:
    """The topics of one channel's group."""

    def __init__(self, job: str, channel: str, group: str) -> None:
        self._base = f"flame/{quote(job)}/{quote(channel)}/{quote(group)}"

    def inbox(self, end: str) -> str:
        """Where ``end`` reads what is for it alone."""
        return f"{self._base}/to/{quote(end)}"

    def shared(self, end: str, members: str) -> str:
        """Where ``end`` publishes for a set of receivers, named by :func:`set_name`."""
        return f"{self._base}/from/{quote(end)}/{members}"


def set_name(ends: Sequence[str]) -> str:
    """The name of a set of receivers: the same for the same ones, so that they subscribe once."""
    return hashlib.blake2b("\0".join(sorted(ends)).encode(), digest_size=8).hexdigest()


def presence_topic(job: str, end: str) -> str:
    """Where a member says that it is there. ``+`` as end gives the filter for all of the job."""
    return f"flame/{quote(job)}/presence/{end if end == '+' else quote(end)}"
