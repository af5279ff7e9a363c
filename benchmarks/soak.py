"""``python -m benchmarks.soak``: a thousand short jobs through one server, with a kill every few seconds; none may be lost.

Killed are children, flamelets and now and then the server, drawn by a seed. Each job has two trainers that add its number to the model in
each round, so its final model says whether it is its own and had all its rounds, each once. Between two kills of it the server is looked at: its memory
and its file descriptors must not grow with the number of jobs that it has seen. What counts is the longest of its lives, without the first
fifth, in which caches fill.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import sys
import tempfile
import time
from random import Random

import numpy as np
import psutil

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.chaos import acts
from flame.chaos.processes import marked, workers
from flame.chaos.server import Server
from flame.client import Client, load_job
from flame.client.follow import insist
from flame.errors import FlameError
from flame.spec.records import JobState

ROUNDS = 3
TRAIN = "def train(self): self.model['w0'] += self.config.hyperparameters.number"
#: A job may be hit as often as the seed wants it.
RESTARTS = ("restart.attempts=20", "restart.backoff=0.1")
#: One kill in so many hits the server.
SERVER_KILLS = 40


class Sample:
    """The server at one moment of one of its lives."""

    def __init__(self, pid: int, jobs: int) -> None:
        process = psutil.Process(pid)
        self.pid = pid
        self.jobs = jobs
        self.memory = process.memory_info().rss
        self.descriptors = process.num_fds()


class Soak:
    """The jobs, the kills, and what was seen.

    :param at_a_time: how many jobs run side by side.
    """

    def __init__(self, server: Server, job: pathlib.Path, at_a_time: int, random: Random) -> None:
        self._server = server
        self._job = job
        self._room = asyncio.Semaphore(at_a_time)
        self._random = random
        self._running: set[str] = set()
        self.samples: list[Sample] = []
        self.done = 0
        self.kills = {"server": 0, "flamelet": 0, "child": 0}
        self.lost: list[str] = []

    async def one(self, client: Client, number: int) -> None:
        """Run one job and look at its model."""
        async with self._room:
            bundle = load_job(self._job, [f"hyperparameters.number={number}", f"name=job-{number}", *RESTARTS])
            created = await insist(lambda: client.jobs.submit(bundle))
            self._running.add(created.id)
            if (await insist(lambda: client.jobs.get(created.id))).state is JobState.READY:
                await self._start(client, created.id)
            ended = await client.jobs.wait(created.id)
            self._running.discard(created.id)
            fault = None
            if ended.state is not JobState.COMPLETED or ended.model is None or ended.model.path is None:
                fault = f"{ended.state.value}: {ended.failure.message if ended.failure else ended.reason}"
            elif [entry.round for entry in ended.rounds] != list(range(1, ROUNDS + 1)):
                fault = f"rounds {[entry.round for entry in ended.rounds]}"
            else:
                body = pathlib.Path(ended.model.path).read_bytes()
                values = np.frombuffer(body[8 + int.from_bytes(body[:8], "little") :], np.float32)
                if not (values == 1 + ROUNDS * number).all():
                    fault = f"its model is {values[:3]}, not {1 + ROUNDS * number}"
            if fault is not None:
                self.lost.append(f"job {number} ({created.id}): {fault}")
                print(self.lost[-1], file=sys.stderr, flush=True)
            self.done += 1

    async def _start(self, client: Client, id: str) -> None:
        """Start a job; an answer that was lost with a killed server is no second start."""
        while True:
            try:
                await client.jobs.start(id)
                return
            except FlameError:
                if (await insist(lambda: client.jobs.get(id))).state is not JobState.READY:
                    return

    async def disturb(self, least: float, most: float) -> None:
        """Kill something every few seconds, forever."""
        while True:
            await asyncio.sleep(self._random.uniform(least, most))
            self._look()
            if self._random.randrange(SERVER_KILLS) == 0:
                self.kills["server"] += 1
                self._server.kill()
                await asyncio.sleep(self._random.choice([0.0, 1.0]))
                await self._server.start()
            elif self._running:
                found = await asyncio.to_thread(workers, self._random.choice(sorted(self._running)))
                if found:
                    victim = self._random.choice(found)
                    self.kills["flamelet" if victim.flamelet else "child"] += 1
                    acts.kill(victim.pid)

    def _look(self) -> None:
        try:
            self.samples.append(Sample(self._server.pid, self.done))
        except psutil.Error:
            return

    def left(self, jobs: set[str]) -> int:
        """How many processes of jobs are there although these have ended."""
        return sum(len(marked(job)) for job in jobs)

    def growth(self) -> tuple[float, float, int]:
        """Bytes and descriptors that a hundred jobs add to the server, in the longest of its lives; and how many jobs it saw then."""
        lives: dict[int, list[Sample]] = {}
        for sample in self.samples:
            lives.setdefault(sample.pid, []).append(sample)
        longest = max(lives.values(), key=lambda life: life[-1].jobs - life[0].jobs)
        late = longest[len(longest) // 5 :]
        jobs = np.array([sample.jobs for sample in late], float)
        if len(set(jobs)) < 2:
            return 0.0, 0.0, 0
        memory = np.polyfit(jobs, [sample.memory for sample in late], 1)[0]
        descriptors = np.polyfit(jobs, [sample.descriptors for sample in late], 1)[0]
        return 100 * float(memory), 100 * float(descriptors), int(jobs[-1] - jobs[0])


async def soak(folder: pathlib.Path, jobs: int, at_a_time: int, seed: int, every: tuple[float, float]) -> Soak:
    """Run it to its end."""
    job = no_op_job(folder / "job", trainers=2, rounds=ROUNDS)
    text = (job / "code" / "trainer" / "main.py").read_text()
    (job / "code" / "trainer" / "main.py").write_text(text.replace("def train(self): ...", TRAIN))
    server = Server(folder / "data", {})
    await server.start()
    one = Soak(server, job, at_a_time, Random(seed))
    try:
        async with Client(server.url) as client:
            disturbing = asyncio.create_task(one.disturb(*every))
            try:
                all_of_them = asyncio.gather(*(one.one(client, number) for number in range(1, jobs + 1)))
                await asyncio.wait([all_of_them, disturbing], return_when=asyncio.FIRST_COMPLETED)
                if disturbing.done():
                    all_of_them.cancel()
                    disturbing.result()
                await all_of_them
            finally:
                disturbing.cancel()
                await asyncio.gather(disturbing, return_exceptions=True)
    finally:
        await server.end()
    return one


def main() -> int:
    """Run the jobs; status 0 if none was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--at-a-time", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--every", type=float, nargs=2, default=(2.0, 5.0), metavar=("LEAST", "MOST"), help="seconds between kills"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flame-soak-") as folder:
        one = asyncio.run(
            soak(pathlib.Path(folder), arguments.jobs, arguments.at_a_time, arguments.seed, tuple(arguments.every))
        )
    memory, descriptors, seen = one.growth()
    report(
        [
            Figure("jobs", arguments.jobs, "jobs"),
            Figure("lost", len(one.lost), "jobs", "== 0"),
            *(Figure(f"kills of a {name}", number, "kills") for name, number in one.kills.items()),
            Figure("jobs in the server's longest life", seen, "jobs"),
            Figure("memory that 100 jobs add to the server", memory / 1e6, "MB", "<= 1"),
            Figure("descriptors that 100 jobs add to it", descriptors, "descriptors", "<= 1"),
            Figure("most memory of the server", max(sample.memory for sample in one.samples) / 1e6, "MB"),
            Figure("most descriptors", max(sample.descriptors for sample in one.samples), "descriptors"),
            Figure("time", time.perf_counter() - began, "s"),
        ]
    )
    return bool(one.lost)


if __name__ == "__main__":
    sys.exit(main())
