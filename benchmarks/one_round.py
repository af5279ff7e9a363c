"""Rounds with 10 (and 40) trainer processes and a 50 MB model: time, and the peak memory of the aggregator.

The limit on the same machine is copying the bytes of a round once, N trainers x 50 MB down and up, from one
array to another in one process.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time

import numpy as np

from benchmarks.jobs import flame_run, no_op_job
from benchmarks.report import Figure, report

MODEL = 50_000_000
TENSORS = 50
ROUNDS = 6


def copy_once(trainers: int) -> float:
    """Seconds to copy 2 x ``trainers`` x 50 MB once between warm buffers."""
    source, target = np.ones(MODEL // 4, np.float32), np.zeros(MODEL // 4, np.float32)
    began = time.perf_counter()
    for _ in range(2 * trainers):
        np.copyto(target, source)
    return time.perf_counter() - began


def main() -> None:
    """Measure with 10 and with 40 trainers."""
    figures = []
    for trainers in (10, 40):
        with tempfile.TemporaryDirectory() as scratch:
            job = no_op_job(
                pathlib.Path(scratch) / "job",
                trainers=trainers,
                rounds=ROUNDS,
                model_bytes=MODEL,
                tensors=TENSORS,
                watch_memory=True,
            )
            document = flame_run(job, pathlib.Path(scratch) / "data")
        seconds = statistics.median(entry["seconds"] for entry in document["rounds"][1:])
        limit = statistics.median(copy_once(trainers) for _ in range(5))
        peak = max(entry["metrics"]["peak bytes"] for entry in document["rounds"]) / MODEL
        figures += [
            Figure(f"round, {trainers} trainers, 50 MB", seconds, "s", "<= 0.6" if trainers == 10 else ""),
            Figure(f"round, {trainers} trainers, 50 MB, against copying once", seconds / limit, "x", "<= 20"),
            Figure(f"aggregator's peak, {trainers} trainers", peak, "models", "<= 3"),
        ]
    report(figures)


if __name__ == "__main__":
    main()
