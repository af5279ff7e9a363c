"""The runner of the kind kubernetes, with real pods: what every runner promises, and why a pod did not run."""

import asyncio
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines
from engines import kubectl

from flame.errors import RunnerError, SpecError
from flame.runners import WorkerExit, WorkerInfo, WorkerSpec, make_runner
from flame.runners.kubernetes import KubernetesRunner
from flame.spec.nouns import Resources

# Stands for the flamelet: does what BEHAVIOUR says, once it has said that it is there.
WORKER = textwrap.dedent(
    """
    import os, signal, sys, time
    behaviour = os.environ.get("BEHAVIOUR", "wait")
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "eat" in behaviour:
        held = [bytearray(os.urandom(1 << 20)) for _ in range(10000)]
    print("worker", os.environ["FLAME_TASK"], flush=True)
    if "exit" in behaviour:
        sys.exit(int(behaviour.split("=")[1]))
    if "sig" in behaviour:
        os.kill(os.getpid(), int(behaviour.split("=")[1]))
    if "tell" in behaviour:
        import flametestone
        print(os.environ["FLAME_P2P_HOST"], flametestone.VERSION, flush=True)
        sys.exit(0)
    time.sleep(1000)
    """
)


class Harness:
    """A runner whose workers run ``fake_flamelet``, and everything that it reported."""

    def __init__(self, folder: Path, kubeconfig: str, namespace: str, image: str, **config: object) -> None:
        self.folder = folder
        self.code = folder / "code"
        self.code.mkdir(exist_ok=True)
        self.code.chmod(0o755)
        (self.code / "fake_flamelet.py").write_text(WORKER)
        self.instance = uuid.uuid4().hex
        self.namespace = namespace
        self.config = {
            "kubeconfig": kubeconfig,
            "namespace": namespace,
            "image": image,
            "environment": {"PYTHONPATH": "/code"},
            "podTemplate": {
                "spec": {
                    "containers": [{"name": "worker", "volumeMounts": [{"name": "code", "mountPath": "/code"}]}],
                    "volumes": [{"name": "code", "hostPath": {"path": str(self.code)}}],
                }
            },
            **config,
        }
        self.exits: list[tuple[WorkerInfo, WorkerExit]] = []
        self.news: list[tuple[WorkerInfo, str | None]] = []
        self.runners: list[KubernetesRunner] = []

    async def open(self) -> KubernetesRunner:
        runner = make_runner("kubernetes", self.config, instance=self.instance, data_dir=self.folder)
        assert isinstance(runner, KubernetesRunner)
        runner.on_news = lambda worker, message: self.news.append((worker, message))
        await runner.open(lambda worker, how: self.exits.append((worker, how)))
        self.runners.append(runner)
        return runner

    async def started(self, **config: object) -> KubernetesRunner:
        """A runner that a starting server has asked what there is."""
        self.config |= config
        runner = await self.open()
        await runner.list()
        return runner

    def spec(self, task: str, behaviour: str = "wait", attempt: int = 1, **more: Any) -> WorkerSpec:
        environment = {"FLAME_TASK": task, "FLAME_TASK_KEY": f"secret-{task}", "FLAME_ATTEMPT": str(attempt)}
        return WorkerSpec(
            task, "job1", attempt, {**environment, "BEHAVIOUR": behaviour}, module="fake_flamelet", **more
        )

    async def ready(self, runner: KubernetesRunner, *workers: WorkerInfo) -> None:
        for worker in workers:

            async def has_spoken(worker: WorkerInfo = worker) -> bool:
                return f"worker {worker.task}\n".encode() in await output(runner, worker)

            await eventually(has_spoken)

    def pods(self) -> list[dict[str, Any]]:
        labels = f"flame-instance={self.instance}"
        return list(
            msgspec.json.decode(kubectl("get", "pods", "-n", self.namespace, "-l", labels, "-o", "json"))["items"]
        )

    def news_of(self, worker: WorkerInfo) -> list[str | None]:
        return [message for one, message in self.news if one == worker]


async def output(runner: KubernetesRunner, worker: WorkerInfo) -> bytes:
    return b"".join([piece async for piece in runner.logs(worker)])


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.05)


@pytest.fixture
async def harness(tmp_path: Path, kubeconfig: str, namespace: str, image: str) -> AsyncIterator[Harness]:
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)  # the pods' user is not ours
    harness = Harness(tmp_path, kubeconfig, namespace, image)
    yield harness
    for runner in harness.runners:
        await runner.close()
    kubectl("delete", "pods", "-n", namespace, "-l", f"flame-instance={harness.instance}", "--wait=false", "--now")


async def test_a_started_worker_is_listed_and_an_ended_one_is_not(harness: Harness) -> None:
    runner = await harness.started()
    first, second = await asyncio.gather(runner.start(harness.spec("a")), runner.start(harness.spec("a")))
    assert first == second == await runner.start(harness.spec("a"))
    assert (first.task, first.job, first.attempt) == ("a", "job1", 1)
    newer = await runner.start(harness.spec("a", attempt=2))
    assert newer.handle != first.handle
    await harness.ready(runner, first, newer)
    assert sorted(await runner.list()) == sorted([first, newer])
    assert harness.news_of(first)[-1] is None  # it runs
    await asyncio.gather(runner.end(first, grace=1), runner.end(first, grace=1), runner.end(newer, grace=1))
    assert list(await runner.list()) == []
    assert harness.pods() == []
    assert harness.exits == []
    await runner.end(first)  # once more is no error


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
    runner = await harness.started()
    worker = await runner.start(harness.spec("a", behaviour))
    await eventually(lambda: bool(harness.exits))
    assert harness.exits == [(worker, how)]
    assert list(await runner.list()) == []
    await runner.end(worker)
    assert harness.pods() == []
    assert len(harness.exits) == 1


async def test_ending_a_stubborn_worker_takes_the_grace_and_no_more(harness: Harness) -> None:
    runner = await harness.started()
    worker = await runner.start(harness.spec("a", "stubborn"))
    await harness.ready(runner, worker)
    async with asyncio.timeout(10):
        await runner.end(worker, grace=1)
    assert harness.pods() == []


async def test_the_secret_is_in_a_secret_that_goes_with_the_pod(harness: Harness) -> None:
    runner = await harness.started()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(runner, worker)
    assert "secret-a" not in str(harness.pods())
    mine = ("-n", harness.namespace, "-l", f"flame-instance={harness.instance}", "-o", "name")
    assert len(kubectl("get", "secrets", *mine).split()) == 1
    await runner.end(worker, grace=0)
    await eventually(lambda: kubectl("get", "secrets", *mine) == "")


async def test_a_workers_own_output_is_kept_until_it_is_cleaned_up(harness: Harness) -> None:
    runner = await harness.started()
    worker = await runner.start(harness.spec("a", "exit=1"))
    await eventually(lambda: bool(harness.exits))
    assert await output(runner, worker) == b"worker a\n"
    await runner.clean(worker)
    await runner.clean(worker)
    await eventually(lambda: harness.pods() == [])
    assert await output(runner, worker) == b""


async def test_what_a_job_requires_is_installed_first_and_workers_know_their_address(harness: Harness) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "runners"))
    from test_environments import make_wheel

    make_wheel(harness.code, "flametestone")
    requirement = "flametestone @ file:///code/flametestone-1.0-py3-none-any.whl"
    template = harness.config["podTemplate"]["spec"]
    template["initContainers"] = [{**template["containers"][0], "name": "dependencies"}]
    runner = await harness.started()
    worker = await runner.start(harness.spec("a", "wait", dependencies=[requirement]))
    other = await runner.start(harness.spec("b", "tell", dependencies=["msgspec>=0.1", requirement]))
    bad = await runner.start(harness.spec("c", dependencies=["flametestone @ file:///code/flametestone-9.whl"]))
    await harness.ready(runner, worker)
    address = kubectl("get", "pod", "-n", harness.namespace, worker.handle, "-o", "jsonpath={.status.podIP}")
    await eventually(lambda: len(harness.exits) == 2)
    exits = dict(harness.exits)
    assert exits[other] == WorkerExit(0, None)
    assert "could not be installed" in (exits[bad].message or "")
    assert "flametestone-9.whl" in (exits[bad].message or "")
    assert address.startswith("10.")
    await runner.end(worker, grace=0)


STARTER = textwrap.dedent(
    """
    import asyncio, json, sys
    from pathlib import Path
    from flame.runners import WorkerSpec, make_runner

    async def main(instance, config):
        runner = make_runner("kubernetes", json.loads(config), instance=instance, data_dir=Path("."))
        await runner.open(print)
        await runner.list()
        for task, behaviour in {"a": "wait", "b": "wait", "c": "exit=3"}.items():
            environment = {"FLAME_TASK": task, "BEHAVIOUR": behaviour}
            await runner.start(WorkerSpec(task, "job1", 2, environment, module="fake_flamelet"))
        print("started", flush=True)
        await asyncio.sleep(1000)

    asyncio.run(main(*sys.argv[1:]))
    """
)


async def test_workers_outlive_a_killed_server_and_are_adopted_by_the_next(harness: Harness) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTER, harness.instance, msgspec.json.encode(harness.config).decode(),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout
    assert await server.stdout.readline() == b"started\n"
    server.kill()
    await server.communicate()
    await eventually(
        lambda: sorted(pod["status"]["phase"] for pod in harness.pods()) == ["Failed", "Running", "Running"]
    )

    runner = await harness.open()
    a, b, c = sorted(await runner.list())
    assert [worker._replace(handle="") for worker in (a, b, c)] == [WorkerInfo(t, "job1", 2, "") for t in "abc"]
    await eventually(lambda: bool(harness.exits))
    assert harness.exits == [(c, WorkerExit(3, None))]  # it ended while nobody looked
    assert await runner.start(harness.spec("a", attempt=2)) == a  # it is there already

    stranger = Harness(
        harness.folder, str(harness.config["kubeconfig"]), harness.namespace, str(harness.config["image"])
    )
    other = await stranger.started()
    assert list(await other.list()) == []
    await other.end(a)
    assert sorted(await runner.list()) == [a, b]
    await other.close()
    await asyncio.gather(runner.end(a, grace=0), runner.end(b, grace=0))
    assert len(harness.exits) == 1


async def test_thirty_workers_start_at_once_and_end_at_once(harness: Harness) -> None:
    runner = await harness.started()
    workers = await asyncio.gather(*(runner.start(harness.spec(f"t{n}")) for n in range(30)))
    assert len({worker.handle for worker in workers}) == 30
    assert sorted(await runner.list()) == sorted(workers)
    await asyncio.gather(*(runner.end(worker, grace=0) for worker in workers))
    assert list(await runner.list()) == []
    assert harness.pods() == []
    assert harness.exits == []


async def test_an_image_that_cannot_be_pulled_is_named_within_seconds(harness: Harness) -> None:
    runner = await harness.started(pullPatience=2)
    worker = await runner.start(harness.spec("a", image="registry.invalid/nothing/like-this:1"))
    await eventually(lambda: bool(harness.exits), 20)
    assert harness.exits[0][0] == worker
    assert "Its image 'registry.invalid/nothing/like-this:1' cannot be pulled" in (harness.exits[0][1].message or "")
    assert harness.pods() == []


async def test_an_image_that_must_be_there_and_is_not_is_hopeless_at_once(harness: Harness) -> None:
    runner = await harness.started(imagePullPolicy="Never", pullPatience=1000)
    await runner.start(harness.spec("a", image="nothing-like-this:1"))
    await eventually(lambda: bool(harness.exits), 20)
    assert "'nothing-like-this:1' cannot be had (ErrImageNeverPull)" in (harness.exits[0][1].message or "")


async def test_a_worker_out_of_memory_ends_with_that_cause(harness: Harness) -> None:
    runner = await harness.started()
    await runner.start(harness.spec("a", "eat", resources=Resources(memory="64Mi")))
    await eventually(lambda: bool(harness.exits))
    assert harness.exits[0][1] == WorkerExit(
        None, "SIGKILL", "Its worker ran out of memory (OOMKilled): its pod may use 64Mi."
    )


async def test_a_pod_that_no_node_takes_says_so_and_fails_when_patience_ends(harness: Harness) -> None:
    runner = await harness.started(roomPatience=3)
    worker = await runner.start(harness.spec("a", resources=Resources(cpu=10000)))
    await eventually(lambda: any("Insufficient cpu" in (message or "") for message in harness.news_of(worker)), 10)
    assert list(await runner.list()) == [worker]
    assert harness.exits == []
    await eventually(lambda: bool(harness.exits), 10)
    assert harness.exits[0][1].message in harness.news_of(worker)
    assert "No node takes its pod" in (harness.exits[0][1].message or "")


async def test_what_the_cluster_says_while_a_worker_is_still_being_made_is_not_taken_back(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = await harness.started()
    make = runner._make

    def make_late(body: Any, path: str | None = None) -> Any:
        async def late() -> Any:
            if path is not None:  # the Secret, whose pod is there by now
                await eventually(lambda: any("Insufficient cpu" in (message or "") for _, message in harness.news))
            return await make(body, path)()

        return late

    monkeypatch.setattr(runner, "_make", make_late)
    worker = await runner.start(harness.spec("a", resources=Resources(cpu=10000)))
    assert "Insufficient cpu" in (harness.news_of(worker)[-1] or "")
    await runner.end(worker, grace=0)


@pytest.mark.parametrize("how", ["gently", "forced"])
async def test_a_pod_deleted_by_hand_is_reported_as_that(harness: Harness, how: str) -> None:
    runner = await harness.started()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(runner, worker)
    force = ["--grace-period=0", "--force"] if how == "forced" else ["--grace-period=2"]
    kubectl("delete", "pod", "-n", harness.namespace, worker.handle, "--wait=false", *force)
    await eventually(lambda: bool(harness.exits))
    assert [worker] == [one for one, _ in harness.exits]
    assert harness.exits[0][1].message == f"Its pod {worker.handle} was deleted, and not by Flame."
    if how == "gently":  # known before its container has ended, so that its last words can be understood
        assert harness.news_of(worker)[-1] == harness.exits[0][1].message
    await eventually(lambda: harness.pods() == [])


async def test_an_evicted_pod_is_reported_as_that(harness: Harness) -> None:
    runner = await harness.started()
    worker = await runner.start(harness.spec("a"))
    await harness.ready(runner, worker)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": worker.handle, "namespace": harness.namespace},
        "deleteOptions": {"gracePeriodSeconds": 1},
    }
    path = f"/api/v1/namespaces/{harness.namespace}/pods/{worker.handle}/eviction"
    kubectl("create", "--raw", path, "-f", "-", stdin=msgspec.json.encode(eviction).decode())
    await eventually(lambda: bool(harness.exits))
    assert "was taken from node" in (harness.exits[0][1].message or "")
    assert "EvictionByEvictionAPI" in (harness.exits[0][1].message or "")


async def test_a_container_that_cannot_start_says_why(harness: Harness) -> None:
    harness.config["podTemplate"]["spec"]["containers"][0]["command"] = ["/no/such/program"]
    runner = await harness.started()
    await runner.start(harness.spec("a"))
    await eventually(lambda: bool(harness.exits))
    assert "could not be started" in (harness.exits[0][1].message or "")
    assert "/no/such/program" in (harness.exits[0][1].message or "")


async def test_what_the_cluster_would_refuse_is_refused_when_the_compute_is_opened(harness: Harness) -> None:
    harness.config["podTemplate"] = {"spec": {"tolerations": [{"operator": "Nonsense"}]}}
    with pytest.raises(RunnerError, match="Nonsense"):
        await harness.open()
    harness.config |= {"podTemplate": {}, "namespace": "there-is-no-such-namespace"}
    with pytest.raises(RunnerError, match="there-is-no-such-namespace"):
        await harness.open()
    harness.config |= {"kubeconfig": "/nowhere/kubeconfig"}
    with pytest.raises(RunnerError, match="/nowhere/kubeconfig"):
        await harness.open()
    harness.config |= {"imagePullPolicy": "sometimes"}
    with pytest.raises(SpecError, match="imagePullPolicy"):
        await harness.open()


async def test_capacity_is_what_the_nodes_have(harness: Harness) -> None:
    runner = await harness.started()
    there = await runner.capacity()
    assert there.slots
    assert there.slots >= 1
    assert there.cpu
    assert there.memory
    assert there.memory > 1 << 28
    assert engines.kubectl("get", "nodes", "-o", "name")
