"""Encoding and decoding a model of 98 MB in 162 tensors, beside safetensors' own ``save`` and ``load``.

Every decoded tensor is compared with the original once, outside the measured time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from benchmarks.report import Figure, report
from flame.sdk import codec

SIZE = 98_000_000
TENSORS = 162


def median(function: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    """Measure numpy and PyTorch, and a message without tensors."""
    weights = {f"layer{i}.weight": np.random.rand(SIZE // TENSORS // 4).astype(np.float32) for i in range(TENSORS)}
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    frames = codec.encode({"weights": weights}, sender="trainer", round=1)
    joined = b"".join((frames.head, *frames.buffers))
    decoded = codec.decode(joined)["weights"]
    assert all(np.array_equal(decoded[name], array) for name, array in weights.items())
    small = {"round": 7, "loss": 0.25, "done": False}
    packed = codec.encode(small).head

    decoding = median(lambda: codec.decode(joined), 300)
    ours = median(lambda: codec.encode({"weights": weights}), 300) + decoding
    of_torch = median(lambda: codec.encode({"weights": tensors}), 300) + decoding
    theirs = median(lambda: safetensors.numpy.load(safetensors.numpy.save(weights)), 5)
    without = median(lambda: codec.decode(codec.encode(small).head), 3000)
    assert codec.decode(packed).data == small
    report(
        [
            Figure("codec, 98 MB in 162 tensors", ours, "ms", "<= 1"),
            Figure("codec, the same from PyTorch", of_torch, "ms", "<= 1"),
            Figure("safetensors save and load", theirs, "ms"),
            Figure("codec against safetensors", theirs / ours, "x faster"),
            Figure("codec, a message without tensors", without, "ms"),
        ]
    )


if __name__ == "__main__":
    main()
