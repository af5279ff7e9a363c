"""Bytes that are nearly right: what real traffic becomes when somebody meddles with it."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: Numbers at which lengths and counters go wrong.
_EDGES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]


def mutant(chance: random.Random, samples: Sequence[bytes]) -> bytes:
    """A sample with one to four things wrong with it."""
    data = bytearray(chance.choice(samples))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = chance.randbytes(chance.randint(1, 64))
        elif kind == 3:
            width = chance.choice([1, 2, 4, 8])
            edge = chance.choice(_EDGES) & ((1 << 8 * width) - 1)
            data[at : at + width] = edge.to_bytes(width, chance.choice(["little", "big"]))
        elif kind == 4:
            other = chance.choice(samples)
            cut = chance.randrange(len(other) + 1)
            data[at:] = other[cut:]
        elif kind == 5:
            data += data[at:]
        else:
            del data[at : at + chance.randint(1, 16)]
    return bytes(data)
