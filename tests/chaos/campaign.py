"""The campaign: jobs on real servers, in each of which one thing is done to one part at one moment; and what must hold afterwards.

A *lane* is a server with what it needs (a broker, a database) and one job, which is run again and again with another case; several lanes
work side by side, because a case mostly waits. The first job of a lane is undisturbed, and its model is what all others must give.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from flame.chaos.drill import Done, Drill
from flame.chaos.plan import PHASES, Act, Deed
from flame.chaos.processes import end_all
from flame.chaos.reach import Reach
from flame.chaos.server import Part, Server
from flame.chaos.trial import our_address
from flame.client import Client, load_job
from flame.controller.lifecycle import TRANSITIONS
from flame.errors import FlameError
from flame.spec.records import Job, JobState

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "survival"))
from leftovers import Leftovers, own_mounts
from survivalkit import bits, central, load_file, tree

CHECKOUT = Path(__file__).parents[2]
ENGINES = CHECKOUT.parent / "shared" / "engines"
ACTS: tuple[Act, ...] = ("kill", "pause", "cut")
PAUSE = 10.0
ROUNDS = 5
#: Seconds within which a case must have ended, and within which nothing may be left of it.
PATIENCE = 240.0
CLEAN = 20.0
#: Cases from which on a lane more is worth its undisturbed run.
WORTHWHILE = 3

#: At which phases a role comes by itself; the moment of others is when anybody comes there.
OWN = {
    "trainer": {"start", "deploy", "distribute", "train", "upload"},
    "middle": {"start", "deploy", "distribute", "aggregate", "upload", "save"},
    "top": {"start", "deploy", "distribute", "aggregate", "save", "stop"},
    "aggregator": {"start", "deploy", "distribute", "aggregate", "save", "stop"},
}
#: What can be hit in each kind of lane.
TARGETS = {
    "central": ("server", "flamelet", "trainer", "aggregator"),
    "tree": ("server", "flamelet", "trainer", "middle", "top"),
    "mqtt": ("server", "flamelet", "trainer", "aggregator", "broker"),
    "database": ("server", "flamelet", "trainer", "aggregator", "database"),
    "docker": ("server", "flamelet", "trainer", "aggregator"),
}

#: How many numbers their models have: some go through shared memory, some through sockets.
SIZES = {"central": 200_000, "tree": 200_000, "mqtt": 200, "database": 200, "docker": 200}


class Case(NamedTuple):
    """One thing done to one part at one moment of one kind of job."""

    kind: str
    deed: Deed

    def __str__(self) -> str:
        return f"{self.kind}: {self.deed}"


def all_cases(random: Random) -> list[Case]:
    """Every kind, target, act and phase once, with rounds drawn, in an order drawn."""
    cases = [
        Case(kind, _deed(act, who, phase, random))
        for kind, targets in TARGETS.items()
        for who in targets
        for act in ACTS
        for phase in PHASES
    ]
    random.shuffle(cases)
    return cases


def _deed(act: Act, who: str, phase: str, random: Random) -> Deed:
    last = ROUNDS + 1 if phase == "save" else ROUNDS
    return Deed(
        act=act,
        who=who,
        phase=phase,
        # A trainer fetches before it knows the round, so its number is the one before.
        round=random.randint(1, last) if phase in ("train", "upload", "aggregate", "save") else random.randint(1, 4),
        seconds=PAUSE if act == "pause" else random.choice([0.0, 0.5, 2.0]),
        host=who if phase in OWN.get(who, ()) else "*",
    )


def draw(number: int, seed: int, kinds: Sequence[str] = tuple(TARGETS)) -> list[Case]:
    """So many cases: all of them, as often as it takes, each time with other rounds."""
    random = Random(seed)
    cases: list[Case] = []
    while len(cases) < number:
        cases += [case for case in all_cases(random) if case.kind in kinds]
    return cases[:number]


class Result(NamedTuple):
    """How a case went. ``faults`` is empty where all held."""

    case: Case
    done: bool
    what: str
    faults: list[str]
    seconds: float


class Unavailable(Exception):
    """What a kind of lane needs is not on this machine."""


class Program:
    """Something beside the server that may be killed and started again: a broker, a database."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self._command = command
        self._port = port
        self._log = log
        #: Variables in addition to those of this process.
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220
                self._command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the campaign, which ends them
            )
        async with asyncio.timeout(60):
            while True:
                if self._process.poll() is not None:
                    raise AssertionError(self._log.read_text()[-500:])
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mosquitto(folder: Path) -> tuple[Program, str] | None:
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    port = free_port()
    settings = folder / "mosquitto.conf"
    # As root it would become the user mosquitto, who may not write here.
    settings.write_text(f"listener {port} 127.0.0.1\nuser root\nallow_anonymous true\nmax_queued_messages 0\n")
    return Program([program, "-c", str(settings)], port, folder / "mosquitto.log"), f"127.0.0.1:{port}"


def mongo(folder: Path) -> tuple[Program, str] | None:
    if not (ENGINES / "lib.sh").exists():
        return None
    script = f'here={ENGINES}; . "{ENGINES}/lib.sh"; unpack mongo-server'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    port = free_port()
    data = folder / "mongo"
    data.mkdir()
    command = [found.stdout.strip().splitlines()[-1], "-listen", f"127.0.0.1:{port}", "-data", str(data)]
    return Program(command, port, folder / "mongo.log"), f"mongodb://127.0.0.1:{port}/flame"


def container_image() -> str:
    """This checkout's image, built unless it is there.

    :raises Unavailable: there is no Docker engine.
    """
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        raise Unavailable("no Docker engine is on this machine")
    return subprocess.run(
        [CHECKOUT / ".ci" / "image", "light"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()[-1]


class Lane:
    """A server and one job on it, again and again. To be used as a context.

    :param kind: of ``TARGETS``.
    :param folder: its own.
    :param image: what containers are made from, where its workers are containers.
    """

    def __init__(self, kind: str, folder: Path, image: str = "") -> None:
        self.kind = kind
        self.folder = folder
        folder.mkdir(parents=True)
        self.chaos = folder / "chaos"
        self.data = folder / "data"
        self.chaos.mkdir()
        self.leftovers = Leftovers(folder, self.data, self.chaos, containers=kind == "docker")
        self.reach = Reach()
        self._stack = AsyncExitStack()
        self._id = ""
        self.token: str | None = None
        self.parts: dict[str, Part] = {}
        options: list[str] = []
        overrides: list[str] = []
        if kind == "mqtt":
            broker, host = self._needs(mosquitto(folder), "mosquitto")
            self.parts["broker"] = broker
            overrides = ["backend=mqtt", f'brokers=[{{"sort": "mqtt", "host": "{host}"}}]']
        if kind == "database":
            database, url = self._needs(mongo(folder), "the engines' MongoDB")
            self.parts["database"] = database
            options = ["--db", url]
        settings: dict[str, Any] = {"restart": {"attempts": 10, "backoff": 0.1}, "rounds": ROUNDS, "size": SIZES[kind]}
        environment = self.leftovers.environment
        if kind == "docker":
            computes = folder / "computes.json"
            config = {"image": image, "pullPolicy": "never"}
            computes.write_text(json.dumps([{"name": "engine", "kind": "docker", "config": config}]))
            options = ["--computes", str(computes), "--host", our_address(), "--insecure-plain-http"]
            self.token = secrets.token_urlsafe()
            environment = {**environment, "FLAME_TOKEN": self.token}
            settings["placement"] = {role: {"realm": "engine"} for role in ("trainer", "aggregator")}
            self.chaos.chmod(0o777)  # in a container a worker is another user
        make: Callable[..., Path] = tree if kind == "tree" else central
        self.bundle = load_job(make(folder / "job", **settings), overrides)
        self.server = Server(self.data, environment, options, through=self.leftovers.through)
        self.parts["server"] = self.server
        self._expected: dict[str, dict[str, bytes]] = {}

    def _needs(self, found: tuple[Program, str] | None, name: str) -> tuple[Program, str]:
        if found is None:
            raise Unavailable(f"{name} is not on this machine")
        found[0].environment = self.leftovers.environment
        return found

    async def __aenter__(self) -> Lane:
        try:
            for part in self.parts.values():
                await part.start()
            async with Client(self.server.url, self.token) as client:
                self.reach = await self._stack.enter_async_context(Reach(await client.computes.list()))
                self._id = (await client.info()).id
            job, _ = await self._run([], Random(0))
            assert job.state is JobState.COMPLETED, job.failure
            self._expected = self._models(job.id)
            assert self._expected
            await self._clean(job.id)
            self.leftovers.learn()
        except BaseException:
            await self.__aexit__(True)
            raise
        return self

    async def __aexit__(self, fault: object = None, *_: object) -> None:
        if fault is None:
            await self.server.end()
        for part in self.parts.values():
            part.kill()
        await self.reach.remove(self._id)
        await self._stack.aclose()
        await end_all(self.chaos)

    async def run(self, case: Case, random: Random) -> Result:
        """Run the job with a case, and look at what is left."""
        began = time.monotonic()
        faults: list[str] = []
        done: list[Done] = []
        try:
            async with asyncio.timeout(PATIENCE):
                job, done = await self._run([case.deed], random)
            faults = await self._faults(job)
        except TimeoutError:
            faults = [f"not over after {PATIENCE:g} s: {await self._standing()}"]
        except FlameError as error:
            faults = [f"{type(error).__name__}: {error}"]
        what = "; ".join(one.what for one in done)
        return Result(case, all(one.done for one in done), what, faults, time.monotonic() - began)

    async def _run(self, deeds: Sequence[Deed], random: Random) -> tuple[Job, list[Done]]:
        async with Client(self.server.url, self.token) as client:
            created = await client.jobs.submit(self.bundle)
            self.job = created.id
            tasks = {task.id: (task.role, task.index) for task in await client.jobs.tasks(created.id)}
            drill = Drill(created.id, tasks, self.chaos, self.parts, random, self.reach)
            drill.wish(deeds)
            await client.jobs.start(created.id)
            ended = asyncio.Event()
            carrying = asyncio.create_task(drill.carry_out(deeds, ended))
            try:
                job = await client.jobs.wait(created.id)
                ended.set()
                return job, await carrying
            finally:
                carrying.cancel()
                await asyncio.gather(carrying, return_exceptions=True)

    async def _faults(self, job: Job) -> list[str]:
        """What does not hold of a job that has ended."""
        faults = []
        if job.state is not JobState.COMPLETED:
            faults.append(f"{job.state.value}: {job.failure or job.reason}")
        if (found := [entry.round for entry in job.rounds]) != list(range(1, ROUNDS + 1)):
            faults.append(f"rounds {found}")
        if self._models(job.id) != self._expected:
            faults.append("another model")
        faults += await self._illegal(job.id)
        return faults + await self._clean(job.id)

    async def _clean(self, job: str) -> list[str]:
        """Wait until a job has left nothing behind; gives what it still has after a while."""
        until = time.monotonic() + CLEAN
        while (left := await asyncio.to_thread(self.leftovers.of, job)) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return left

    def _models(self, job: str) -> dict[str, dict[str, bytes]]:
        return bits({path.name: load_file(path) for path in self.data.glob(f"artifacts/{job}/*.safetensors")})

    async def _illegal(self, job: str) -> list[str]:
        """Changes of state that may not be."""
        faults = []
        state, attempts = JobState.READY, dict[str, int]()
        async with Client(self.server.url, self.token) as client, aclosing(client.jobs.events(job)) as events:
            seq = 0
            async for event in events:
                seq += 1
                if event.seq != seq:
                    faults.append(f"event {event.seq} where {seq} was due")
                if event.type == "job":
                    after = JobState(event.data["state"])
                    if after is not state and after not in TRANSITIONS[state]:
                        faults.append(f"{state.value} -> {after.value}")
                    state = after
                elif event.type == "task":
                    task, attempt = event.data["task"], event.data["attempt"]
                    if attempt < attempts.get(task, 0):
                        faults.append(f"{task} went from attempt {attempts[task]} to {attempt}")
                    attempts[task] = attempt
        return faults

    async def _standing(self) -> str:
        """Where a job stands that does not end; its processes say in their logs what they are doing."""
        with contextlib.suppress(FlameError, TimeoutError):
            async with asyncio.timeout(10), Client(self.server.url, self.token) as client:
                job = await client.jobs.get(self.job)
                tasks = [
                    f"{task.role}/{task.index}.{task.attempt} {task.state.value} {task.reason or ''}"
                    for task in await client.jobs.tasks(self.job)
                ]
                return f"{job.state.value} {job.reason or ''} rounds {[entry.round for entry in job.rounds]}: {', '.join(tasks)}"
        return "the server does not answer"


class Schedule:
    """Cases that are still to be run, and who runs them.

    A lane is for one kind. Whoever is free takes up the kind of which most is left for each of its lanes, so none ends long before the others.

    :param cases: all of them.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self._left = {kind: deque(case for case in cases if case.kind == kind) for kind in TARGETS}
        self._at_work = Counter[str]()

    def choose(self) -> str | None:
        """The kind that needs another lane most; None where one more would cost more than it brings."""
        due = {kind: len(left) / (1 + self._at_work[kind]) for kind, left in self._left.items() if left}
        due = {kind: share for kind, share in due.items() if share >= WORTHWHILE or not self._at_work[kind]}
        return max(due, key=lambda kind: due[kind], default=None)

    @contextlib.contextmanager
    def take_up(self, kind: str) -> Iterator[deque[Case]]:
        """Work on a kind: what is left of it, also for its other lanes."""
        self._at_work[kind] += 1
        try:
            yield self._left[kind]
        finally:
            self._at_work[kind] -= 1


async def campaign(
    cases: Sequence[Case],
    folder: Path,
    seed: int,
    *,
    lanes: int,
    tell: Callable[[Result], None] | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Run cases, those of a kind in lanes of that kind.

    :param lanes: how many work at a time.
    :param tell: told of each result.
    :returns: the results; and what cannot be run or looked at on this machine, with the reason.
    """
    results: list[Result] = []
    skipped: dict[str, str] = {}
    if own_mounts() is None:
        skipped["named shared memory"] = "this system lets nobody have mounts of their own"
    image = ""
    if any(case.kind == "docker" for case in cases):
        try:
            image = await asyncio.to_thread(container_image)
        except Unavailable as error:
            skipped["docker"] = str(error)
    schedule = Schedule([case for case in cases if case.kind not in skipped])
    homes = itertools.count(1)

    async def work() -> None:
        while (kind := schedule.choose()) is not None:
            with schedule.take_up(kind) as left:
                home = folder / f"{kind}-{next(homes)}"
                try:
                    async with Lane(kind, home, image) as lane:
                        faults = await through(lane, left)
                except Unavailable as error:
                    skipped[kind] = str(error)
                    left.clear()
                    continue
                if not faults:
                    shutil.rmtree(home)

    async def through(lane: Lane, left: deque[Case]) -> list[str]:
        """Run cases one after another until one is lost: what is left of it must not disturb the next one."""
        while left:
            case = left.popleft()
            result = await lane.run(case, Random(f"{seed} {case}"))
            results.append(result)
            if tell is not None:
                tell(result)
            if result.faults:
                return result.faults
        return []

    async with asyncio.TaskGroup() as group:
        for _ in range(lanes):
            group.create_task(work())
    return results, skipped
