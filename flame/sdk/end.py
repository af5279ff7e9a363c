"""An end: the far side of a channel, as selectors and roles see it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame.sdk.backends.base import Member
    from flame.sdk.inbox import Arrival

#: The property that says where a round stands with an end, and its values, as in Flame's library.
KEY_END_STATE = "state"
VAL_END_STATE_NONE = "none"
VAL_END_STATE_RECVD = "recvd"


class End:
    """A peer on a channel: its properties, and what has arrived from it.

    :ivar end_id: the peer's task id.
    :ivar member: how the peer presented itself (role, attempt).
    :ivar properties: what roles and selectors note about it, by key.
    """

    def __init__(self, end_id: str, member: Member | None = None) -> None:
        self.end_id = end_id
        self.member = member
        self.properties: dict[str, Any] = {}
        self.queue: deque[Arrival] = deque()

    def set_property(self, key: str, value: Any) -> None:
        """Note a value under a key."""
        self.properties[key] = value

    def get_property(self, key: str) -> Any:
        """The value under a key; None where there is none."""
        return self.properties.get(key)

    def reset_property(self, key: str) -> None:
        """Forget the value under a key."""
        self.properties.pop(key, None)

    def cleanup_properties(self) -> None:
        """Forget all values."""
        self.properties = {}

    def is_rxq_empty(self) -> bool:
        """True when nothing that has arrived waits to be received."""
        return not self.queue

    def __repr__(self) -> str:
        return f"End({self.end_id!r}, {len(self.queue)} waiting)"
