"""Jobs whose workers are containers of a real engine: they complete soon, and what goes wrong with a container is in the job's state."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kubernetes"))

import engines
from jobkit import Flame, Server
from private_docker import PrivateEngine
from waiting import blocked_until

NEVER = {"attempts": 0}


class DockerServer(Server):
    """A `flame serve` process with one compute: a Docker engine."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.folder = folder
        self.computes = folder / "computes.yaml"
        compute = {"name": "engine", "kind": "docker", "config": {"image": engines.docker_image(), **config}}
        self.computes.write_text(yaml.safe_dump([compute]))
        self.address = "0.0.0.0"
        self.log = folder / "serve.log"
        self.process = None
        self.url = ""


@pytest.fixture(scope="module")
def flame(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flame]:
    server = DockerServer(tmp_path_factory.mktemp("server"))
    yield server.start()
    server.kill()


def on_engine(**trainer: object) -> dict[str, object]:
    """All of a job's workers run there, and none on this host."""
    return {"trainer": {"realm": "engine", **trainer}, "aggregator": {"realm": "engine"}}


def containers(job: str) -> list[str]:
    listed = ["docker", "ps", "--all", "--quiet", "--filter", f"label=flame.job={job}"]
    return subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()


def test_a_job_completes_with_its_workers_as_containers(flame: Flame) -> None:
    job = flame.submit("noop", hyperparameters={"rounds": 3}, placement=on_engine())
    done = flame.ended(job)
    assert done["state"] == "completed", done
    assert len(done["rounds"]) == 3
    assert {task["compute"] for task in flame.tasks(job)} == {"engine"}
    blocked_until(lambda: containers(job) == [])


def test_an_image_that_is_nowhere_fails_the_job_with_its_name(flame: Flame) -> None:
    job = flame.submit("lost-image", 1, placement=on_engine(image="localhost:1/like/this:1"), restart=NEVER)
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert "The image 'localhost:1/like/this:1' is not on the Docker engine" in done["failure"]["message"]
    blocked_until(lambda: containers(job) == [])


def test_a_worker_out_of_memory_fails_the_job_with_that_cause(flame: Flame) -> None:
    placement = on_engine(resources={"memory": "200Mi"})
    job = flame.submit("hungry", 1, hyperparameters={"eat": True}, placement=placement, restart=NEVER)
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert "out of memory, of which it may use 200Mi" in done["failure"]["message"], done["failure"]
    assert done["failure"]["role"] == "trainer"


def test_a_container_that_is_removed_by_hand_fails_the_job_with_that_cause(flame: Flame) -> None:
    hyper = {"rounds": 1000, "pause": 0.05}
    job = flame.submit("removed", 1, hyperparameters=hyper, placement=on_engine(), restart=NEVER)
    blocked_until(lambda: flame.job(job)["rounds"])
    (trainer,) = (task for task in flame.tasks(job) if task["role"] == "trainer")
    subprocess.run(["docker", "rm", "--force", trainer["worker"]], check=True, capture_output=True)
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert "removed by somebody" in done["failure"]["message"], done["failure"]
    blocked_until(lambda: containers(job) == [])


async def test_an_engine_that_is_restarted_fails_the_job_with_that_cause(tmp_path: Path) -> None:
    private = PrivateEngine(tmp_path, live_restore=False)
    await private.start()
    server = None
    try:
        await private.load(engines.docker_image())
        (tmp_path / "server").mkdir()
        server = DockerServer(tmp_path / "server", host=f"unix://{private.socket}", network="host")
        flame = await asyncio.to_thread(server.start)
        hyper = {"rounds": 1000, "pause": 0.05}
        job = await asyncio.to_thread(
            flame.submit, "restarted", 1, hyperparameters=hyper, placement=on_engine(), restart=NEVER
        )
        await asyncio.to_thread(blocked_until, lambda: flame.job(job)["rounds"])
        await private.end(signal.SIGTERM)
        await private.start()
        done = await asyncio.to_thread(flame.ended, job)
        assert done["state"] == "failed"
        assert "the Docker engine" in done["failure"]["message"], done["failure"]
    finally:
        if server is not None and server.process is not None:
            server.kill()
        await private.close()
