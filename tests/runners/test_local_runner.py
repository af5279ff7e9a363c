"""The local runner, with real processes: what it promises beyond the contract of every kind (test_contract.py)."""

import asyncio
import contextlib
import os
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from waiting import until

sys.path.insert(0, str(Path(__file__).parent))
from test_environments import make_wheel

from flame.errors import RunnerError, SpecError, UsageError
from flame.runners import WorkerExit, WorkerInfo, WorkerSpec, local, make_runner, processes, runner_for
from flame.runners.cgroups import Group, Limits, group_of, host_limits, make_group
from flame.runners.host import SLOTS_PER_CORE
from flame.runners.local import LocalConfig, LocalRunner
from flame.spec.nouns import Resources

# Stands for the flamelet: does what BEHAVIOUR says, and tells that it runs by a file in its working directory.
WORKER = textwrap.dedent(
    """
    import os, pathlib, signal, subprocess, sys, time
    behaviour = os.environ.get("BEHAVIOUR", "wait")
    ready = pathlib.Path(os.environ["FLAME_WORK_DIR"], "ready")
    print("worker", os.environ["FLAME_TASK"], flush=True)
    if "family" in behaviour:
        sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
        subprocess.Popen(sleep)
        subprocess.Popen(sleep, process_group=0)
        subprocess.Popen(sleep, start_new_session=True)
        bare = {name: value for name, value in os.environ.items() if name != "FLAME_WORKER"}
        subprocess.Popen(sleep, process_group=0, env=bare)
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "polite" in behaviour:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    ready.with_suffix(".part").write_text(str(os.getpid()))
    ready.with_suffix(".part").rename(ready)
    if "eat" in behaviour:
        eaten = [bytearray(b"x" * (1 << 20)) for _ in range(200)]
    if "exit" in behaviour:
        sys.exit(int(behaviour.split("=")[1]))
    if "sig" in behaviour:
        os.kill(os.getpid(), int(behaviour.split("=")[1]))
    time.sleep(1000)
    """
)


class Harness:
    """A runner whose workers run ``fake_flamelet``, and everything it reported."""

    def __init__(self, tmp_path: Path, **config: object) -> None:
        self.data_dir = tmp_path / "data"
        self.instance = uuid.uuid4().hex
        self.code = tmp_path / "code"
        self.code.mkdir(exist_ok=True)
        (self.code / "fake_flamelet.py").write_text(WORKER)
        self.config = {"environment": {"PYTHONPATH": str(self.code)}, **config}
        self.exits: list[tuple[WorkerInfo, WorkerExit]] = []
        self.changed = asyncio.Condition()
        self.runners: list[LocalRunner] = []
        self.seen: set[psutil.Process] = set()

    async def open(self) -> LocalRunner:
        runner = make_runner("local", self.config, instance=self.instance, data_dir=self.data_dir)
        assert isinstance(runner, LocalRunner)
        await runner.open(lambda worker, how: self.exits.append((worker, how)))
        self.runners.append(runner)
        return runner

    def spec(self, task: str, behaviour: str = "wait", attempt: int = 1) -> WorkerSpec:
        environment = {"FLAME_TASK": task, "FLAME_TASK_KEY": f"secret-{task}", "FLAME_ATTEMPT": str(attempt)}
        return WorkerSpec(task, "job1", attempt, {**environment, "BEHAVIOUR": behaviour}, module="fake_flamelet")

    async def ready(self, *workers: WorkerInfo) -> None:
        paths = [self.data_dir / "workers" / f"{worker.task}.{worker.attempt}" / "ready" for worker in workers]
        await until(lambda: all(path.exists() for path in paths))

    def processes(self) -> list[psutil.Process]:
        """All processes of this harness, by the mark or by their parents."""
        marked = [found.process for found in processes.scan() if (found.mark or "").startswith(self.instance)]
        family = {*marked, *(child for process in marked for child in descendants(process))}
        self.seen |= family
        return list(family)


def descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, 0)[0] == pid
    except ChildProcessError:
        return False


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    harness = Harness(tmp_path)
    yield harness
    for runner in harness.runners:
        await runner.close()
    harness.processes()
    for process in harness.seen:  # also what a failed test left without its mark
        with contextlib.suppress(psutil.Error):
            process.kill()
            reap(process.pid)


@pytest.fixture(params=["pidfd", "threads"])
def each_way_of_watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "threads":
        monkeypatch.setattr(processes, "_pidfd_open", None)


@pytest.mark.usefixtures("each_way_of_watching")
@pytest.mark.parametrize(
    ("behaviour", "how"),
    [
        ("exit=0", WorkerExit(0, None)),
        ("exit=7", WorkerExit(7, None)),
        ("sig=9", WorkerExit(None, "SIGKILL")),
        ("sig=11", WorkerExit(None, "SIGSEGV")),
    ],
)
async def test_an_exit_is_reported_once_with_its_code(harness: Harness, behaviour: str, how: WorkerExit) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a", behaviour))
    await until(lambda: bool(harness.exits))
    assert harness.exits == [(worker, how)]
    assert list(await runner.list()) == []
    await runner.end(worker)
    await runner.close()
    assert len(harness.exits) == 1
    assert not reap(int(worker.handle))  # no zombie is left


@pytest.mark.parametrize("behaviour", ["family", "family stubborn"])
async def test_ending_a_worker_ends_all_its_descendants(harness: Harness, behaviour: str) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a", behaviour))
    await harness.ready(worker)
    assert len(family := harness.processes()) == 5
    await runner.end(worker, grace=0.2)
    assert not [process for process in family if processes.is_alive(process)]
    assert harness.processes() == []


async def test_what_a_killed_worker_leaves_behind_is_ended_before_it_is_reported(harness: Harness) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a", "family"))
    await harness.ready(worker)
    family = harness.processes()
    os.kill(int(worker.handle), 9)
    await until(lambda: bool(harness.exits))
    assert not [process for process in family if processes.is_alive(process)]


async def test_a_worker_whose_dependencies_take_their_time_is_said_to_wait_for_them(
    harness: Harness, tmp_path: Path
) -> None:
    wheel = Path(urlsplit(make_wheel(tmp_path / "wheels", "flametestone").split(" @ ")[1]).path)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await may_answer.wait()
        body = wheel.read_bytes()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as index:
        url = f"http://127.0.0.1:{index.sockets[0].getsockname()[1]}/{wheel.name}"
        runner, news = await harness.open(), asyncio.Queue[tuple[WorkerInfo, str | None]]()
        runner.on_news = lambda worker, message: news.put_nowait((worker, message))
        spec = harness.spec("a")._replace(dependencies=[f"flametestone @ {url}"])
        start = asyncio.create_task(runner.start(spec))
        async with asyncio.timeout(60):
            await asked.wait()
            info, message = await news.get()
            assert message == f"Its dependencies are being installed: flametestone @ {url}."
            assert info[:3] == ("a", "job1", 1)
            may_answer.set()
            assert (await news.get())[1] is None
            await harness.ready(await start)


async def test_fifty_workers_start_at_once_and_end_at_once(harness: Harness) -> None:
    runner = await harness.open()
    workers = await asyncio.gather(*(runner.start(harness.spec(f"t{n}")) for n in range(50)))
    assert len({worker.handle for worker in workers}) == 50
    await harness.ready(*workers)
    assert sorted(await runner.list()) == sorted(workers)
    await asyncio.gather(*(runner.end(worker) for worker in workers))
    assert list(await runner.list()) == []
    assert harness.processes() == []
    assert harness.exits == []


async def test_the_secret_is_in_the_environment_and_nowhere_else(harness: Harness) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(worker)
    process = psutil.Process(int(worker.handle))
    assert process.environ()["FLAME_TASK_KEY"] == "secret-a"
    assert "secret" not in " ".join(process.cmdline())
    for path in harness.data_dir.rglob("*"):
        assert "secret" not in path.name
        assert not path.is_file() or b"secret" not in path.read_bytes()


async def test_the_servers_own_variables_do_not_reach_a_worker(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_TOKEN", "of the server")
    monkeypatch.setenv("OTHER", "passed on")
    runner = await harness.open()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(worker)
    environment = psutil.Process(int(worker.handle)).environ()
    assert "FLAME_TOKEN" not in environment
    assert environment["OTHER"] == "passed on"


async def test_an_interpreter_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    harness = Harness(tmp_path, python="/nowhere/python")
    runner = await harness.open()
    with pytest.raises(RunnerError, match="/nowhere/python"):
        await runner.start(harness.spec("a"))
    assert list(await runner.list()) == []
    await runner.close()


STARTER = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from flame.runners import WorkerSpec, make_runner

    async def main(instance, data_dir, code):
        config = {"environment": {"PYTHONPATH": code}}
        runner = make_runner("local", config, instance=instance, data_dir=Path(data_dir))
        await runner.open(print)
        for task in "abc":
            environment = {"FLAME_TASK": task, "BEHAVIOUR": {"b": "family", "c": "family stubborn"}.get(task, "wait")}
            await runner.start(WorkerSpec(task, "job1", 2, environment, module="fake_flamelet"))
        print("started", flush=True)
        await asyncio.sleep(1000)

    asyncio.run(main(*sys.argv[1:]))
    """
)


@pytest.mark.usefixtures("each_way_of_watching")
async def test_workers_outlive_a_killed_server_and_are_adopted_by_the_next(harness: Harness) -> None:
    arguments = [harness.instance, str(harness.data_dir), str(harness.code)]
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTER, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout
    assert await server.stdout.readline() == b"started\n"
    expected = [WorkerInfo(task, "job1", 2, "") for task in "abc"]
    await harness.ready(*expected)
    server.kill()
    await server.communicate()

    runner = await harness.open()
    a, b, c = sorted(await runner.list())
    assert [worker._replace(handle="") for worker in (a, b, c)] == expected
    assert await runner.start(harness.spec("a", attempt=2)) == a  # it is there already
    assert len(harness.processes()) == 11

    os.kill(int(a.handle), 9)
    await until(lambda: bool(harness.exits))
    assert harness.exits == [(a, WorkerExit(None, None))]  # how it ended is told to its parent alone

    family = harness.processes()
    await asyncio.gather(runner.end(b, grace=0.2), runner.end(c, grace=0.2))
    assert not [process for process in family if processes.is_alive(process)]
    assert len(harness.exits) == 1


async def test_orphans_of_a_worker_whose_leader_is_gone_are_ended_too(harness: Harness) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a", "family"))
    await harness.ready(worker)
    await runner.close()
    family = harness.processes()
    os.kill(int(worker.handle), 9)
    assert reap(int(worker.handle))

    again = await harness.open()
    assert list(await again.list()) == []
    await again.end(worker)
    marked = [process for process in family if processes.is_alive(process)]
    assert len(marked) <= 1  # the one without the mark, which nothing but its session connects with the worker


async def test_a_closed_runner_lets_its_workers_go_on(harness: Harness) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(worker)
    await runner.close()
    again = await harness.open()
    assert list(await again.list()) == [worker]


async def test_capacity_is_what_was_configured_and_what_the_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await (await Harness(tmp_path, slots=3).open()).capacity()).slots == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    there = await (await Harness(tmp_path).open()).capacity()
    assert there.cpu is not None
    assert there.slots == SLOTS_PER_CORE * max(1, round(there.cpu))
    assert 0 < there.cpu <= (os.cpu_count() or 1)
    assert there.memory is not None
    assert 0 < there.memory <= psutil.virtual_memory().total
    assert there.gpu == 2


def test_a_kind_is_found_by_its_name_and_its_configuration_checked(tmp_path: Path) -> None:
    assert runner_for("local") is LocalRunner
    with pytest.raises(UsageError, match=r"'loacl'; known are: docker, kubernetes, local"):
        runner_for("loacl")
    with pytest.raises(SpecError, match="slots"):
        make_runner("local", {"slots": 0}, instance="i", data_dir=tmp_path)
    with pytest.raises(SpecError, match="slot"):
        make_runner("local", {"slot": 1}, instance="i", data_dir=tmp_path)
    assert LocalConfig().python is None


def groups_can_be_made() -> bool:
    """Whether this process may make control groups with a memory limit."""
    try:
        make_group(f"probe-{uuid.uuid4().hex}", Limits(memory=1 << 26)).remove()
    except OSError:
        return False
    return True


GROUPED = pytest.mark.skipif(not groups_can_be_made(), reason="control groups cannot be made here")


@GROUPED
async def test_a_worker_that_eats_too_much_is_killed_and_its_end_names_the_cause(harness: Harness) -> None:
    runner = await harness.open()
    spec = harness.spec("a", "eat")._replace(resources=Resources(memory="64Mi"))
    worker = await runner.start(spec)
    group = group_of(int(worker.handle))
    assert group is not None
    assert group.memory == 64 << 20
    await until(lambda: bool(harness.exits))
    assert harness.exits[0][1] == WorkerExit(None, "SIGKILL", "Its worker was out of memory, of which it may use 64Mi.")
    with pytest.raises(OSError, match=r"cgroup\.procs"):
        group.take(os.getpid())


@GROUPED
async def test_a_restarted_runner_finds_a_workers_group_again(harness: Harness) -> None:
    first = await harness.open()
    spec = harness.spec("a")._replace(resources=Resources(cpu=0.5, memory="64Mi"))
    worker = await first.start(spec)
    await harness.ready(worker)
    assert "flame-" in Path(f"/proc/{worker.handle}/cgroup").read_text()
    await first.close()
    second = await harness.open()
    assert [found.task for found in await second.list()] == ["a"]
    group = group_of(int(worker.handle))
    assert group is not None
    await second.end(worker)
    with pytest.raises(OSError, match=r"cgroup\.procs"):
        group.take(os.getpid())


async def test_without_groups_each_process_of_a_worker_is_limited(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Group:
        raise OSError("read-only")

    monkeypatch.setattr(local, "make_group", refuse)
    runner = await harness.open()
    worker = await runner.start(harness.spec("a", "eat")._replace(resources=Resources(memory="64Mi")))
    await until(lambda: bool(harness.exits))
    assert harness.exits[0][1].exit_code == 1
    assert b"MemoryError" in b"".join([piece async for piece in runner.logs(worker)])


async def test_no_worker_leaves_a_core(harness: Harness) -> None:
    runner = await harness.open()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(worker)
    limits = Path(f"/proc/{worker.handle}/limits").read_text().splitlines()
    core = next(line for line in limits if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


async def test_each_worker_has_gpus_of_its_own_also_after_a_restart(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    first = await harness.open()

    def wants(task: str, gpu: int) -> WorkerSpec:
        return harness.spec(task)._replace(resources=Resources(gpu=gpu, cpu=1.5))

    def given(worker: WorkerInfo) -> dict[str, str]:
        return psutil.Process(int(worker.handle)).environ()

    a, b = await asyncio.gather(first.start(wants("a", 1)), first.start(wants("b", 1)))
    await harness.ready(a, b)
    assert {given(a)["CUDA_VISIBLE_DEVICES"], given(b)["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
    assert given(a)["OMP_NUM_THREADS"] == "2"
    await first.close()
    second = await harness.open()
    c = await second.start(wants("c", 1))
    await harness.ready(c)
    assert given(c)["CUDA_VISIBLE_DEVICES"] == "2"
    with pytest.raises(RunnerError, match="needs 2 GPUs, and 0 of this host are free"):
        await second.start(wants("d", 2))
    await second.end(a)
    freed = await second.start(wants("e", 1))
    await harness.ready(freed)
    assert given(freed)["CUDA_VISIBLE_DEVICES"] not in {given(b)["CUDA_VISIBLE_DEVICES"], "2"}


def test_groups_of_version_2_are_made_where_the_server_is(tmp_path: Path) -> None:
    # The files are those of the kernel's version 2; their contents are what the kernel would make of ours.
    mine = tmp_path / "user.slice" / "flame.service"
    mine.mkdir(parents=True)
    for folder in (tmp_path, mine):
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
        (folder / "cgroup.subtree_control").write_text("cpu memory\n")
    (tmp_path / "user.slice" / "memory.max").write_text("max\n")
    (mine / "memory.max").write_text("1073741824\n")
    (mine / "cpu.max").write_text("150000 100000\n")
    own = tmp_path / "own"
    own.write_text("0::/user.slice/flame.service\n")
    assert host_limits(groups=tmp_path, own=own) == Limits(1.5, 1 << 30)
    folder = mine / "flame-x"
    folder.mkdir()
    (folder / "cgroup.controllers").write_text("cpu memory\n")
    (folder / "memory.swap.max").write_text("max\n")
    group = make_group("x", Limits(0.5, 1 << 26), groups=tmp_path, own=own)
    assert (folder / "memory.max").read_text() == "67108864"
    assert (folder / "memory.swap.max").read_text() == "0"
    assert (folder / "cpu.max").read_text() == "50000 100000"
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    assert (group.kills, group.memory) == (2, 1 << 26)
    group.take(42)
    assert (folder / "cgroup.procs").read_text() == "42"
    own.write_text("0::/nowhere\n")
    assert host_limits(groups=tmp_path, own=own) == Limits()
