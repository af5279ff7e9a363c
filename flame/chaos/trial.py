"""One trial: a job with a plan, on a server of its own or on one that runs here, and what became of both."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import msgspec
import psutil

from flame.chaos.drill import Done, Drill
from flame.chaos.plan import PARTS, Act, Deed, read
from flame.chaos.processes import FOLDER, end_all
from flame.chaos.reach import Reach
from flame.chaos.server import Part, Running, Server
from flame.client import Client
from flame.client.config import data_dir
from flame.client.follow import insist
from flame.client.local import address
from flame.client.running import Reading
from flame.errors import FlameError, UsageError
from flame.spec.records import Job, JobState

#: How many deeds are drawn where none are given.
DRAWN = 3
_ROUNDS = 10  # of a job that does not say how many it has
_LOOK = 0.2  # seconds between two looks at where tasks are placed


class Wanted(msgspec.Struct, frozen=True):
    """A deed as the user has written it."""

    act: Act
    who: str
    seconds: float = 0.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What became of a trial.

    :ivar same_model: the model is to the bit that of an undisturbed run; None: not compared.
    """

    job: str
    state: JobState
    rounds: int
    seed: int
    deeds: list[Done]
    same_model: bool | None = None
    message: str | None = None

    @property
    def survived(self) -> bool:
        """The job has completed, and with the right model where that was looked at."""
        return self.state is JobState.COMPLETED and self.same_model is not False


class Trial:
    """A plan that is not bound to a job yet.

    :param wanted: what shall happen; empty: some kills are drawn.
    :param seed: for all that is left open.
    :param say: told what is done as it is done.
    """

    def __init__(self, wanted: Sequence[Wanted], seed: int, say: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._seed = seed
        self._say = say

    async def of_files(
        self, path: str, overrides: Sequence[str], *, compare: bool, computes: Path | None = None
    ) -> Outcome:
        """Try a job from its files, on a private server that leaves nothing behind.

        :param compare: run it without a disturbance first, and compare the models.
        :param computes: a file with the server's computes, beside this machine. The server then listens on this machine's address in the network, with a token.
        """
        reading = Reading(path, overrides)
        async with _private(computes) as ground:
            client = ground.client
            bundle = await reading.finish(client)
            expected = None
            if compare:
                self._say("running it without a disturbance")
                ended, _ = await self._run(ground, await client.jobs.submit(bundle), [])
                expected = _models(ended)
            created = await client.jobs.submit(bundle)
            ended, done = await self._run(ground, created, self._plan(created, await _roles(client, created)))
            return self._outcome(ended, done, None if expected is None else expected == _models(ended))

    async def of_job(self, id: str) -> Outcome:
        """Try a job of the server that runs on this machine.

        :param id: of a job that waits to be started, or is under way.
        :raises flame.errors.UsageError: no such server runs here, or it was not started for that.
        """
        server, folder = _running_here()
        async with Client(server.url) as client:
            job = await client.jobs.get(id)
            if job.state.ended:
                raise UsageError(f"Job {id} has ended ({job.state.value}); there is nothing to disturb any more.")
            deeds = self._plan(job, await _roles(client, job))
            async with await _reach(client, folder) as reach, _stopped_at_last(client, job.id):
                ended, done = await self._run(_Ground(client, server, folder, reach), job, deeds)
            return self._outcome(ended, done, None)

    def _outcome(self, job: Job, done: list[Done], same: bool | None) -> Outcome:
        message = job.failure.message if job.failure is not None else job.reason
        return Outcome(
            job=job.id,
            state=job.state,
            rounds=len(job.rounds),
            seed=self._seed,
            deeds=done,
            same_model=same,
            message=message,
        )

    def _plan(self, job: Job, roles: set[str]) -> list[Deed]:
        random = Random(self._seed)
        asked = job.form.model_spec.hyperparameters.get("rounds") if job.form.model_spec is not None else None
        rounds = asked if isinstance(asked, int) and asked > 0 else _ROUNDS
        known = [*sorted(roles), "server", "flamelet"]
        wanted = self._wanted or [Wanted("kill", random.choice(known)) for _ in range(DRAWN)]
        deeds = [read(one.act, one.who, random, rounds=rounds, seconds=one.seconds) for one in wanted]
        for deed in deeds:
            if deed.who not in known:
                hint = " Kill it by hand." if deed.who in PARTS else ""
                raise UsageError(f"The job has no {deed.who} that could be hit. There are: {', '.join(known)}.{hint}")
        return deeds

    async def _run(self, ground: _Ground, job: Job, deeds: Sequence[Deed]) -> tuple[Job, list[Done]]:
        client = ground.client
        tasks = {task.id: (task.role, task.index) for task in await client.jobs.tasks(job.id)}
        parts = {"server": ground.server}
        drill = Drill(job.id, _numbered(tasks), ground.folder, parts, Random(self._seed), ground.reach, self._say)
        for deed in deeds:
            self._say(f"planned: {deed}")
        drill.wish(deeds)
        if job.state is JobState.READY:
            await client.jobs.start(job.id)
        ended = asyncio.Event()
        checking = asyncio.create_task(_check(ground, job.id, deeds))
        carrying = asyncio.create_task(drill.carry_out(deeds, ended))
        waiting = asyncio.create_task(client.jobs.wait(job.id))
        holding = asyncio.create_task(ground.reach.hold(job.id, ground.folder))
        all_work: set[asyncio.Task[Any]] = {checking, carrying, waiting, holding}
        try:
            under_way = all_work
            while waiting in under_way:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            ended.set()
            return waiting.result(), await carrying
        finally:
            for task in all_work:
                task.cancel()
            await asyncio.gather(*all_work, return_exceptions=True)


class _Ground(NamedTuple):
    """Where a trial is made.

    :ivar folder: what the server has as ``FLAME_CHAOS``.
    """

    client: Client
    server: Part
    folder: Path
    reach: Reach


@contextlib.asynccontextmanager
async def _private(computes: Path | None) -> AsyncIterator[_Ground]:
    """A server of one's own. Nothing of it is left in the end, nor of its workers."""
    token, options = None, list[str]()
    if computes is not None:
        token = secrets.token_urlsafe()
        options = ["--computes", str(computes.absolute()), "--host", our_address(), "--insecure-plain-http"]
    with tempfile.TemporaryDirectory(prefix="flame-chaos-") as scratch:
        folder = Path(scratch) / "points"
        folder.mkdir()
        environment = {FOLDER: str(folder)} | ({"FLAME_TOKEN": token} if token is not None else {})
        server = Server(Path(scratch) / "data", environment, options)
        try:
            await server.start()
            async with Client(server.url, token) as client:
                identity = (await client.info()).id
                async with await _reach(client, folder) as reach:
                    try:
                        yield _Ground(client, server, folder, reach)
                    finally:
                        await server.end()
                        await reach.remove(identity)
        finally:
            await server.end()
            await end_all(folder)  # the workers of a trial that was broken off


def our_address() -> str:
    """The address of this machine at which containers and other machines find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; only the route is looked up
        except OSError:
            return "127.0.0.1"  # no network: only this machine's own processes, and containers in the host's network
        return str(probe.getsockname()[0])


async def _reach(client: Client, folder: Path) -> Reach:
    reach = Reach(await client.computes.list())
    if reach.elsewhere:
        folder.chmod(0o777)  # in a container a worker is another user, who takes wishes all the same
    return reach


async def _check(ground: _Ground, job: str, deeds: Sequence[Deed]) -> None:
    """Once all tasks have a compute: whether the deeds can be done there.

    :raises flame.errors.UsageError: one cannot.
    """
    while True:
        tasks = await insist(lambda: ground.client.jobs.tasks(job))
        if all(task.compute is not None for task in tasks):
            break
        await asyncio.sleep(_LOOK)
    for deed in deeds:
        ground.reach.check_moment(deed.phase, [task for task in tasks if deed.host in ("*", task.role)])
        if deed.who != "server":
            ground.reach.check_target(deed.who, [task for task in tasks if deed.who in ("flamelet", task.role)])


@contextlib.asynccontextmanager
async def _stopped_at_last(client: Client, job: str) -> AsyncIterator[None]:
    """A trial that is interrupted stops its job, so that nothing goes on that nobody watches."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(FlameError, TimeoutError):  # the server may be away; what interrupted the trial counts
            await client.jobs.stop(job)
            async with asyncio.timeout(15):
                await client.jobs.wait(job)
        raise


async def _roles(client: Client, job: Job) -> set[str]:
    return {task.role for task in await client.jobs.tasks(job.id)}


def _numbered(tasks: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """Tasks with their numbers within their roles, from 0, in the order in which the job has them."""
    numbers: dict[str, int] = {}
    found = {}
    for task, (role, _) in sorted(tasks.items(), key=lambda item: item[1][1]):
        found[task] = (role, numbers.get(role, 0))
        numbers[role] = numbers.get(role, 0) + 1
    return found


def _running_here() -> tuple[Running, Path]:
    try:
        url, pid = address((data_dir() / "server.json").read_bytes())
        folder = psutil.Process(pid).environ().get(FOLDER)
    except (OSError, ValueError, psutil.Error):
        raise UsageError(
            "No server runs in the data directory of this machine. Give the job's files instead of its id: it gets a server of its own."
        ) from None
    if folder is None:
        raise UsageError(
            "The server was not started for trials: its workers do not stop at points. "
            "Start it with FLAME_CHAOS=FOLDER in its environment, or give the job's files instead of its id."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Running(data_dir(), url, pid), Path(folder)


def _models(job: Job) -> dict[str, bytes]:
    """What the job has learned: the tensors, without what else is told in their files."""
    found = {}
    for model in job.models or filter(None, [job.model]):
        if model.path is not None:
            body = Path(model.path).read_bytes()
            found[model.group or ""] = body[8 + int.from_bytes(body[:8], "little") :]
    return found
