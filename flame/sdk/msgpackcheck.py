"""A look at msgpack from a stranger before a decoder believes it.

msgspec makes a list of the claimed length before it reads the first item, so that five bytes could claim 32 GB. This
walks over the bytes and only counts.
"""

from __future__ import annotations

from flame.errors import CodecError

# By msgpack's type byte from 0xC0 on: bytes of fixed length, bytes of the length field, items per count
# (https://github.com/msgpack/msgpack/blob/master/spec.md).
_FORMS = (
    *((0, 0, 0),) * 4,
    (0, 1, 0), (0, 2, 0), (0, 4, 0),
    (1, 1, 0), (1, 2, 0), (1, 4, 0),
    (4, 0, 0), (8, 0, 0),
    (1, 0, 0), (2, 0, 0), (4, 0, 0), (8, 0, 0),
    (1, 0, 0), (2, 0, 0), (4, 0, 0), (8, 0, 0),
    (2, 0, 0), (3, 0, 0), (5, 0, 0), (9, 0, 0), (17, 0, 0),
    (0, 1, 0), (0, 2, 0), (0, 4, 0),
    (0, 2, 1), (0, 4, 1),
    (0, 2, 2), (0, 4, 2),
)  # fmt: skip


def check_counts(packed: memoryview, depth: int) -> None:
    """Refuse msgpack that claims more than it has, is nested too deep, or is cut short.

    :param packed: one value.
    :param depth: how deep it may be.
    :raises flame.errors.CodecError: it is not as it should be.
    """
    data = packed.tobytes()
    left = [1]  # Items still to come, by level.
    at, size = 0, len(data)
    try:
        while left:
            if left[-1] == 0:
                left.pop()
                continue
            left[-1] -= 1
            kind = data[at]
            at += 1
            children = 0
            if kind < 0x80 or kind >= 0xE0:
                pass
            elif kind < 0x90:
                children = 2 * (kind & 15)
            elif kind < 0xA0:
                children = kind & 15
            elif kind < 0xC0:
                at += kind & 31
            else:
                fixed, width, factor = _FORMS[kind - 0xC0]
                if width:
                    number = int.from_bytes(data[at : at + width], "big")
                    at += width
                    if factor:
                        children = number * factor
                    else:
                        at += number
                at += fixed
            if children:
                if children > size - at or len(left) > depth:
                    raise CodecError("The message is damaged: it claims more items, or deeper ones, than it has.")
                left.append(children)
    except IndexError:
        at = size + 1
    if at != size:
        raise CodecError("The message is damaged: its envelope is cut short.")
