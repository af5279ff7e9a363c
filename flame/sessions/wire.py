"""What travels between client, server and executor: frames of messages for many tasks.

A frame is its length (four bytes, big-endian) and one msgpack array: the kind of message and its fields. Each side keeps one connection,
which begins as an HTTP request with ``Upgrade: flame``, so the server needs one port and one way to say who may come in.
Payloads are opaque bytes: whoever passes them on decodes nothing of them.

Client and server (``channel``: the client's own number of a session on this connection)::

    OPEN      channel form session client       a session is opened by its form, or (form is null) joined by its id
    OPENED    channel id window last [[first number, first id, count]]   it is open; what is known of that client's tasks
    REFUSED   channel type message digest       an error in place of OPENED or CLOSED, or about SUBMIT; ``digest``: send this CODE
    CODE      digest bytes                    a bundle that an OPEN needs
    SUBMIT    channel first-number [payload] options     tasks; numbers count up from 1 for each client of a session
    ACCEPTED  channel first-number first-id count        they are in the store
    ANSWERS   channel entry [[number, id, state, payload]]   ends of tasks, in the store; ``entry`` is acknowledged by
    ACK       channel entry
    CANCEL    channel request [number] force    CANCELLED channel request [number]: those that are, or will be, cancelled
    CLOSE     channel force                     CLOSED channel
    WATCH     channel                           COUNTS channel {counts}: now, and with each change
    LEAVE     channel                           the client takes no more interest; the session stays

Executor and server (``task``: ``[id, attempt, payload]``)::

    HELLO     session-or-null entered running [done] loaded    it is there; ``[id, attempt]`` of what it runs, and of what it has done
    WELCOME   entry arguments {path: bytes}     the application, to one that has not loaded it
    BIND      session common                    BOUND session | BIND_FAILED session type message trace
    TASKS     answered [task]                   ``answered``: how many frames of results the store has
    RESULTS   session [[id, attempt, ok, payload]] seconds    ``seconds``: what they took in all
    REVOKE    [id] or null for all              REVOKED session [id]: those that were not begun
    UNBIND                                      UNBOUND session
    RELEASE                                     the executor ends
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from flame.errors import CodecError

#: The largest frame, in bytes. What is larger goes by reference.
MAX_FRAME: Final = 256 << 20
#: What a client sends to have the connection.
UPGRADE: Final = "flame"

OPEN, OPENED, REFUSED, CODE, SUBMIT, ACCEPTED, ANSWERS, ACK = range(1, 9)
CANCEL, CANCELLED, CLOSE, CLOSED, WATCH, COUNTS, LEAVE = range(9, 16)
HELLO, WELCOME, BIND, BOUND, BIND_FAILED, TASKS, RESULTS = range(32, 39)
REVOKE, REVOKED, UNBIND, UNBOUND, RELEASE = range(39, 44)

#: How a task ended, on the wire and in the journal.
SUCCEED, FAILED, WAS_CANCELLED = 0, 1, 2

_LENGTH = struct.Struct(">I")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Any]).decode


#: The extension of msgpack that stands for an object in a payload.
REFERENCE: Final = 2


def reference(digest: str) -> bytes:
    """A payload that is an object, for who decodes no payloads.

    :param digest: of the object, in hex.
    """
    return _encode(msgspec.msgpack.Ext(REFERENCE, bytes.fromhex(digest)))


def frame(*message: Any) -> bytes:
    """A message as it is sent."""
    body = _encode(message)
    if len(body) > MAX_FRAME:
        raise CodecError(f"A message of {len(body):,} bytes is too large; {MAX_FRAME:,} are allowed in one.")
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Messages out of a stream of bytes that comes in pieces."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """The messages that are complete with these bytes.

        :raises flame.errors.CodecError: this is no stream of messages.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) - 4 < min(_LENGTH.unpack_from(self._rest)[0] if len(self._rest) >= 4 else 0, MAX_FRAME):
                return  # so that a large message is put together once
            data, self._rest = bytes(self._rest), bytearray()
        view = memoryview(data)
        position, end = 0, len(data)
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(view, position)
            if length > MAX_FRAME:
                raise CodecError(f"A message of {length:,} bytes was announced; {MAX_FRAME:,} are allowed in one.")
            if end - position - 4 < length:
                break
            position += 4
            yield decode(view[position : position + length])
            position += length
        if position < end:
            self._rest += view[position:]


def decode(body: bytes | memoryview) -> list[Any]:
    """A message from the bytes behind its length.

    :raises flame.errors.CodecError: they are none.
    """
    try:
        message = _decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"A message is damaged: {error}.") from error
    if not message or type(message[0]) is not int:
        raise CodecError("A message is damaged: it has no kind.")
    return message
