"""Folding updates into the aggregate, beside copying the same bytes once in the same run.

Three shapes of the work: 50 MB updates in 160 tensors that lie side by side (as the codec gives them), the same with
unequal weights, and the same with each tensor somewhere else in memory; and the cost of one update of a tiny model in
160 tensors, which is that of Python alone. A fold checks all values and adds them up. Copy and fold take turns, because
the machine's speed changes from minute to minute; the median of their ratios counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.report import Figure, report
from flame.sdk import optimizers
from flame.sdk.optimizers import Update

MODEL = 50_000_000
TENSORS = 160
TURNS = 25

Model = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]


def model(elements: int, *, together: bool) -> Model:
    """A model of :data:`TENSORS` tensors of different sizes, read-only as a received one."""
    rng = np.random.default_rng(1)
    shares = rng.random(TENSORS)
    sizes = np.maximum(1, elements * shares / shares.sum()).astype(int)
    buffer = rng.standard_normal(int(sizes.sum()), np.float32)
    buffer.setflags(write=False)
    parts = np.split(buffer, np.cumsum(sizes)[:-1])
    return {f"layer{i}.weight": part if together else part.copy() for i, part in enumerate(parts)}


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def against_copy(weights: Model, counts: tuple[float, float]) -> tuple[float, float]:
    """The median ratio of a fold to a copy, and the bytes a second that a fold takes in."""
    source = np.ones(MODEL // 4, np.float32)
    target = np.zeros_like(source)
    optimizer = optimizers.make("fedavg")
    optimizer.begin(weights, 0)
    for i in range(2):  # the first of a round is cheaper: it need not read the sum
        optimizer.fold(Update(end=f"t{i}", weights=weights, count=counts[0], version=0))
    update = Update(end="t", weights=weights, count=counts[1], version=0)
    ratios, folds = [], []
    for _ in range(TURNS):
        copy = seconds(lambda: np.copyto(target, source))
        folds.append(seconds(lambda: optimizer.fold(update)))
        ratios.append(folds[-1] / copy)
    return statistics.median(ratios), MODEL / statistics.median(folds)


def main() -> None:
    """Print a line for each case, and the summary."""
    ratio, rate = against_copy(model(MODEL // 4, together=True), (1, 1))
    print(f"equal weights, side by side: {ratio:.2f} copies, {rate / 1e9:.1f} GB/s")
    unequal, rate = against_copy(model(MODEL // 4, together=True), (100, 37))
    print(f"unequal weights, side by side: {unequal:.2f} copies, {rate / 1e9:.1f} GB/s")
    scattered, rate = against_copy(model(MODEL // 4, together=False), (100, 37))
    print(f"unequal weights, scattered: {scattered:.2f} copies, {rate / 1e9:.1f} GB/s")
    tiny = model(TENSORS, together=True)
    optimizer = optimizers.make("fedavg")
    optimizer.begin(tiny, 0)
    update = Update(end="t", weights=tiny, count=2, version=0)
    each = statistics.median(seconds(lambda: optimizer.fold(update)) for _ in range(500))
    print(f"a tiny model in {TENSORS} tensors: {each * 1e6:.0f} us an update")
    report(
        [
            Figure("fold_equal_over_copy", ratio, "ratio", "<= 2"),
            Figure("fold_unequal_over_copy", unequal, "ratio", "<= 2"),
            Figure("fold_scattered_over_copy", scattered, "ratio"),
            Figure("fold_tiny_160_tensors", each * 1e6, "us"),
        ]
    )


if __name__ == "__main__":
    main()
