"""Some, by chance.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data. AISTATS 2017, algorithm 1 (S_t).
"""

from __future__ import annotations

from collections.abc import Mapping

from flame.sdk.plugins import integer
from flame.sdk.selectors.base import EndLike, OncePerRound


class Random(OncePerRound):
    """Each round ``k`` ends, each set of them with the same chance.

    :param k: how many; all where there are fewer.
    :param seed: makes the choices repeatable, as long as the same ends are there.
    """

    sort = "random"

    def __init__(self, k: int, seed: int | None = None) -> None:
        super().__init__(seed)
        self.k = integer("k", k, low=1)

    def choose(self, ends: Mapping[str, EndLike], number: int) -> list[str]:
        """See :meth:`OncePerRound.choose`."""
        return self.random.sample(list(ends), min(self.k, len(ends)))
