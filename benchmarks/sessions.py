"""Elastic sessions: ``python -m benchmarks.sessions``. Two idle cores; executors are processes; the state is on disk, in SQLite.

In order: what a session and its first tasks cost, cold and warm; 30,000 no-op tasks through one session with two executors, in
the same run with Ray and Dask (from PyPI, each in an environment of its own under ``~/.cache/flame-benchmarks``); ten
sessions of 1,000 tasks, and again with executors killed at random and the server killed twice; shares by weight; the memory that
eight executors take for an array of 100 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

import flame.sessions
from benchmarks.report import Figure, report
from flame.client import Client
from flame.sessions import Connection, Session
from flame.spec.sessions import SessionRecord

CACHE = Path.home() / ".cache" / "flame-benchmarks"
TASKS = 30_000
#: Bytes of the array that executors share, and how many do.
ARRAY, EXECUTORS = 100_000_000, 8
#: Bytes of the one that is compared with: an object, too, so that reading one is part of both.
SMALL = 800_000

RAY = """
import json, os, sys, time, statistics
os.environ["RAY_DEDUP_LOGS"] = "0"
import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
@ray.remote
def noop(x): return x
@ray.remote(num_cpus=1)
class Actor:
    def noop(self, x): return x
ray.get([noop.remote(n) for n in range(200)])
n = int(sys.argv[1])
rates = []
for _ in range(3):
    t = time.perf_counter(); ray.get([noop.remote(k) for k in range(n)]); rates.append(n / (time.perf_counter() - t))
one = []
for k in range(300):
    t = time.perf_counter(); ray.get(noop.remote(k)); one.append(time.perf_counter() - t)
actors = [Actor.remote() for _ in range(2)]
ray.get([a.noop.remote(0) for a in actors])
calls = []
for _ in range(3):
    t = time.perf_counter(); ray.get([actors[k % 2].noop.remote(k) for k in range(n)]); calls.append(n / (time.perf_counter() - t))
print(json.dumps({"version": ray.__version__, "rate": statistics.median(rates), "one": statistics.median(one), "actors": statistics.median(calls)}))
"""

DASK = """
import json, sys, time, statistics, logging
import distributed
from distributed import Client, LocalCluster
def noop(x): return x
def main():
    n = int(sys.argv[1])
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.ERROR) as cluster, Client(cluster) as client:
        client.gather(client.map(noop, range(200), pure=False))
        rates = []
        for _ in range(3):
            t = time.perf_counter(); client.gather(client.map(noop, range(n), pure=False)); rates.append(n / (time.perf_counter() - t))
        one = []
        for k in range(100):
            t = time.perf_counter(); client.submit(noop, k, pure=False).result(); one.append(time.perf_counter() - t)
        print(json.dumps({"version": distributed.__version__, "rate": statistics.median(rates), "one": statistics.median(one)}))
if __name__ == "__main__":
    main()
"""


APPLICATIONS = """
import time

def noop(x):
    return x

def nap(seconds):
    time.sleep(seconds)
    return seconds

class Shared:
    def on_session_enter(self, ctx):
        self.total = float(ctx.common_data.sum())  # every page of it is touched
        self.data = ctx.common_data

    def on_task_invoke(self, ctx, task):
        return self.total
"""


def application(name: str) -> Any:
    """A function or class of a module of its own, as a user's is: executors get its source and nothing else."""
    path = CACHE / "flame_benchmark_tasks.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(APPLICATIONS)
    if str(CACHE) not in sys.path:
        sys.path.insert(0, str(CACHE))
    return getattr(importlib.import_module(path.stem), name)


class Server:
    """A server in a process of its own, in a data directory of its own."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.data_dir = folder / "data"
        self._log = folder / "server.log"
        self._slots = slots
        self.process: subprocess.Popen[bytes]

    async def start(self) -> str:
        """Start it, or start it again; gives its address."""
        command = [sys.executable, "-m", "flame", "serve", "--port", "0", "--data-dir", str(self.data_dir)]
        with self._log.open("ab") as log:
            self.process = await asyncio.to_thread(
                subprocess.Popen,
                [*command, "--slots", str(self._slots)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while True:
            if self.process.poll() is not None:
                raise SystemExit(self._log.read_text()[-2000:])
            with contextlib.suppress(OSError, ValueError, LookupError):
                said = json.loads((self.data_dir / "server.json").read_text())
                if said["pid"] == self.process.pid:
                    return str(said["url"])
            await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    def executors(self) -> list[psutil.Process]:
        """Its executors."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "flame.sessions.executor" in process.cmdline() and Path(process.cwd()).is_relative_to(self.data_dir):
                    found.append(process)
        return found

    async def quiet(self) -> None:
        """Wait until no executor is left."""
        while await asyncio.to_thread(self.executors):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def end(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()
        for process in self.executors():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.asynccontextmanager
async def serving(slots: int) -> AsyncIterator[tuple[Server, Connection]]:
    """A server and a connection to it."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), slots)
        try:
            async with flame.sessions.connect(await server.start()) as connection:
                yield server, connection
        finally:
            server.end()


async def first_tasks(repeat: int) -> list[Figure]:
    """What a session costs, and its first tasks."""
    async with serving(slots=2) as (server, connection):
        async with connection.open(
            application("noop"), delay_release=0
        ):  # the server has the code now, as it has any registered one's
            pass
        created, submitted, cold = [], [], []
        for _ in range(200):
            session = connection.open(application("noop"), max_instances=2)
            begin = time.perf_counter()
            await session.__aenter__()
            created.append(time.perf_counter() - begin)
            await session.close()
            await session.__aexit__(None)
        for _ in range(repeat):
            await server.quiet()
            begin = time.perf_counter()
            async with connection.open(application("noop"), max_instances=2, delay_release=0) as session:
                handed = time.perf_counter()
                futures = session.submit_many(range(10))
                await session.accepted()
                submitted.append(time.perf_counter() - handed)
                await asyncio.gather(*futures)
                cold.append(time.perf_counter() - begin)
        warm, one = [], []
        async with connection.open(application("noop"), max_instances=2) as session:
            await asyncio.gather(*session.submit_many(range(1000)))
            for _ in range(300):
                begin = time.perf_counter()
                await asyncio.gather(*session.submit_many(range(10)))
                warm.append(time.perf_counter() - begin)
            for _ in range(1000):
                begin = time.perf_counter()
                await session.invoke(1)
                one.append(time.perf_counter() - begin)
    return [
        _ms("session created", created, "<= 1"),
        _ms("ten tasks submitted", submitted, "<= 8"),
        _ms("ten tasks answered, cold", cold, "<= 150"),
        _ms("ten tasks answered, warm", warm, "<= 5"),
        _ms("one task, warm", one, "< 0.8"),
    ]


async def throughput(repeat: int) -> tuple[float, float, list[Figure]]:
    """No-op tasks through one session with two executors: their rate, what a single one takes, and the figures."""
    async with serving(slots=2) as (server, connection):
        rates = []
        async with connection.open(application("noop"), min_instances=2, max_instances=2) as session:
            await asyncio.gather(*session.submit_many(range(2000)))
            for _ in range(repeat):
                begin = time.perf_counter()
                answers = await asyncio.gather(*session.submit_many(range(TASKS)))
                rates.append(TASKS / (time.perf_counter() - begin))
                assert answers == list(range(TASKS))
            one = []
            for _ in range(300):
                begin = time.perf_counter()
                await session.invoke(1)
                one.append(time.perf_counter() - begin)
        memory = psutil.Process(server.process.pid).memory_info().rss
    rate = statistics.median(rates)
    return (
        rate,
        statistics.median(one),
        [
            Figure("no-op tasks, two executors", rate, "tasks/s", ">= 30000"),
            Figure("no-op tasks, best run", max(rates), "tasks/s"),
            Figure("memory of the server", memory / 1e6, "MB"),
            _ms("one task, after these", one, ""),
        ],
    )


def others(name: str, package: str, script: str, tasks: int) -> dict[str, Any] | None:
    """The same tasks with another system from PyPI; None where it cannot be had."""
    home = CACHE / name
    python = home / "bin" / "python"
    try:
        if not (home / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
            (home / "complete").touch()
        done = subprocess.run(
            [str(python), "-c", script, str(tasks)]
            if name == "ray"
            else [str(python), _script(name, script), str(tasks)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{name} cannot be measured: {error}", file=sys.stderr)
        return None
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def _script(name: str, script: str) -> str:
    """A file for what starts its workers by importing ``__main__`` again."""
    path = CACHE / f"run_{name}.py"
    path.write_text(script)
    return str(path)


async def ten_sessions(*, chaos: bool) -> list[Figure]:
    """Ten sessions of 1,000 tasks at once; with ``chaos`` executors are killed at random, and the server twice."""
    async with serving(slots=4) as (server, connection), contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(connection.open(application("nap"))) for _ in range(10)]
        begin = time.perf_counter()
        futures = [session.submit_many([0.001] * 1000) for session in sessions]
        answers = [0]

        def count(_: Any) -> None:
            answers[0] += 1

        for some in futures:
            for future in some:
                future.add_done_callback(count)
        killing = asyncio.create_task(_kill(server)) if chaos else None
        if chaos:
            for share in (3000, 6000):
                while answers[0] < share:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await server.kill()
                await server.start()
        results = [await asyncio.gather(*some) for some in futures]
        seconds = time.perf_counter() - begin
        if killing is not None:
            killing.cancel()
        assert results == [[0.001] * 1000] * 10
        async with Client(connection.server) as client:
            counts = [(await _get(client, session)).counts for session in sessions]
    name = "ten sessions, killed" if chaos else "ten sessions"
    return [
        Figure(f"{name}: tasks answered", answers[0], "tasks", "10000"),
        Figure(f"{name}: tasks failed", sum(one.failed for one in counts), "tasks", "0"),
        Figure(f"{name}: took", seconds, "s"),
    ]


async def _kill(server: Server) -> None:
    while True:
        await asyncio.sleep(random.uniform(0.1, 0.6))
        found = await asyncio.to_thread(server.executors)
        if found:
            with contextlib.suppress(psutil.Error):
                random.choice(found).send_signal(signal.SIGKILL)


async def shares() -> list[Figure]:
    """Two sessions of weights 1 and 3 with a backlog; later a third of weight 4."""
    async with (
        serving(slots=8) as (_, connection),
        contextlib.AsyncExitStack() as stack,
        Client(connection.server) as client,
    ):
        sessions: list[Session] = []

        async def join(weight: float) -> None:
            session = await stack.enter_async_context(connection.open(application("nap"), weight=weight))
            session.submit_many([0.01] * 4000)
            sessions.append(session)

        async def settled(*wanted: int) -> float:
            begin = time.perf_counter()
            since: float | None = None
            while True:
                now = time.perf_counter()
                held = [
                    sum(one.state == "bound" for one in (await _get(client, session)).executors) for session in sessions
                ]
                since = (since or now) if held == list(wanted) else None
                if since is not None and now - since > 0.3:
                    return since - begin
                if now - begin > 20:
                    raise SystemExit(f"shares did not settle: {held}, not {wanted}")

        await join(1.0)
        await settled(8)
        await join(3.0)
        second = await settled(2, 6)
        await join(4.0)
        third = await settled(1, 3, 4)
        for session in sessions:
            await session.close(force=True)
    return [
        Figure("weights 1 and 3: settled after", second, "s", "<= 1"),
        Figure("weight 4 joins: settled after", third, "s", "<= 1"),
    ]


async def one_copy() -> list[Figure]:
    """What an array costs as common data of eight executors on one host, beside a small one: by the kernel's count, in which
    a page that n processes have in common costs each of them an n-th (PSS), and what each has for itself (USS).
    """
    array = np.arange(ARRAY // 8, dtype=np.float64)
    async with serving(slots=EXECUTORS) as (server, connection):
        small = await _memory(server, connection, array[: SMALL // 8])
        await server.quiet()
        large = await _memory(server, connection, array)
    name = f"{ARRAY / 1e6:g} MB for {EXECUTORS} executors"
    return [
        Figure(f"{name}: copies in memory", (large.shared - small.shared) / (ARRAY - SMALL), "copies", "<= 1.1"),
        Figure(f"{name}: private memory", (large.private - small.private) / 1e6, "MB, all of them"),
    ]


class _Memory(NamedTuple):
    """What processes take: with their part of what is shared, and each alone."""

    shared: int
    private: int


async def _memory(server: Server, connection: Connection, array: Any) -> _Memory:
    """The memory of executors that all have read an array."""
    shared = application("Shared")
    async with (
        Client(connection.server) as client,
        connection.open(shared, common_data=array, min_instances=EXECUTORS, delay_release=0) as session,
    ):
        while sum(one.state == "bound" for one in (await _get(client, session)).executors) < EXECUTORS:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        assert await session.invoke(None) == float(array.sum())
        found = [process.memory_full_info() for process in await asyncio.to_thread(server.executors)]
    assert len(found) == EXECUTORS
    return _Memory(sum(one.pss for one in found), sum(one.uss for one in found))


async def _get(client: Client, session: Session) -> SessionRecord:
    return await client._session.call("GET", f"/v1/sessions/{session.id}", into=SessionRecord)


def _ms(name: str, seconds: list[float], asked: str) -> Figure:
    return Figure(name, statistics.median(seconds) * 1e3, "ms (median)", asked)


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(description="Elastic sessions, beside Ray and Dask.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without Ray and Dask")
    parser.add_argument("--only", choices=["first", "throughput", "ten", "shares", "memory"])
    arguments = parser.parse_args()
    os.environ.pop("FLAME_SERVER", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers and executors go, too
    figures: list[Figure] = []
    if arguments.only in (None, "first"):
        figures += asyncio.run(first_tasks(arguments.repeat))
    if arguments.only in (None, "throughput"):
        rate, one, found = asyncio.run(throughput(arguments.repeat))
        figures += found
        if not arguments.alone:
            ray = others("ray", "ray", RAY, 5000)
            dask = others("dask", "dask[distributed]", DASK, 2000)
            if ray is not None:
                figures += [
                    Figure(f"Ray {ray['version']}: no-op tasks", ray["rate"], "tasks/s"),
                    Figure("Ray: actor calls", ray["actors"], "calls/s"),
                    Figure("Ray: one task", ray["one"] * 1e3, "ms (median)"),
                    Figure("ours / Ray's", rate / ray["rate"], "ratio", ">= 12"),
                    Figure("one task: ours / Ray's", one / ray["one"], "ratio", "< 1"),
                ]
            if dask is not None:
                figures += [
                    Figure(f"Dask {dask['version']}: no-op tasks", dask["rate"], "tasks/s"),
                    Figure("Dask: one task", dask["one"] * 1e3, "ms (median)"),
                    Figure("ours / Dask's", rate / dask["rate"], "ratio", ">= 45"),
                    Figure("one task: ours / Dask's", one / dask["one"], "ratio", "< 1"),
                ]
    if arguments.only in (None, "ten"):
        figures += asyncio.run(ten_sessions(chaos=False))
        figures += asyncio.run(ten_sessions(chaos=True))
    if arguments.only in (None, "shares"):
        figures += asyncio.run(shares())
    if arguments.only in (None, "memory"):
        figures += asyncio.run(one_copy())
    report(figures)


if __name__ == "__main__":
    main()
