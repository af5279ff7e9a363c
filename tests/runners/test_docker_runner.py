"""The Docker runner, on a real engine: what only containers have. What every kind of runner promises is in test_contract.py."""

import asyncio
import contextlib
import gc
import signal
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from waiting import until

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
from places import IMAGE, DockerPlace, limited, no_docker, place
from private_docker import PrivateEngine
from test_environments import make_wheel

from flame.errors import RunnerError, SpecError
from flame.runners import Runner, WorkerExit, WorkerInfo, read_config

if missing := no_docker():
    pytest.skip(missing, allow_module_level=True)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[DockerPlace]:
    somewhere = place("docker", tmp_path)
    assert isinstance(somewhere, DockerPlace)
    yield somewhere
    await somewhere.close()

    async def empty() -> bool:
        return not await somewhere.containers()

    await until(empty)  # one may be on its way out


@pytest.fixture
def unreachable_engines() -> Iterator[None]:
    """The SDK leaves it to the garbage collector to close a socket that could not be connected."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


lost = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


async def ended(there: DockerPlace) -> tuple[WorkerInfo, WorkerExit]:
    await until(lambda: bool(there.exits))
    assert len(there.exits) == 1
    return there.exits[0]


# ------------------------------------------------------------------------------------------------- what is told


async def test_a_container_that_is_out_of_memory_says_so(engine: DockerPlace) -> None:
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", "eat", **limited("64Mi")))
    told = WorkerExit(None, "SIGKILL", "Its container was killed: it was out of memory, of which it may use 64Mi.")
    assert await ended(engine) == (worker, told)


async def test_a_container_that_somebody_removes_says_so(engine: DockerPlace) -> None:
    runner = await engine.open()
    worker = await runner.start(engine.spec("a"))
    await engine.ready(runner, worker)
    await engine.docker("rm", "--force", worker.handle)
    assert await ended(engine) == (worker, WorkerExit(None, None, "Its container was removed by somebody."))
    assert list(await runner.list()) == []


async def test_a_container_that_somebody_restarts_is_not_taken_for_the_same_attempt(engine: DockerPlace) -> None:
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", "polite"))
    await engine.ready(runner, worker)
    await engine.docker("restart", "--time", "1", worker.handle)
    reported, how = await ended(engine)
    assert reported == worker
    # Which of the two is seen depends on how far it was when it was looked at; a second run ends at once, since it is told nothing.
    assert how.exit_code in (3, 2) or "started anew by somebody" in (how.message or "")


async def test_a_container_that_somebody_stops_says_so(engine: DockerPlace) -> None:
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", "polite"))
    await engine.ready(runner, worker)
    await engine.docker("stop", worker.handle)
    message = "Its container was ended by SIGTERM: by somebody, or by the Docker engine as that shut down."
    assert await ended(engine) == (worker, WorkerExit(3, None, message))


@pytest.mark.parametrize("policy", ["missing", "never", "always"])
async def test_an_image_that_is_not_there_is_named(engine: DockerPlace, policy: str) -> None:
    engine.config["pullPolicy"] = policy
    runner = await engine.open()
    with pytest.raises(RunnerError, match="'localhost:1/no/such:image' is not on the Docker engine"):
        await runner.start(engine.spec("a", image="localhost:1/no/such:image"))
    assert list(await runner.list()) == []


async def test_an_image_without_an_interpreter_says_what_is_missing(engine: DockerPlace) -> None:
    engine.config["python"] = "/no/such/python"
    runner = await engine.open()
    worker = await runner.start(engine.spec("a"))
    reported, how = await ended(engine)
    assert (reported, how.exit_code) == (worker, 127)
    assert "/no/such/python: not found" in await engine.printed(runner, worker)


async def test_a_container_that_cannot_be_made_says_why_and_leaves_nothing(engine: DockerPlace) -> None:
    engine.config["network"] = "no-such-network"
    runner = await engine.open()
    with pytest.raises(RunnerError, match="no-such-network"):
        await runner.start(engine.spec("a"))
    assert await engine.containers() == []


@lost
@pytest.mark.usefixtures("unreachable_engines")
async def test_an_engine_that_is_not_there_is_named(tmp_path: Path) -> None:
    nowhere = place("docker", tmp_path, host=f"unix://{tmp_path}/none.sock")
    with pytest.raises(RunnerError, match=r"The Docker engine at unix://.*/none.sock does not answer: No such file"):
        await nowhere.open()


# --------------------------------------------------------------------------------------------- what is configured


async def test_a_worker_has_its_limits_its_user_and_no_capabilities(engine: DockerPlace) -> None:
    engine.config |= {"cpu": 0.5, "memory": "96Mi", "processes": 64, "sharedMemory": "16Mi", "labels": {"team": "a"}}
    engine.config |= {"user": "1234", "secrets": {"PASSWORD": "deep"}}
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", "tell=PASSWORD,FLAME_WORK_DIR"))
    await engine.ready(runner, worker)
    assert "'PASSWORD': 'deep', 'FLAME_WORK_DIR': '/flame/work'" in await engine.printed(runner, worker)
    assert "deep" not in await engine.shown(worker)
    limits = "{{.HostConfig.NanoCpus}} {{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.PidsLimit}}"
    said = await engine.docker("inspect", "--format", limits, worker.handle)
    assert said.split() == ["500000000", str(96 << 20), str(96 << 20), "64"]
    status = await engine.docker("exec", worker.handle, "sh", "-c", "id -u; grep CapEff /proc/self/status; df /dev/shm")
    user, capabilities, *_, shm = status.strip().splitlines()
    assert (user, capabilities.split()[1], shm.split()[1]) == ("1234", "0" * 16, "16384")
    assert 'team":"a"' in (await engine.docker("inspect", "--format", "{{json .Config.Labels}}", worker.handle))


async def test_what_a_job_asks_for_counts_before_what_the_compute_gives(engine: DockerPlace) -> None:
    engine.config["memory"] = "96Mi"
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", **limited("128Mi")))
    assert (await engine.docker("inspect", "--format", "{{.HostConfig.Memory}}", worker.handle)).strip() == str(
        128 << 20
    )


async def test_the_engine_says_what_it_has(engine: DockerPlace) -> None:
    runner = await engine.open()
    capacity = await runner.capacity()
    cores, memory = (await engine.docker("info", "--format", "{{.NCPU}} {{.MemTotal}}")).split()
    assert (capacity.cpu, capacity.memory, capacity.gpu, capacity.slots) == (float(cores), int(memory), None, None)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "image"),
        ({"image": ""}, "image"),
        ({"image": "a", "memory": "many"}, "memory"),
        ({"image": "a", "volumes": ["/data"]}, "volumes"),
        ({"image": "a", "pullPolicy": "sometimes"}, "pullPolicy"),
        ({"image": "a", "environment": {"A B": "c"}}, "environment"),
        ({"image": "a", "tls": {"ca": "a", "cert": "b", "key": "c"}}, "tls"),
        ({"image": "a", "credentials": {"username": "me", "password": 3}}, "password"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_when_it_is_registered(
    config: dict[str, object], complaint: str
) -> None:
    with pytest.raises(SpecError, match=complaint):
        read_config("docker", config)


# ------------------------------------------------------------------------------------------------- dependencies


async def test_dependencies_are_installed_once_and_cannot_be_written_to(engine: DockerPlace, tmp_path: Path) -> None:
    engine.config["image"] = engines.docker_image()
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "leaf")
    engine.config["volumes"] = [*engine.config["volumes"], f"{wheels}:/wheels:ro"]
    leaf = f"leaf @ file:///wheels/{next(wheels.iterdir()).name}"
    runner = await engine.open()
    workers = await asyncio.gather(
        *(runner.start(engine.spec(task, "import=leaf", dependencies=[leaf])) for task in ("a", "b"))
    )
    await engine.ready(runner, *workers)
    try:
        for worker in workers:
            assert "/flame-packages/" in await engine.printed(runner, worker)
        mounts = '{{range .Mounts}}{{if eq .Destination "/flame-packages"}}{{.Name}} {{.RW}}{{end}}{{end}}'
        volumes = {await engine.docker("inspect", "--format", mounts, worker.handle) for worker in workers}
        assert len(volumes) == 1
        assert volumes.pop().split()[1] == "false"
    finally:
        await asyncio.gather(*(runner.end(worker, grace=0) for worker in workers))
        label = f"label=flame.requirements={leaf}"
        for volume in (await engine.docker("volume", "ls", "--quiet", "--filter", label)).split():
            await engine.docker("volume", "rm", volume)


async def test_what_the_image_has_is_not_installed_again(engine: DockerPlace) -> None:
    engine.config["image"] = engines.docker_image()
    runner = await engine.open()
    worker = await runner.start(engine.spec("a", "import=numpy", dependencies=["numpy"]))
    await engine.ready(runner, worker)
    assert "/opt/flame/" in await engine.printed(runner, worker)
    assert await engine.docker("volume", "ls", "--quiet", "--filter", "label=flame.requirements=numpy") == ""


async def test_dependencies_that_do_not_exist_are_named(engine: DockerPlace) -> None:
    engine.config |= {"image": engines.docker_image(), "environment": {"PIP_NO_INDEX": "1"}}
    runner = await engine.open()
    with pytest.raises(RunnerError, match="no-such-package"):
        await runner.start(engine.spec("a", dependencies=["no-such-package"]))
    assert await engine.containers() == []
    volumes = await engine.docker("volume", "ls", "--quiet", "--filter", "label=flame.requirements=no-such-package")
    assert volumes == ""


# ---------------------------------------------------------------------------------- servers that come and go


async def test_what_ended_while_no_server_was_there_is_told_to_the_next(engine: DockerPlace) -> None:
    runner = await engine.open()
    workers = [await runner.start(engine.spec(task)) for task in ("a", "b")]
    await engine.ready(runner, *workers)
    await runner.close()
    await engine.kill(workers[0], "SIGKILL")
    await engine.docker("wait", workers[0].handle)

    again = await engine.open()
    assert sorted(await again.list()) == sorted(workers)
    assert await ended(engine) == (workers[0], WorkerExit(None, "SIGKILL"))  # who has sent it, nobody has heard
    assert list(await again.list()) == [workers[1]]


async def test_what_a_killed_server_had_only_begun_to_make_is_removed(engine: DockerPlace) -> None:
    labels = {"instance": engine.instance, "job": "job1", "task": "a", "attempt": "1"}
    flags = [word for name, value in labels.items() for word in ("--label", f"flame.{name}={value}")]
    name = f"flame-{engine.instance[:12]}-a-1"
    await engine.docker("create", "--name", name, *flags, IMAGE, "true")
    await engine.docker("create", "--label", f"flame.instance={engine.instance}", IMAGE, "true")  # an installation
    runner = await engine.open()
    worker = await runner.start(engine.spec("a"))  # its name is taken
    await engine.ready(runner, worker)
    assert list(await runner.list()) == [worker]
    assert len(await engine.containers()) == 1


# ------------------------------------------------------------------------------------------- engines that come and go


@contextlib.asynccontextmanager
async def private_engine(
    folder: Path, *, live_restore: bool
) -> AsyncIterator[tuple[PrivateEngine, DockerPlace, Runner]]:
    private = PrivateEngine(folder, live_restore=live_restore)
    await private.start()
    try:
        await private.load(IMAGE)
        there = place("docker", folder / "server", host=f"unix://{private.socket}", network="host")
        assert isinstance(there, DockerPlace)
        try:
            yield private, there, await there.open()
        finally:
            await there.close()
    finally:
        await private.close()


@lost
@pytest.mark.usefixtures("unreachable_engines")
async def test_workers_that_a_restarted_engine_has_ended_are_told_with_the_cause(tmp_path: Path) -> None:
    async with private_engine(tmp_path, live_restore=False) as (private, there, runner):
        workers = [await runner.start(there.spec(task, "polite")) for task in ("a", "b")]
        await there.ready(runner, *workers)
        await private.end(signal.SIGTERM)
        with pytest.raises(RunnerError, match="does not answer"):
            await runner.capacity()
        await private.start()
        await until(lambda: len(there.exits) == 2)
        assert sorted(worker for worker, _ in there.exits) == sorted(workers)
        for _, how in there.exits:
            assert how.exit_code == 3
            # The one if the engine could still tell of it, the other if not.
            assert how.message in (
                "Its container was ended by SIGTERM: by somebody, or by the Docker engine as that shut down.",
                "Its container ended while the Docker engine was away; the engine was restarted, perhaps (exit code 3).",
            )
        assert list(await runner.list()) == []
        await there.ready(runner, await runner.start(there.spec("c")))  # it is of use again


@lost
@pytest.mark.usefixtures("unreachable_engines")
async def test_workers_that_outlive_a_killed_engine_are_kept_and_followed_on(tmp_path: Path) -> None:
    async with private_engine(tmp_path, live_restore=True) as (private, there, runner):
        workers = [await runner.start(there.spec(task)) for task in ("a", "b")]
        await there.ready(runner, *workers)
        await private.end(signal.SIGKILL)
        await private.start()

        async def found_again() -> bool:
            return sorted(await runner.list()) == sorted(workers)

        await until(found_again)
        assert there.exits == []
        await until(lambda: len(there.news) == 4)  # meanwhile it was said why nothing was heard of them
        assert all("Docker engine" in (message or "") for _, message in there.news[:2])
        assert sorted(there.news[2:]) == sorted((worker, None) for worker in workers)
        await there.kill(workers[0], "SIGKILL")
        reported, how = await ended(there)
        assert (reported, how.signal) == (workers[0], "SIGKILL")
