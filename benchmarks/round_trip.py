"""A no-op numpy job with 2 trainers and 10 rounds through the full path: ``flame run`` from start to exit.

NVFlare 2.9 takes 35 s for it and 2.5 s a round, Flower 1.41 takes 3 to 6 s a round, because both poll. The
floor on the same machine is starting the same number of bare Python processes that import what the workers import.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.jobs import flame_run, no_op_job
from benchmarks.report import Figure, report

REPEATS = 5


def bare_start() -> float:
    """Seconds that it takes to start eight Python processes, all at once, that import numpy and aiohttp, and to see them end."""
    began = time.perf_counter()
    processes = [subprocess.Popen([sys.executable, "-c", "import numpy, aiohttp"]) for _ in range(8)]
    for process in processes:
        process.wait()
    return time.perf_counter() - began


def main() -> None:
    """Run the job some times, interleaved with the floor."""
    walls, between, floors = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        job = no_op_job(pathlib.Path(scratch) / "job", trainers=2, rounds=10)
        for repeat in range(REPEATS):
            began = time.perf_counter()
            document = flame_run(job, pathlib.Path(scratch) / f"data{repeat}")
            walls.append(time.perf_counter() - began)
            assert document["state"] == "completed", document
            assert [entry["round"] for entry in document["rounds"]] == list(range(1, 11)), document["rounds"]
            between += [1000 * entry["seconds"] for entry in document["rounds"][1:]]
            floors.append(bare_start())
    report(
        [
            Figure("flame run, no-op job, start to exit", statistics.median(walls), "s", "<= 3"),
            Figure(
                "the same, as a multiple of starting 8 bare processes",
                statistics.median(walls) / statistics.median(floors),
                "x",
            ),
            Figure("no-op round, 2 trainers (median)", statistics.median(between), "ms", "<= 10"),
            Figure("no-op round, 2 trainers (slowest)", max(between), "ms"),
        ]
    )


if __name__ == "__main__":
    main()
