"""How deep data may be nested.

What is read and written by walking it costs stack, of which there is little: data near the limit that one program takes break the next one,
which stands a little deeper. So far fewer levels are taken in than could be.
"""

from __future__ import annotations

import re
from itertools import accumulate

from flame.errors import UsageError

#: Lists and objects within each other.
MOST_LEVELS = 100

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = [1 if byte in b"[{" else -1 for byte in range(256)]


def check_nesting(text: bytes) -> None:
    """Refuse JSON that is nested too deep, before it is decoded. What is no JSON is not noticed here.

    :raises flame.errors.UsageError: it has more than :data:`MOST_LEVELS` levels.
    """
    if text.count(b"{") + text.count(b"[") <= MOST_LEVELS:
        return
    brackets = _STRINGS.sub(b"", text).translate(None, _OTHERS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MOST_LEVELS:
        raise UsageError(f"The data are nested deeper than the {MOST_LEVELS} levels that are allowed.")
