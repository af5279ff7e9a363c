"""Who may start now. Pure: queue and room in, decisions out.

A job's workers are admitted together or not at all: half a topology only waits and takes room from others. The order is
by priority, then by who came first, and it is strict: nobody passes a job that does not fit yet, or a big one would
wait for ever behind a stream of small ones. A job bigger than all the room there is runs when nothing else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flame.errors import SpecError

PRIORITIES = {"high": 100, "medium": 50, "low": 0}


class Waiting(NamedTuple):
    """A job in the queue. ``order`` grows with the time at which it was started."""

    job: str
    priority: int
    order: float
    workers: int


class Decision(NamedTuple):
    """Which jobs start now, and for each other one the sentence that says what it waits for."""

    admitted: list[str]
    reasons: dict[str, str]


def priority(word: str) -> int:
    """A priority as a number: ``high``, ``medium``, ``low``, or an integer written out (100, 50 and 0 are those three).

    :raises flame.errors.SpecError: it is neither.
    """
    known = PRIORITIES.get(word)
    if known is not None:
        return known
    try:
        return int(word)
    except ValueError:
        raise SpecError(f"{word!r} is no priority; use high, medium, low or an integer.", "job: priority") from None


def admit(queue: Sequence[Waiting], used: int, slots: int | None) -> Decision:
    """Decide who starts.

    :param queue: the waiting jobs, in any order.
    :param used: how many workers there are, or have been promised room.
    :param slots: how many fit in all; None: there is no limit.
    """
    admitted: list[str] = []
    reasons: dict[str, str] = {}
    ordered = sorted(queue, key=lambda waiting: (-waiting.priority, waiting.order))
    for place, waiting in enumerate(ordered):
        fits = slots is None or used + waiting.workers <= slots or used == 0
        if fits and not reasons:
            admitted.append(waiting.job)
            used += waiting.workers
        else:
            assert slots is not None
            ahead = place - len(admitted)
            reasons[waiting.job] = _reason(waiting, max(0, slots - used), slots, ahead)
    return Decision(admitted, reasons)


def _reason(waiting: Waiting, free: int, slots: int, ahead: int) -> str:
    if ahead:
        return f"It waits for room: {ahead} {'job is' if ahead == 1 else 'jobs are'} ahead of it in the queue."
    needs = f"it needs {waiting.workers} worker{'s' if waiting.workers != 1 else ''}"
    if waiting.workers > slots:
        return f"It waits until nothing else runs: {needs}, more than the {slots} slots there are."
    return f"It waits for room: {needs}, and {free} of {slots} slots are free."
