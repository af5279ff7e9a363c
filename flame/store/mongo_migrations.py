"""The versions of a MongoDB database: what each changes in the one before.

A step is never edited once it was released. It may be taken twice, by two servers that start at once or by one that was killed in its
middle, because a document server has no transaction over many documents: so each step must leave alone what it finds done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

#: Takes the database as the driver gives it.
Step = Callable[[Any], Awaitable[None]]

#: Version 1 is an empty database; each step makes the next one.
STEPS: Sequence[Step] = ()
