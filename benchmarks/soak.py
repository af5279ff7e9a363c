"""``python -m benchmarks.soak``: a thousand short jobs through one server, with a kill every few seconds; none may be lost, nothing may be left.

Killed are children and flamelets, drawn by a seed, and the server itself at moments that the seed draws too. Each job has two trainers that add its number
to the model in each round, so its final model says whether it is its own and had all its rounds, each once.

**How growth is judged.** After every 25 jobs all is at rest: no job is there and nobody is killed. When nothing of the jobs is left and the number of the server's
descriptors stands still, its memory and descriptors are taken down; how many workers happened to be there does not come into it. A server begins anew when it is
killed, so its lives are looked at one by one: most are short, one in 400 jobs is long. Of each long one the worst slope counts (least squares over the number of
jobs). Descriptors are judged over the whole of it. In the first 150 jobs of a life memory may grow: what SQLite keeps of the database (half a megabyte a
connection) and the heaps of the threads fill. From there on it is judged; what the worst life has gained in all is a figure without a bar.

**What is left** is looked for at each rest: processes, temporary files, shared memory, working directories of workers. In the end a server that keeps no jobs
(``--keep-jobs 1s``) is started, after which no file or folder in the data directory may bear the id of a job. What outlives jobs stays: designs with their code, models
in the registry.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import pathlib
import sys
import tempfile
import time
from random import Random
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.chaos import acts, interrupt
from flame.chaos.processes import end_all, of_folder, workers
from flame.chaos.server import Server
from flame.client import Client, load_job
from flame.client.follow import insist
from flame.errors import FlameError
from flame.spec.records import JobState

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "chaos"))
from leftovers import Leftovers

ROUNDS = 3
TRAIN = "def train(self): self.model['w0'] += self.config.hyperparameters.number"
#: A job may be hit as often as the seed wants it.
RESTARTS = ("restart.attempts=20", "restart.backoff=0.1")
#: So many jobs between two moments of rest.
REST = 25
#: So many jobs of a life count as its beginning, in which memory may grow.
FILLING = 150
#: One life in so many jobs is a long one.
LONG = 400
#: Seconds after which what is still there at rest is left behind.
PATIENCE = 20.0


class Look(NamedTuple):
    """The server at rest. ``life``: how often it was killed before; ``jobs``: how many have ended in this life; memory in bytes."""

    life: int
    jobs: int
    memory: int
    descriptors: int


class Growth(NamedTuple):
    """What a hundred jobs add to the server in the worst of its long lives; and what the worst has gained in all, in bytes."""

    lives: int
    memory: float
    descriptors: float
    gained: int


def lives(jobs: int, kills: int, random: Random) -> list[int]:
    """After how many jobs the server is killed each time: short lives and one or more long ones, in an order that is drawn."""
    long = max(1, jobs // LONG)
    short = [random.randint(1, max(1, jobs // 25)) for _ in range(kills + 1 - long)]
    lengths = [
        *short,
        *[(jobs - REST - sum(short)) // long] * long,
    ]  # the last kill comes when there are jobs left to hit
    random.shuffle(lengths)
    return list(itertools.accumulate(lengths))[:-1]


def growth(looks: list[Look]) -> Growth | None:
    """What is to be said of all lives that have gone on long enough after their beginning; None where there is no such."""
    slopes: list[tuple[float, float, int]] = []
    for _, life in itertools.groupby(looks, key=lambda look: look.life):
        seen = list(life)
        late = [look for look in seen if look.jobs >= FILLING]
        if len(late) < 3:
            continue
        memory = np.polyfit([look.jobs for look in late], [look.memory for look in late], 1)[0]
        descriptors = np.polyfit([look.jobs for look in seen], [look.descriptors for look in seen], 1)[0]
        slopes.append((100 * float(memory), round(100 * float(descriptors), 3), seen[-1].memory - seen[0].memory))
    return Growth(len(slopes), *(max(each) for each in zip(*slopes, strict=True))) if slopes else None  # type: ignore[arg-type]


class Soak:
    """The jobs, the kills, and what was seen.

    :param at_a_time: how many jobs run side by side.
    :param deaths: after how many jobs the server is killed each time.
    """

    def __init__(
        self, folder: pathlib.Path, job: pathlib.Path, at_a_time: int, deaths: list[int], random: Random
    ) -> None:
        self._data = folder / "data"
        self._points = folder / "chaos"
        self._points.mkdir()
        self._leftovers = Leftovers(folder, self._data, self._points)
        self._server = self._serve()
        self._job = job
        self._room = asyncio.Semaphore(at_a_time)
        self._deaths = deaths
        self._random = random
        self._running: set[str] = set()
        self._waiting = 0  # jobs of the batch that have not begun
        self._born = 0  # how many jobs there had been when the server was started
        self.ids: list[str] = []
        self.looks: list[Look] = []
        self.done = 0
        self.kills = {"server": 0, "flamelet": 0, "child": 0}
        self.lost: list[str] = []
        self.left: dict[str, None] = {}

    def _serve(self, *options: str) -> Server:
        return Server(self._data, self._leftovers.environment, options, through=self._leftovers.through)

    async def run(self, jobs: int, every: tuple[float, float]) -> None:
        """Run all jobs, a batch at a time."""
        await self._server.start()
        try:
            for first in range(1, jobs + 1, REST):
                await self._batch(range(first, min(first + REST, jobs + 1)), every)
                await self._rest()
            await self._server.end()
            await self._keep_none()
        finally:
            await self._server.end()
            await end_all(self._points)

    async def _batch(self, numbers: range, every: tuple[float, float]) -> None:
        self._waiting = len(numbers)
        async with Client(self._server.url) as client:
            disturbing = asyncio.create_task(self._disturb(*every))
            everything = asyncio.gather(*(self._one(client, number) for number in numbers))
            try:
                await asyncio.wait([everything, disturbing], return_when=asyncio.FIRST_COMPLETED)
                if disturbing.done():
                    disturbing.result()
                await everything
            finally:
                everything.cancel()
                disturbing.cancel()
                await asyncio.gather(everything, disturbing, return_exceptions=True)

    async def _one(self, client: Client, number: int) -> None:
        """Run one job and look at its model."""
        async with self._room:
            bundle = load_job(self._job, [f"hyperparameters.number={number}", f"name=job-{number}", *RESTARTS])
            self._waiting -= 1
            created = await insist(lambda: client.jobs.submit(bundle))
            self._running.add(created.id)
            self.ids.append(created.id)
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

    async def _disturb(self, least: float, most: float) -> None:
        """Kill something every few seconds. When the last jobs of a batch run it is quiet: else they would be hit until the seed is tired of it."""
        while True:
            await asyncio.sleep(self._random.uniform(least, most))
            if self._deaths and self.done >= self._deaths[0]:
                self._deaths.pop(0)
                self.kills["server"] += 1
                self._server.kill()
                await asyncio.sleep(self._random.choice([0.0, 1.0]))
                await self._server.start()
                self._born = self.done
            elif self._running and self._waiting:
                found = await asyncio.to_thread(workers, self._random.choice(sorted(self._running)))
                if found:
                    victim = self._random.choice(found)
                    self.kills["flamelet" if victim.flamelet else "child"] += 1
                    acts.kill(victim.pid)

    async def _rest(self) -> None:
        """Wait until nothing of the jobs is there any more, and look at the server."""
        until = time.monotonic() + PATIENCE
        while (left := await asyncio.to_thread(self._things)) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        self._found(left)
        server = psutil.Process(self._server.pid)
        before, now = -1, server.num_fds()
        while before != now and time.monotonic() < until + PATIENCE:
            await asyncio.sleep(1.0)
            before, now = now, server.num_fds()
        look = Look(self.kills["server"], self.done - self._born, server.memory_info().rss, now)
        self.looks.append(look)
        print(f"{self.done} jobs: {look}", file=sys.stderr, flush=True)

    def _things(self) -> list[str]:
        """What is there of jobs, or was made for them, although they have ended."""
        others = [f"process {pid}" for pid in of_folder(self._points) if pid != self._server.pid]
        return others + self._leftovers.of(self.ids[-1])

    def _found(self, left: list[str]) -> None:
        for thing in left:
            if thing not in self.left:
                print(f"left: {thing}", file=sys.stderr, flush=True)
            self.left[thing] = None

    async def _keep_none(self) -> None:
        """Start a server that keeps no jobs, and look at what it leaves of them."""
        self._server = self._serve("--keep-jobs", "1s")
        await self._server.start()
        until = time.monotonic() + PATIENCE + 0.5 * len(self.ids)
        while (left := await asyncio.to_thread(self._kept)) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        self._found(left)

    def _kept(self) -> list[str]:
        """The files and folders of jobs in the data directory; models in the registry are there to stay."""
        ids = frozenset(self.ids)
        folders = [(pathlib.Path(folder), names) for folder, *names in os.walk(self._data)]  # some go while it looks
        paths = [(at / name).relative_to(self._data) for at, (inner, files) in folders for name in [*inner, *files]]
        return [
            f"{path} of a job that is no longer kept"
            for path in paths
            if path.parts[0] != "registry" and ids & set(path.parts)
        ]


def _judged(grown: Growth) -> list[Figure]:
    return [
        Figure(f"memory that 100 jobs add, after the first {FILLING}", grown.memory / 1e6, "MB", "<= 1"),
        Figure("descriptors that 100 jobs add", grown.descriptors, "descriptors", "<= 1"),
        Figure("memory that a life adds in all", grown.gained / 1e6, "MB"),
    ]


def main() -> int:
    """Run the jobs; status 0 if none was lost and nothing left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--at-a-time", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server-kills", type=int, default=6)
    parser.add_argument(
        "--every", type=float, nargs=2, default=(2.0, 5.0), metavar=("LEAST", "MOST"), help="seconds between kills"
    )
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flame-soak-") as name:
        folder = pathlib.Path(name)
        job = no_op_job(folder / "job", trainers=2, rounds=ROUNDS)
        trainer = job / "code" / "trainer" / "main.py"
        trainer.write_text(trainer.read_text().replace("def train(self): ...", TRAIN))
        deaths = lives(arguments.jobs, arguments.server_kills, random)
        one = Soak(folder, job, arguments.at_a_time, deaths, random)
        try:
            interrupt.run(one.run(arguments.jobs, tuple(arguments.every)))
        except KeyboardInterrupt:
            print("Interrupted; all that was started has been ended.", file=sys.stderr, flush=True)
            return 130
    grown = growth(one.looks)
    report(
        [
            Figure("jobs", arguments.jobs, "jobs"),
            Figure("lost", len(one.lost), "jobs", "== 0"),
            Figure("left behind", len(one.left), "things", "== 0"),
            *(Figure(f"kills of a {name}", number, "kills") for name, number in one.kills.items()),
            Figure("lives of the server that were long enough to judge", grown.lives if grown else 0, "lives", ">= 1"),
            *(_judged(grown) if grown else ()),
            Figure("most memory of the server, at rest", max(look.memory for look in one.looks) / 1e6, "MB"),
            Figure("most descriptors, at rest", max(look.descriptors for look in one.looks), "descriptors"),
            Figure("time", time.perf_counter() - began, "s"),
        ]
    )
    return bool(one.lost or one.left)


if __name__ == "__main__":
    sys.exit(main())
