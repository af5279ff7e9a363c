"""Two thousand idle flamelets on one server: what each connection costs, how soon all of them hear, how soon all are back.

The job is one for 2,001 participants. Two thousand of them take their places and wait, each with its event stream open and its
lease renewed, as flamelets do: twenty are flamelets, the rest are connections of a few processes that speak the same protocol with the same
client. Then the server is killed and started again; and when all are back, the last participant comes, and everybody is told to
start at once. ``python -m benchmarks.idle_flamelets [FLAMELETS]``.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing

import psutil

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.client import Client, load_job
from flame.client.follow import Backoff, insist
from flame.client.http import Session
from flame.client.participant import Participant
from flame.errors import FlameError, ServerError
from flame.spec.records import JobState, Seat

FLAMELETS = 2000
REAL = 20
PROCESSES = 4
#: What an operator with so many idle workers sets: each renews its lease four times within one, and a silent one is noticed after it.
LEASE = 60


# ------------------------------------------------------------------------------- the processes of connections


async def one(server: str, seat: list[str], say: Callable[[str], None], started: asyncio.Event) -> None:
    """One connection: follow the task's events, come back whenever the server was away, until it says ``start``."""
    task, key = seat
    path, query = f"/v1/tasks/{task}", {"attempt": 1}
    async with Session(server, key) as session:

        async def renew() -> None:
            while True:
                granted = await insist(
                    lambda: session.call("POST", f"{path}/lease", query=query, into=dict[str, float])
                )
                await asyncio.sleep(granted["seconds"] / 4)

        async def follow() -> None:
            backoff = Backoff()
            while True:
                try:
                    async with session.open("GET", f"{path}/events", query={**query, "after": 0}) as answer:
                        say("there")
                        async for line in answer.lines():
                            backoff.succeeded()
                            if b'"start"' in line:
                                say("start")
                                started.set()
                                return
                    raise ServerError("it closed the stream")
                except FlameError as error:
                    await backoff.failed(error)

        renewing = asyncio.create_task(renew())
        try:
            await follow()
            await started.wait()
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)


async def connections() -> None:
    """All connections of this process; says on stdout how many are there, or were told to start, with the time."""
    given = json.loads(sys.stdin.readline())
    counts = {"there": 0, "start": 0}
    loop = asyncio.get_running_loop()
    pending: list[asyncio.TimerHandle] = []

    def tell() -> None:
        pending.clear()
        print(json.dumps({**counts, "time": time.time()}), flush=True)

    def say(what: str) -> None:
        counts[what] += 1
        if not pending:
            pending.append(loop.call_later(0.01, tell))

    await asyncio.gather(*(one(given["server"], seat, say, asyncio.Event()) for seat in given["seats"]))
    await asyncio.sleep(0.05)


# --------------------------------------------------------------------------------------------- the benchmark


class Crowd:
    """The processes of connections, and what they have said."""

    def __init__(self, server: str) -> None:
        self.news = asyncio.Event()
        self._server = server
        self._said: list[dict[str, float]] = []
        self._processes: list[asyncio.subprocess.Process] = []
        self._readers: list[asyncio.Task[None]] = []

    async def add(self, seats: list[Seat]) -> None:
        """Start one more process; its connections are made at once."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.idle_flamelets", "--connections"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        mine = [[seat.task, seat.key] for seat in seats]
        process.stdin.write(json.dumps({"server": self._server, "seats": mine}).encode() + b"\n")
        self._said.append({"there": 0, "start": 0, "time": 0.0})
        self._readers.append(asyncio.create_task(self._read(len(self._processes), process)))
        self._processes.append(process)

    async def _read(self, number: int, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self._said[number] = json.loads(line)
            self.news.set()

    async def until(self, what: str, count: int) -> float:
        """Wait until so many have said it; gives the time of the last word."""
        while sum(said[what] for said in self._said) < count:
            self.news.clear()
            async with asyncio.timeout(300):
                await self.news.wait()
            if any(process.returncode for process in self._processes):
                raise SystemExit("a process of connections has failed")
        return max(said["time"] for said in self._said)

    async def end(self) -> None:
        """See them off."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
        await asyncio.gather(*self._readers)


class Server:
    """``flame serve``, to be killed and started again."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes]

    def start(self) -> str:
        """Start it; gives its address."""
        environment = os.environ | {"FLAME_CONFIG": str(self.folder / "config.yaml")}
        words = ["serve", "--port", "0", "--data-dir", str(self.folder / "data"), "--lease", str(LEASE)]
        command = [sys.executable, "-m", "flame", *words]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        place = self.folder / "data" / "server.json"
        while True:
            try:
                said = json.loads(place.read_text())
            except (OSError, ValueError):
                said = {}
            if said.get("pid") == self.process.pid:
                return str(said["url"])
            if self.process.poll() is not None:
                raise SystemExit((self.folder / "log").read_text()[-3000:])
            time.sleep(0.02)

    def kill(self) -> None:
        """As a machine does that loses its power."""
        self.process.kill()
        self.process.wait()

    @property
    def processor(self) -> float:
        """Seconds of a processor that it has used since it was started."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def memory(self) -> float:
        """Bytes that are its own."""
        return float(psutil.Process(self.process.pid).memory_full_info().uss)


async def seats(url: str, client: Client, job: str, count: int) -> tuple[list[Seat], str]:
    """Take places, a hundred with each invite; and an invite for one more."""

    async def some(uses: int) -> list[Seat]:
        invite = await client.invites.create(job, uses=uses)
        async with Participant(url, invite.token or "") as me:
            return [await me.seat(secrets.token_urlsafe(32), f"participant {number}", None) for number in range(uses)]

    hundreds = [min(100, count - first) for first in range(0, count, 100)]
    taken = await asyncio.gather(*(some(uses) for uses in hundreds))
    last = await client.invites.create(job)
    return [seat for some in taken for seat in some], last.token or ""


def flamelet(url: str, seat: Seat, folder: pathlib.Path) -> subprocess.Popen[bytes]:
    """A real flamelet, as ``flame join`` starts it."""
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
    environment |= {"FLAME_SERVER": url, "FLAME_TASK": seat.task, "FLAME_TASK_KEY": seat.key or ""}
    environment |= {"FLAME_ATTEMPT": str(seat.attempt), "FLAME_WORK_DIR": str(folder)}
    return subprocess.Popen([sys.executable, "-P", "-m", "flame.flamelet"], env=environment, cwd=folder)


async def run(folder: pathlib.Path, count: int) -> list[Figure]:
    """The whole course."""
    server = Server(folder)
    url = server.start()
    job_folder = no_op_job(folder / "job", trainers=0, rounds=1)
    description = json.loads((job_folder / "job.json").read_text())
    description["dataSpec"] = [{"role": "trainer", "fromUser": {"default": count + 1}}]
    del description["datasets"]
    (job_folder / "job.json").write_text(json.dumps(description))
    for role in ("trainer", "aggregator"):
        (job_folder / "code" / role / "main.py").write_text("import time\ntime.sleep(600)\n")
    real: list[subprocess.Popen[bytes]] = []
    crowd = None
    try:
        async with Client(url) as client:
            job = await client.jobs.submit(load_job(job_folder))
            await client.jobs.start(job.id)
            async with aclosing(client.jobs.events(job.id, follow=True)) as events:
                async for event in events:
                    if event.type == "job" and event.data["state"] == JobState.DEPLOYING.value:
                        break
            crowd = Crowd(url)
            taken: list[Seat] = []
            claiming = connected = used = memory = 0.0
            while len(taken) < count:
                began = time.perf_counter()
                some, token = await seats(url, client, job.id, min(count - len(taken), -(-count // PROCESSES)))
                claiming += time.perf_counter() - began
                before, busy, began = server.memory, server.processor, time.time()
                if not taken:
                    first, some = some[:REAL], some[REAL:]
                    real = [flamelet(url, seat, folder / "real" / seat.task) for seat in first]
                    taken += first
                taken += some
                await crowd.add(some)
                connected += await crowd.until("there", len(taken) - REAL) - began
                memory += server.memory - before
                used += server.processor - busy
            server.kill()
            began = time.time()
            server.start()
            listening, starting = time.time() - began, server.processor
            back = await crowd.until("there", 2 * (count - REAL)) - began
            returning = server.processor
            began = time.time()
            async with Participant(url, token) as last:
                await last.seat(secrets.token_urlsafe(32), "the last", None)
            told = await crowd.until("start", count - REAL) - began
            telling = server.processor - returning
            started = 0
            async with asyncio.timeout(120):
                while started < REAL:
                    started = sum((folder / "real" / seat.task / "started").exists() for seat in taken[:REAL])
                    await asyncio.sleep(0.02)
            await client.jobs.stop(job.id)
    finally:
        if crowd is not None:
            await crowd.end()
        for process in real:
            process.kill()
            process.wait()
        server.kill()
    return [
        Figure("flamelets", count, "connections"),
        Figure("memory of the server for each", memory / count / 1000, "kB"),
        Figure("until all have an event, from what caused it", told, "s", "< 2"),
        Figure("until all are back, from the kill of the server", back, "s", "< 10"),
        Figure("until the new server listens", listening, "s"),
        Figure("processor time of the server: for the event", telling, "s"),
        Figure("processor time of the server: until it listens again", starting, "s"),
        Figure("processor time of the server: until all are back", returning, "s"),
        Figure("processor time of the server: when all come at first", used, "s"),
        Figure("until all were there at first", connected, "s"),
        Figure("until all had taken their places", claiming, "s"),
    ]


def main() -> None:
    """Run the benchmark, or be one of its processes of connections."""
    if sys.argv[1:] == ["--connections"]:
        asyncio.run(connections())
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else FLAMELETS
    with tempfile.TemporaryDirectory() as folder:
        report(asyncio.run(run(pathlib.Path(folder), count)))


if __name__ == "__main__":
    main()
