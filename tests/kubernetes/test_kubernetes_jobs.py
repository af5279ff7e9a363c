"""Jobs whose workers are pods of a real cluster: they complete, and what goes wrong with a pod is in the job's state."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engines import kubectl
from jobkit import Flame, Server, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, namespace: str, kubeconfig: str, image: str) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), namespace, kubeconfig, image, roomPatience=8, pullPatience=2)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def flame(server: Server) -> Flame:
    return server.start()


def pods_of(namespace: str, job: str) -> list[str]:
    return kubectl("get", "pods", "-n", namespace, "-l", f"flame-job={job}", "-o", "name").split()


def test_a_job_completes_with_its_workers_as_pods(flame: Flame, namespace: str) -> None:
    job = flame.submit("noop", hyperparameters={"rounds": 3})
    done = flame.ended(job)
    assert done["state"] == "completed", done
    assert len(done["rounds"]) == 3
    assert {task["compute"] for task in flame.tasks(job)} == {"cluster"}
    until(lambda: pods_of(namespace, job) == [])  # nothing is left, and no secret
    until(lambda: kubectl("get", "secrets", "-n", namespace, "-l", f"flame-job={job}", "-o", "name") == "")


def test_an_image_that_is_nowhere_fails_the_job_with_its_name(flame: Flame) -> None:
    flame_image = "registry.invalid/nothing/like-this:1"
    job = flame.submit("lost-image", 1, placement={"trainer": {"image": flame_image}})
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert f"Its image '{flame_image}' cannot be pulled" in done["failure"]["message"]


def test_a_worker_out_of_memory_fails_the_job_with_that_cause(flame: Flame) -> None:
    job = flame.submit(
        "hungry", 1, hyperparameters={"eat": True}, placement={"trainer": {"resources": {"memory": "200Mi"}}}
    )
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert "out of memory" in done["failure"]["message"] or "OOM" in done["failure"]["message"], done["failure"]
    assert done["failure"]["role"] == "trainer"


def test_a_node_without_room_is_told_while_it_lasts_and_then_fails_the_job(flame: Flame) -> None:
    job = flame.submit("large", 1)

    def reason() -> Any:
        return next((task["reason"] for task in flame.tasks(job) if "Insufficient" in (task.get("reason") or "")), None)

    assert "No node takes its pod" in until(reason)
    assert flame.job(job)["state"] == "deploying"
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert "Insufficient" in done["failure"]["message"]


def test_a_pod_deleted_by_hand_fails_the_job_with_that_cause(flame: Flame, namespace: str) -> None:
    job = flame.submit("cut", 1, hyperparameters={"rounds": 1000, "pause": 0.2})
    until(lambda: flame.job(job)["rounds"])
    trainer = next(task for task in flame.tasks(job) if task["role"] == "trainer")
    kubectl("delete", "pod", "-n", namespace, trainer["worker"], "--wait=false")
    done = flame.ended(job)
    assert done["state"] == "failed"
    assert done["failure"]["message"] == f"Its pod {trainer['worker']} was deleted, and not by Flame."


def test_a_job_goes_on_when_its_server_is_killed_and_starts_again(flame: Flame, server: Server, namespace: str) -> None:
    job = flame.submit("lasting", hyperparameters={"rounds": 30, "pause": 0.3})
    until(lambda: len(flame.job(job)["rounds"]) >= 2)
    before = {task["id"]: (task["worker"], task["attempt"]) for task in flame.tasks(job)}
    server.kill()
    again = server.start()
    done = again.ended(job)
    assert done["state"] == "completed", done
    assert [one["round"] for one in done["rounds"]] == list(range(1, 31))
    assert {task["id"]: (task["worker"], task["attempt"]) for task in again.tasks(job)} == before
