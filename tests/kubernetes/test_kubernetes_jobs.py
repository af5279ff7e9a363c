"""Jobs whose workers are pods of a real cluster: they complete, and what goes wrong with a pod is in the job's state."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engines import kubectl
from jobkit import Flame, Server
from waiting import blocked_until


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
    blocked_until(lambda: pods_of(namespace, job) == [])  # nothing is left, and no secret
    blocked_until(lambda: kubectl("get", "secrets", "-n", namespace, "-l", f"flame-job={job}", "-o", "name") == "")


def test_an_image_that_is_nowhere_fails_the_job_with_its_name(flame: Flame) -> None:
    flame_image = "registry.invalid/nothing/like-this:1"
    job = flame.submit("lost-image", 1, placement={"trainer": {"image": flame_image}}, restart={"attempts": 0})
    # Said at once, while it is still tried.
    blocked_until(lambda: any("cannot be pulled" in (task.get("reason") or "") for task in flame.tasks(job)), 10)
    done = flame.ended(job, 20)
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


@pytest.fixture
def crowd(namespace: str, image: str) -> Iterator[None]:
    """Somebody else's pod that takes most of the memory of every node."""
    nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
    free = min(int(node["status"]["allocatable"]["memory"].removesuffix("Ki")) for node in nodes)
    container = {
        "name": "crowd",
        "image": image,
        "command": ["sleep", "1000"],
        "resources": {"requests": {"memory": f"{free * 2 // 3}Ki"}},
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "crowd"}, "spec": spec}
    kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "-n", namespace, "pod/crowd", "--for=condition=Ready", "--timeout=60s")
    yield
    kubectl("delete", "-n", namespace, "pod/crowd", "--now")


@pytest.mark.usefixtures("crowd")
def test_a_node_without_room_is_told_while_it_lasts_and_then_fails_the_job(flame: Flame) -> None:
    compute = next(one for one in flame("compute", "list") if one["name"] == "cluster")
    half = compute["capacity"]["memory"] // 2  # there is that much, as far as Flame knows
    job = flame.submit("large", 1, placement={"trainer": {"resources": {"memory": half}}}, restart={"attempts": 0})

    def reason() -> Any:
        return next((task["reason"] for task in flame.tasks(job) if "Insufficient" in (task.get("reason") or "")), None)

    assert "No node takes its pod" in blocked_until(reason)
    assert flame.job(job)["state"] == "deploying"
    done = flame.ended(job)
    assert done["state"] == "failed"
    # On a busy machine the scheduler has not looked at the worker's second pod yet; what it said of the first is in the warning.
    said = [done["failure"]["message"], *done["warnings"]]
    assert any("Insufficient" in one for one in said), said
    assert done["failure"]["role"] == "trainer"


@pytest.mark.parametrize("attempts", [0, 3])
def test_a_pod_deleted_by_hand_is_named_and_replaced_as_often_as_the_job_allows(
    flame: Flame, namespace: str, attempts: int
) -> None:
    job = flame.submit("cut", 1, hyperparameters={"rounds": 1000, "pause": 0.2}, restart={"attempts": attempts})
    blocked_until(lambda: flame.job(job)["rounds"])
    trainer = next(task for task in flame.tasks(job) if task["role"] == "trainer")
    kubectl("delete", "pod", "-n", namespace, trainer["worker"], "--wait=false")
    cause = f"Its pod {trainer['worker']} was deleted, and not by Flame."
    if attempts:
        blocked_until(lambda: any(cause in warning for warning in flame.job(job)["warnings"]))
        blocked_until(lambda: any(task["attempt"] == 2 and task["state"] == "running" for task in flame.tasks(job)))
        flame("job", "stop", job)
        assert flame.ended(job)["state"] == "terminated"
    else:
        done = flame.ended(job)
        assert done["state"] == "failed"
        assert done["failure"]["message"] == cause


def test_a_job_goes_on_when_its_server_is_killed_and_starts_again(flame: Flame, server: Server, namespace: str) -> None:
    job = flame.submit("lasting", hyperparameters={"rounds": 30, "pause": 0.3})
    blocked_until(lambda: len(flame.job(job)["rounds"]) >= 2)
    before = {task["id"]: (task["worker"], task["attempt"]) for task in flame.tasks(job)}
    server.kill()
    again = server.start()
    done = again.ended(job)
    assert done["state"] == "completed", done
    assert [one["round"] for one in done["rounds"]] == list(range(1, 31))
    assert {task["id"]: (task["worker"], task["attempt"]) for task in again.tasks(job)} == before
