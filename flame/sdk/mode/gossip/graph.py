"""Who is whose neighbour, and how much a neighbour's model counts.

With the Metropolis-Hastings weights

    W_ij = 1 / (1 + max(d_i, d_j))  for neighbours i, j,      W_ii = 1 - sum_j W_ij

where d_i is the number of i's neighbours, W is symmetric and its rows sum to 1, so its columns do too. So the mean of all
models is the same before and after x' = W x, and on a connected graph repeated mixing brings every model to that mean.

Xiao, Boyd: Fast linear iterations for distributed averaging. Systems & Control Letters 53 (2004), section 4.
Boyd, Ghosh, Prabhakar, Shah: Randomized gossip algorithms. IEEE Transactions on Information Theory 52 (2006).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from flame.errors import SpecError

#: The graphs that have a name.
NAMES = ("ring", "complete", "random")

Graph = dict[str, list[str]]


def graph_of(chosen: Any, members: Sequence[str], number: int, seed: int) -> Graph:
    """The neighbours of each member, the same at all members.

    :param chosen: ``ring``: each has the two beside it; ``complete``: everyone; ``random``: the members stand in a ring in another
        order in each round; or a list of pairs of places, counted from 0 in the order of the members.
    :param members: in order.
    :param number: the round.
    :param seed: for ``random``.
    :raises flame.errors.SpecError: that is no graph.
    """
    size = len(members)
    places = list(range(size))
    if chosen == "complete":
        pairs = [(i, j) for i in places for j in range(i)]
    elif chosen in ("ring", "random"):
        if chosen == "random":
            random.Random(seed * 1_000_003 + number).shuffle(places)
        pairs = [(places[i], places[i - 1]) for i in range(size)]
    elif isinstance(chosen, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(place) is int and place >= 0 for place in pair)
        for pair in chosen
    ):
        # Where a member has failed there are fewer places than the user counted.
        pairs = [(i, j) for i, j in chosen if i < size and j < size]
    else:
        raise SpecError(
            f"{chosen!r} is no graph: give {', '.join(NAMES)}, or pairs of places such as [[0, 1], [1, 2]]",
            "hyperparameters.graph",
        )
    edges = {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    return {member: [members[j] for j in range(size) if frozenset((i, j)) in edges] for i, member in enumerate(members)}


def metropolis_weights(graph: Mapping[str, Sequence[str]], member: str) -> tuple[float, dict[str, float]]:
    """How much a member's own model counts in its mix, and how much each neighbour's."""
    degree = len(graph[member])
    others = {end: 1.0 / (1 + max(degree, len(graph[end]))) for end in graph[member]}
    return 1.0 - sum(others.values()), others
