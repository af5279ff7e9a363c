"""Fifty jobs submitted at once to one server: all complete, none is lost, none is mixed up.

Each job has two trainers that add the job's own number to the model in each of ten rounds, so its final model says which job
it is and how many rounds it had. One of them alone, on the same machine, is what the time is held against.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.client import Client, load_job
from flame.spec.records import JobState

JOBS = 50
ROUNDS = 10
TRAIN = "def train(self): self.model['w0'] += self.config.hyperparameters.number"


async def complete(client: Client, job: pathlib.Path, number: int) -> bool:
    """Run one job; whether it completed with its own model."""
    bundle = load_job(job, [f"hyperparameters.number={number}", f"name=job-{number}"])
    created = await client.jobs.submit(bundle)
    await client.jobs.start(created.id)
    ended = await client.jobs.wait(created.id)
    path = ended.model.path if ended.model else None
    if ended.state is not JobState.COMPLETED or len(ended.rounds) != ROUNDS or path is None:
        print(f"job {number}: {ended.state.value}, {len(ended.rounds)} rounds, {ended.failure}", file=sys.stderr)
        return False
    body = pathlib.Path(path).read_bytes()
    values = np.frombuffer(body[8 + int.from_bytes(body[:8], "little") :], np.float32)
    return bool((values == 1 + ROUNDS * number).all())


async def measure(server: str, job: pathlib.Path) -> tuple[float, float, int]:
    """Seconds of one job alone, of all at once, and how many of these came out right."""
    async with Client(server) as client:
        began = time.perf_counter()
        await complete(client, job, 0)
        alone = time.perf_counter() - began
        began = time.perf_counter()
        right = await asyncio.gather(*(complete(client, job, number) for number in range(1, JOBS + 1)))
        return alone, time.perf_counter() - began, sum(right)


def main() -> None:
    """Start a server, run the jobs, end the server."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        job = no_op_job(scratch / "job", trainers=2, rounds=ROUNDS)
        script = job / "code" / "trainer" / "main.py"
        script.write_text(script.read_text().replace("def train(self): ...", TRAIN))
        environment = os.environ | {"FLAME_CONFIG": str(scratch / "config.yaml")}
        command = [sys.executable, "-m", "flame", "serve", "--port", "0", "--data-dir", str(scratch / "data")]
        with (scratch / "log").open("w") as log, subprocess.Popen(command, env=environment, stderr=log) as server:
            place = scratch / "data" / "server.json"
            while not place.exists():
                time.sleep(0.05)
            try:
                alone, together, right = asyncio.run(measure(json.loads(place.read_text())["url"], job))
            finally:
                server.terminate()
    report(
        [
            Figure("jobs that came out right, of fifty at once", right, "jobs", "= 50"),
            Figure("fifty jobs at once", together, "s"),
            Figure("one job alone", alone, "s"),
            Figure("fifty at once, in jobs one after another", together / alone, "x"),
        ]
    )


if __name__ == "__main__":
    main()
