"""Spreading trainers over aggregators. Pure: the same question has the same answer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

#: An aggregator that needs less than this for an update is as good as any other, in seconds.
FAST = 0.01


def spread(
    trainers: Sequence[str], aggregators: Sequence[str], costs: Mapping[str, float] | None = None
) -> dict[str, list[str]]:
    """Give each trainer to the aggregator that would be done first.

    :param trainers: in the order in which they are given.
    :param aggregators: in the order in which equal ones are preferred.
    :param costs: what an update costs at each aggregator, relative to the others; 1 where nothing is said.
    :returns: each aggregator's trainers; empty lists included.
    """
    known = costs or {}
    given: dict[str, list[str]] = {aggregator: [] for aggregator in aggregators}
    queue = [(known.get(each, 1.0), place, each) for place, each in enumerate(aggregators)]
    heapq.heapify(queue)
    for trainer in trainers if queue else ():
        done, place, aggregator = queue[0]
        given[aggregator].append(trainer)
        heapq.heapreplace(queue, (done + known.get(aggregator, 1.0), place, aggregator))
    return given


def rebalance(
    before: Mapping[str, Sequence[str]], trainers: Sequence[str], aggregators: Sequence[str]
) -> dict[str, list[str]]:
    """Spread with as few changes as that takes: whoever can stay stays, and numbers differ by one at most.

    :param before: each aggregator's trainers so far; those that are gone may be among them.
    """
    here = set(trainers)
    given = {each: [trainer for trainer in before.get(each, ()) if trainer in here] for each in aggregators}
    if not given:
        return given
    placed = {trainer for each in given.values() for trainer in each}
    for trainer in trainers:
        if trainer not in placed:
            min(given.values(), key=len).append(trainer)
    while True:
        most, least = max(given.values(), key=len), min(given.values(), key=len)
        if len(most) - len(least) <= 1:
            return given
        least.append(most.pop())


def steps(seconds: Mapping[str, float]) -> dict[str, float]:
    """What was measured as costs, in powers of two, so that noise moves nobody.

    :param seconds: how long each aggregator needs for an update.
    """
    floor = {each: max(value, FAST) for each, value in seconds.items()}
    least = min(floor.values(), default=FAST)
    return {each: 2.0 ** round(math.log2(value / least)) for each, value in floor.items()}
