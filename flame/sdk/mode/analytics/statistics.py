"""What sites answer and how answers add up: pure functions of arrays.

Values that are missing (NaN) or not finite are left out everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Summary:
    """Some values in five numbers; the summary of two sets of values together is the sum of their summaries.

    Means and sums of squares are merged without the cancellation of plain sums of squares (Chan, Golub and LeVeque
    1979, "Updating formulae and a pairwise algorithm for computing sample variances").

    :ivar squares: the sum of the squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf

    @classmethod
    def of(cls, values: Array) -> Summary:
        """The summary of some values."""
        values = present(values)
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(np.square(values - mean).sum()), float(values.min()), float(values.max()))

    def __add__(self, other: object) -> Summary:
        """The summary of both."""
        if not isinstance(other, Summary):
            return NotImplemented
        if not self.count or not other.count:
            return other if not self.count else self
        count, apart = self.count + other.count, other.mean - self.mean
        return Summary(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + apart * apart * self.count * other.count / count,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    def row(self) -> Array:
        """As it travels: ``[5]``, float64."""
        return np.array(astuple(self), np.float64)

    @property
    def variance(self) -> float:
        """The variance of the values themselves (divided by their count); NaN of none."""
        return self.squares / self.count if self.count else math.nan

    @property
    def deviation(self) -> float:
        """The square root of the variance."""
        return math.sqrt(self.variance)


class Estimate(NamedTuple):
    """A quantile: it lies within ``error`` of ``value``. With an error of 0 it is exact."""

    value: float
    error: float


def present(values: Array) -> Array:
    """The finite ones, as float64."""
    values = np.asarray(values, np.float64).reshape(-1)
    return values[np.isfinite(values)]


def tally(values: Array, edges: Array) -> npt.NDArray[np.int64]:
    """How many values lie below the first edge, in ``[edge, next edge)`` for each, and from the last edge on.

    :param edges: increasing, ``[n]``.
    :returns: ``[n + 1]``.
    """
    places = np.searchsorted(edges, present(values), side="right")
    return np.bincount(places, minlength=len(edges) + 1).astype(np.int64)


def closed(edges: Sequence[float] | Array) -> Array:
    """Edges whose last bin has its upper end in it, as numpy's histograms do.

    :raises ValueError: they are fewer than two, or do not increase.
    """
    made = np.array(edges, np.float64)
    if made.ndim != 1 or len(made) < 2 or not np.isfinite(made).all() or (np.diff(made) <= 0).any():
        raise ValueError("edges of a histogram are two or more finite numbers that increase")
    made[-1] = np.nextafter(made[-1], np.inf)
    return made


def place_of(value: float) -> int:
    """Where a float64 stands among all of them, in their order; zero is at 0."""
    bits = int(np.float64(abs(value)).view(np.int64))
    return -bits if value < 0 else bits


def float_at(place: int) -> float:
    """The float64 at a place; see :func:`place_of`."""
    value = float(np.int64(abs(place)).view(np.float64))
    return -value if place < 0 else value


class Bracket:
    """Where a quantile lies, narrowed down by one histogram after the other.

    The q-quantile of n values is the ceil(q n)-th smallest one (numpy's ``inverted_cdf``), and ``[low, high)`` contains it. Each
    histogram counts all values anew, so what is found belongs to the sites that answered last, also when others have left.

    :param q: from 0 to 1.
    :param error: the largest error that is allowed.
    """

    def __init__(self, q: float, error: float, low: float, high: float) -> None:
        self.q = q
        self.error = error
        self.low = low
        self.high = float_at(place_of(high) + 1)

    @property
    def exact(self) -> bool:
        """Whether no second number fits in."""
        return place_of(self.low) + 1 >= place_of(self.high)

    @property
    def done(self) -> bool:
        """Whether the error is small enough."""
        return self.exact or (self.high / 2 - self.low / 2) <= self.error

    @property
    def estimate(self) -> Estimate:
        """The middle, and how far off it may be."""
        if self.exact:
            return Estimate(self.low, 0.0)
        return Estimate(self.low / 2 + self.high / 2, self.high / 2 - self.low / 2)

    def edges(self, bins: int) -> Array:
        """Where to count next: the bracket cut into so many pieces.

        They are of equal width where an error is allowed. Else each holds equally many floats, of which there are less
        than 2 ** 64: so 64 bins leave none between in eleven rounds, whatever the range.
        """
        if self.error > 0 and math.isfinite(self.high - self.low):
            inner = np.linspace(self.low, self.high, bins + 1)[1:-1]
        else:
            low, high = place_of(self.low), place_of(self.high)
            inner = np.array([float_at(low + (high - low) * at // bins) for at in range(1, bins)])
        inner = np.unique(inner)
        return np.concatenate([[self.low], inner[(inner > self.low) & (inner < self.high)], [self.high]])

    def narrow(self, edges: Array, counts: npt.NDArray[np.int64]) -> bool:
        """Take in a histogram; False when the quantile is not in the bracket any more, because the values have changed.

        :param edges: contains those of :meth:`edges`.
        :param counts: what :func:`tally` gives for them, of all sites together.
        """
        rank = max(1, math.ceil(round(self.q * int(counts.sum()), 9)))
        place = int(np.searchsorted(np.cumsum(counts), rank, side="left"))
        if place == 0 or place == len(edges):
            return False
        low, high = float(edges[place - 1]), float(edges[place])
        if low < self.low or high > self.high:
            return False
        self.low, self.high = low, high
        return True
