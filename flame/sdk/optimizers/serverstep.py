"""Algorithms that take the updates' mean as a direction and step along it with a state of their own.

With D = mean - x, the step is x' = x + f(D, state). It is made block by block while the block is in the
cache, so its temporaries are small and its cost is that of reading each state vector once.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Weights
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.optimizers.layout import Array, Flat, Layout, widen
from flame.sdk.optimizers.sums import WeightedSum, blocks


class ServerStep(FedAvg):
    """Base of optimizers with state of the model's size. Memory: that of FedAvg, and one model for each state vector."""

    apart = True
    #: The names of the state vectors, in the order in which :meth:`move` takes them.
    vectors: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.flats: dict[str, Flat] = {}
        self._loaded: Mapping[str, Array] | None = None

    @abc.abstractmethod
    def move(self, current: Array, mean: Array, *states: Array) -> None:
        """Make a block of the next model.

        :param current: the block of the global model (not to be changed), in the type of ``mean``.
        :param mean: the block of the updates' mean; becomes the next model's.
        :param states: the blocks of :attr:`vectors`; become their next values.
        """

    def initial(self, vector: str) -> float:
        """The value that a state vector begins with."""
        return 0.0

    def prepare(self, layout: Layout) -> None:
        """See :meth:`FedAvg.prepare`."""
        loaded, self._loaded = self._loaded, None
        for vector in self.vectors:
            if loaded is None:
                self.flats[vector] = layout.full(self.initial(vector))
            else:
                self.flats[vector] = layout.unnamed(f"{vector}.", loaded)

    def close(self, total: WeightedSum) -> Flat:
        """See :meth:`FedAvg.close`."""
        mean = total.divide()
        if self.layout is None:
            raise WorkerError("A round must begin before it can be finished.")
        for run in self.layout.runs(self.current, "the global model"):
            if run.group not in self.layout.trained:
                continue
            states = [self.flats[vector][run.group] for vector in self.vectors]
            for part in blocks(run.array.size, mean[run.group].itemsize):
                target = mean[run.group][run.start + part.start : run.start + part.stop]
                current = widen(run.array[part]).astype(target.dtype, copy=False)
                self.move(current, target, *(each[run.start + part.start : run.start + part.stop] for each in states))
        return mean

    def state(self) -> dict[str, Array]:
        """See :meth:`Optimizer.state`: ``VECTOR.TENSOR`` -> array, views that change with the next round."""
        if self.layout is None:
            return dict(self._loaded or {})
        saved: dict[str, Array] = {}
        for vector, flat in self.flats.items():
            saved |= self.layout.named(f"{vector}.", flat)
        return saved

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Optimizer.load_state`. The values are taken up when the next round begins."""
        self.layout = None
        self._loaded = state

    def named(self, vector: str) -> Weights:
        """A state vector by tensor, as views."""
        return {} if self.layout is None else self.layout.named("", self.flats[vector])
