"""Rules that need all updates of a round at once. They keep copies: memory grows with the number of trainers."""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np

from flame.errors import WorkerError
from flame.sdk.optimizers.base import Optimizer, Update, Weights
from flame.sdk.optimizers.layout import Array, Flat, Layout, widen
from flame.sdk.optimizers.sums import blocks, check_finite


class Kept(NamedTuple):
    """A copy of one update."""

    end: str
    flat: Flat


class KeepAll(Optimizer):
    """Base of the robust rules. All updates count the same, whatever number of samples they claim: it may be a lie."""

    streaming = False

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.current: Weights = {}
        self.kept: list[Kept] = []

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        if self.layout is None or not self.layout.fits(weights):
            self.layout = Layout(weights)
        self.current = weights
        self.kept = []

    def fold(self, update: Update) -> None:
        """See :meth:`Optimizer.fold`."""
        if self.layout is None:
            raise WorkerError(f"The update of {update.end} came outside of a round.")
        runs = self.layout.runs(update.weights, update.end)
        check_finite(runs, update.end)
        flat = self.layout.empty()
        for run in runs:
            np.copyto(flat[run.group][run.start : run.start + run.array.size], widen(run.array))
        self.kept.append(Kept(update.end, flat))

    def finish(self) -> Weights:
        """See :meth:`Optimizer.finish`. The result does not depend on the order in which updates came."""
        kept, self.kept = sorted(self.kept, key=lambda each: each.end), []
        if self.layout is None or not kept:
            return self.current
        self.current = {}
        return self.layout.weights(self.combine([each.flat for each in kept]))

    @abc.abstractmethod
    def combine(self, updates: list[Flat]) -> Flat:
        """The next model; may use the updates' vectors for it.

        :raises flame.errors.RoundFailed: there are too few updates for the rule.
        """


class CoordinateWise(KeepAll):
    """Base of rules that look at each coordinate on its own."""

    def combine(self, updates: list[Flat]) -> Flat:
        """See :meth:`KeepAll.combine`."""
        result = updates[0]
        for group, vector in result.items():
            for part in blocks(vector.size, vector.itemsize * len(updates)):
                vector[part] = self.reduce(np.stack([each[group][part] for each in updates]))
        return result

    @abc.abstractmethod
    def reduce(self, values: Array) -> Array:
        """One number for each column of ``values`` (updates x coordinates), which may be overwritten."""
