"""Which ends have work in hand, for selectors of asynchronous channels."""

from __future__ import annotations

from collections.abc import Mapping

from flame.sdk.selectors.base import NONE, RECEIVED, STATE, EndLike


class InFlight:
    """The ends that were given a model and have not answered.

    An end is free again when a message of it was received (the channel then sets its property ``state`` to ``recvd``),
    when :meth:`release` says so, or when it has left.
    """

    def __init__(self) -> None:
        self.ends: list[str] = []

    def refresh(self, ends: Mapping[str, EndLike]) -> None:
        """Forget those who have answered, or are not among ``ends`` any more."""
        waiting = []
        for end in self.ends:
            known = ends.get(end)
            if known is None:
                continue
            if known.get_property(STATE) == RECEIVED:
                known.set_property(STATE, NONE)
                continue
            waiting.append(end)
        self.ends = waiting

    def add(self, chosen: list[str], ends: Mapping[str, EndLike]) -> None:
        """These are given a model now."""
        for end in chosen:
            ends[end].set_property(STATE, NONE)  # what was received before is no answer to it
        self.ends.extend(chosen)

    def release(self, end: str) -> None:
        """``end`` has no work in hand any more."""
        if end in self.ends:
            self.ends.remove(end)
