"""How two workers that have just connected prove to each other that they belong to one job.

Written without sockets: each side is a generator that yields how many bytes it wants next, and what is to be
sent before that, so that the same few lines serve any transport and can be tested byte by byte.

==================  =====================================================================================
dialer -> listener  magic, version, length, :class:`Hello` in msgpack (who I am, whom I mean, my nonce)
listener -> dialer  32 bytes nonce, 32 bytes HMAC: "I know the key"
dialer -> listener  32 bytes HMAC: "so do I"
listener -> dialer  status, length, :class:`Welcome` in msgpack, or the reason for a refusal
==================  =====================================================================================

Both HMACs (SHA-256, keyed with the job's secret) cover everything that was said before, and which side speaks, so
that nothing can be played back or reflected (as in SASL's SCRAM, RFC 5802). Until a stranger has proven itself, it is
told nothing but a nonce, and costs at most :data:`HELLO_LIMIT` bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable, Generator

import msgspec

MAGIC = b"FLMP2P"
VERSION = 1
HELLO_LIMIT = 4096
#: The longest that a handshake may take, in seconds.
SECONDS = 10.0

_HEAD = struct.Struct("<6sHH")
_ANSWER = struct.Struct("<BH")
_NONCE = 32
_MAC = 32

#: Yields (bytes to send now, number of bytes wanted next) and is sent those bytes.
Steps = Generator[tuple[bytes, int], bytes, "Welcome | Hello"]


class Refused(Exception):
    """The other side is none that we talk with; the text says why, as a sentence's end."""


class SentAway(Refused):
    """The other side belongs to the job, and yet is not wanted here (now)."""


class Hello(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a dialer says first. ``to`` is the end that it means to reach."""

    job: str
    channel: str
    group: str
    end: str
    role: str
    attempt: int
    dials: bool
    to: str
    nonce: bytes
    order: str = ""


class Welcome(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a listener answers to a dialer that it believes."""

    end: str
    role: str
    attempt: int
    order: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_welcome = msgspec.msgpack.Decoder(Welcome).decode


def dial(key: bytes, hello: Hello) -> Steps:
    """The dialer's side; ends with the listener's :class:`Welcome`.

    :raises Refused: the other side does not know the key, or refuses.
    """
    hello.nonce = secrets.token_bytes(_NONCE)
    body = _encode(hello)
    said = _HEAD.pack(MAGIC, VERSION, len(body)) + body
    challenge = yield said, _NONCE + _MAC
    said += challenge[:_NONCE]
    if not hmac.compare_digest(challenge[_NONCE:], _mac(key, b"listener", said)):
        raise Refused("does not know the job's key")
    status, length = _ANSWER.unpack((yield _mac(key, b"dialer", said), _ANSWER.size))
    answer = (yield b"", length) if length else b""
    if status:
        raise Refused(answer[:200].decode(errors="replace") or "turned this worker away")
    try:
        return _decode_welcome(answer)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("answered with something else") from error


def listen(key: bytes, answer: Callable[[Hello], Welcome]) -> Steps:
    """The listener's side; ends with the dialer's :class:`Hello`. The last yield sends the answer and wants nothing.

    :param answer: what to say to a dialer that has proven itself; raises :class:`SentAway` if it is not wanted.
    :raises Refused: the other side is a stranger, or is sent away.
    """
    head = yield b"", _HEAD.size
    magic, version, length = _HEAD.unpack(head)
    if magic != MAGIC:
        raise Refused("is no worker of Flame")
    if version != VERSION:
        raise Refused(f"speaks version {version} of the protocol, this worker speaks {VERSION}")
    if not 0 < length <= HELLO_LIMIT:
        raise Refused("sent a greeting that is too long")
    body = yield b"", length
    try:
        hello = _decode_hello(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Refused("sent a greeting that is none") from error
    nonce = secrets.token_bytes(_NONCE)
    said = head + body + nonce
    proof = yield nonce + _mac(key, b"listener", said), _MAC
    if len(hello.nonce) != _NONCE or not hmac.compare_digest(proof, _mac(key, b"dialer", said)):
        raise Refused("does not know the job's key")
    try:
        packed, status = _encode(answer(hello)), 0
    except SentAway as error:
        packed, status = str(error).encode()[:200], 1
        yield _ANSWER.pack(status, len(packed)) + packed, 0
        raise
    yield _ANSWER.pack(status, len(packed)) + packed, 0
    return hello


def _mac(key: bytes, side: bytes, said: bytes) -> bytes:
    return hmac.digest(key, side + b"\0" + said, hashlib.sha256)
