"""The pure parts of the runner of the kind kubernetes: pods from workers, verdicts from pods, room from nodes.

The statuses are those that Kubernetes' documentation and sources give for what cannot be brought about on a test cluster:
a node that is lost, a pod that a node under pressure throws out. What can be is tested for real in ``tests/kubernetes``.
"""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.runners import WorkerExit, WorkerInfo, WorkerSpec
from flame.runners.base import Capacity
from flame.runners.kubernetes_capacity import measure
from flame.runners.kubernetes_config import KubernetesConfig, PodResources
from flame.runners.kubernetes_pod import make_pod, make_secret, merge, pod_name, read_info, secret_of
from flame.runners.kubernetes_verdict import Stage, judge
from flame.spec.nouns import Resources

SPEC = WorkerSpec("task1", "job1", 2, {"FLAME_TASK_KEY": "hidden"})


def made(config: KubernetesConfig | None = None, spec: WorkerSpec = SPEC) -> dict[str, Any]:
    return make_pod(spec, config or KubernetesConfig(), instance="0123456789abcdef", secret="keys")


def seen(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    pod = made()
    return {
        "metadata": {**pod["metadata"], **metadata},
        "spec": {**pod["spec"], "nodeName": "node7"},
        "status": {"conditions": [{"type": "PodScheduled", "status": "True"}], **status},
    }


def ended(**terminated: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "worker", "state": {"terminated": terminated}}]}


def waiting(reason: str, message: str = "", image: str = "some/image:1") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"name": "worker", "image": image, "state": state}]}


# --------------------------------------------------------------------------------------------------------- pods


def test_a_pod_shows_no_secret_and_is_found_again() -> None:
    pod = made()
    assert "hidden" not in str(pod)
    assert read_info(pod) == WorkerInfo("task1", "job1", 2, pod["metadata"]["name"])
    secret = make_secret(secret_of(pod), {"metadata": {**pod["metadata"], "uid": "u1"}}, SPEC.environment)
    assert secret["metadata"]["name"] == "keys"
    assert secret["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert secret["stringData"] == {"FLAME_TASK_KEY": "hidden"}


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80), st.integers(1, 10**6))
def test_any_task_and_job_make_names_and_labels_that_kubernetes_takes(task: str, job: str, attempt: int) -> None:
    pod = make_pod(WorkerSpec(task, job, attempt, {}), KubernetesConfig(), instance="f" * 32, secret="keys")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", pod["metadata"]["name"])
    for value in pod["metadata"]["labels"].values():
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value)
    assert read_info(pod)[:3] == (task, job, attempt)


def test_names_differ_by_server_task_and_attempt() -> None:
    workers = [("a" * 16, "t", 1), ("b" * 16, "t", 1), ("a" * 16, "T", 1), ("a" * 16, "t", 2), ("a" * 16, "t" * 80, 1)]
    names = {pod_name(instance, WorkerInfo(task, "j", attempt, "")) for instance, task, attempt in workers}
    assert len(names) == len(workers)


def test_what_the_job_says_of_a_worker_counts_before_what_the_compute_says_of_all() -> None:
    config = KubernetesConfig(resources=PodResources(requests={"cpu": 1}, limits={"memory": "1Gi"}))
    assert made(config)["spec"]["containers"][0]["resources"] == {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}}
    spec = SPEC._replace(resources=Resources(cpu=0.25, memory="64Mi", gpu=2))
    assert made(config, spec)["spec"]["containers"][0]["resources"] == {
        "requests": {"cpu": "250m", "memory": "67108864"},
        "limits": {"cpu": "250m", "memory": "67108864", "nvidia.com/gpu": 2},
    }


def test_the_configuration_reaches_the_pod() -> None:
    config = KubernetesConfig(
        image="own:1",
        image_pull_policy="Always",
        image_pull_secrets=["registry"],
        service_account="workers",
        node_selector={"pool": "gpu"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        labels={"team": "a", "flame-job": "not this"},
        annotations={"note": "b"},
    )
    pod = made(config)
    spec, worker = pod["spec"], pod["spec"]["containers"][0]
    assert (worker["image"], worker["imagePullPolicy"]) == ("own:1", "Always")
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["serviceAccountName"] == "workers"
    assert spec["automountServiceAccountToken"] is False
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["flame-job"] == "job1"
    assert pod["metadata"]["annotations"]["note"] == "b"
    assert made(config, SPEC._replace(image="theirs:2"))["spec"]["containers"][0]["image"] == "theirs:2"


def test_a_template_is_laid_over_the_pod_and_cannot_take_what_makes_it_ours() -> None:
    volume = {"name": "data", "hostPath": {"path": "/data"}}
    template = {
        "metadata": {"labels": {"flame-task": "other", "x": "y"}, "name": "other"},
        "spec": {
            "restartPolicy": "Always",
            "volumes": [volume],
            "containers": [
                {"name": "worker", "volumeMounts": [{"name": "data", "mountPath": "/data"}], "tty": True},
                {"name": "sidecar", "image": "s"},
            ],
            "initContainers": [{"name": "dependencies", "tty": True}, {"name": "first", "image": "f"}],
        },
    }
    config = KubernetesConfig(pod_template=template)
    pod = made(config)
    assert pod["metadata"]["labels"]["flame-task"] == "task1"
    assert pod["metadata"]["labels"]["x"] == "y"
    assert pod["metadata"]["name"] == made()["metadata"]["name"]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert volume in pod["spec"]["volumes"]
    worker, sidecar = pod["spec"]["containers"]
    assert (worker["tty"], sidecar["name"]) == (True, "sidecar")
    assert [mount["mountPath"] for mount in worker["volumeMounts"]] == ["/flame", "/data"]
    assert [container["name"] for container in pod["spec"]["initContainers"]] == ["first"]
    required = made(config, SPEC._replace(dependencies=["numpy"]))["spec"]["initContainers"]
    assert [container["name"] for container in required] == ["dependencies", "first"]
    assert required[0]["command"][-1] == "numpy"


def test_lists_without_names_are_replaced() -> None:
    assert merge({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": {"d": 2}}) == {"a": [3], "b": {"c": 1, "d": 2}}


# ----------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("pod", "stage", "words"),
    [
        ({"metadata": {"name": "p"}}, Stage.ROOM, "Its pod p waits"),
        (seen({"phase": "Pending", "conditions": []}), Stage.ROOM, "waits"),
        (
            seen(
                {
                    "phase": "Pending",
                    "conditions": [
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "message": "0/1 nodes are available: 1 Insufficient cpu.",
                        }
                    ],
                }
            ),
            Stage.ROOM,
            "1 Insufficient cpu",
        ),
        (seen({"phase": "Pending"}), Stage.STARTING, "is being started on node node7"),
        (seen(waiting("ContainerCreating")), Stage.STARTING, "node7"),
        (
            seen(waiting("ErrImagePull", "not found")),
            Stage.IMAGE,
            "'some/image:1' cannot be pulled (ErrImagePull): not found",
        ),
        (seen(waiting("ImagePullBackOff", "Back-off")), Stage.IMAGE, "Back-off"),
        (seen(waiting("InvalidImageName", "bad")), Stage.DOOMED, "(InvalidImageName): bad"),
        (
            seen(waiting("CreateContainerConfigError", 'secret "keys" not found')),
            Stage.REFUSED,
            'secret "keys" not found',
        ),
        (
            seen({"phase": "Pending", "initContainerStatuses": [{"name": "dependencies", "state": {"running": {}}}]}),
            Stage.STARTING,
            "installs what the job requires",
        ),
        (seen({"phase": "Running"}), Stage.RUNNING, None),
        (seen({"phase": "Running"}, deletionTimestamp="now"), Stage.LEAVING, "was deleted, and not by Flame"),
        (seen({"phase": "Unknown"}), Stage.RUNNING, "node7 has not been heard of"),
        (
            seen(
                {
                    "phase": "Running",
                    "conditions": [
                        {
                            "type": "DisruptionTarget",
                            "status": "True",
                            "reason": "DeletionByTaintManager",
                            "message": "Taint manager: deleting due to NoExecute taint",
                        }
                    ],
                },
                deletionTimestamp="now",
            ),
            Stage.LEAVING,
            "taken from node node7 (DeletionByTaintManager): Taint manager",
        ),
    ],
)
def test_what_a_pod_waits_for_is_said(pod: dict[str, Any], stage: Stage, words: str | None) -> None:
    verdict = judge(pod)
    assert verdict.stage is stage
    assert verdict.exit is None
    if words is None:
        assert verdict.message is None
    else:
        assert verdict.message is not None
        assert words in verdict.message


@pytest.mark.parametrize(
    ("status", "code", "signal", "words"),
    [
        ({"phase": "Succeeded", **ended(exitCode=0, reason="Completed")}, 0, None, None),
        ({"phase": "Running", **ended(exitCode=3, reason="Error")}, 3, None, None),
        ({"phase": "Failed", **ended(exitCode=137, reason="Error")}, None, "SIGKILL", None),
        ({"phase": "Failed", **ended(exitCode=200, reason="Error")}, 200, None, None),
        ({"phase": "Failed", **ended(exitCode=137, reason="OOMKilled")}, None, "SIGKILL", "ran out of memory"),
        (
            {"phase": "Failed", **ended(exitCode=128, reason="StartError", message='exec: "python": not found')},
            128,
            None,
            "not found",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            None,
            None,
            "evicted from node node7: The node was low on resource: memory.",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory", **ended(exitCode=137, reason="Error")},
            None,
            "SIGKILL",
            "evicted",
        ),
        (
            {"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"},
            None,
            None,
            "ended by node node7 (OutOfcpu)",
        ),
        (
            {
                "phase": "Failed",
                "conditions": [
                    {
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "DeletionByPodGC",
                        "message": "PodGC: node no longer exists",
                    }
                ],
            },
            None,
            None,
            "PodGC: node no longer exists",
        ),
        ({"phase": "Failed"}, None, None, "before its container was made"),
        (
            {
                "phase": "Pending",
                "initContainerStatuses": [
                    {
                        "name": "dependencies",
                        "state": {"terminated": {"exitCode": 1, "message": "a\nNo matching version\n"}},
                    }
                ],
            },
            None,
            None,
            "could not be installed: No matching version",
        ),
    ],
)
def test_how_a_worker_ended_is_said(
    status: dict[str, Any], code: int | None, signal: str | None, words: str | None
) -> None:
    verdict = judge(seen(status))
    assert verdict.stage is Stage.ENDED
    assert isinstance(verdict.exit, WorkerExit)
    assert (verdict.exit.exit_code, verdict.exit.signal) == (code, signal)
    assert (words or "") in (verdict.exit.message or "")
    assert bool(words) is bool(verdict.exit.message)


def test_the_memory_that_ran_out_is_named() -> None:
    pod = seen({"phase": "Failed", **ended(exitCode=137, reason="OOMKilled")})
    pod["spec"]["containers"][0]["resources"] = {"limits": {"memory": str(64 << 20)}}
    found = judge(pod).exit
    assert found is not None
    assert found.message == "Its worker ran out of memory (OOMKilled): its pod may use 64Mi."


# --------------------------------------------------------------------------------------------------------- room


def node(*, ready: str = "True", labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "n", "labels": labels or {}},
        "spec": spec,
        "status": {
            "conditions": [{"type": "Ready", "status": ready}],
            "allocatable": {"cpu": "1500m", "memory": "1Gi", "pods": "10", "nvidia.com/gpu": "1"},
        },
    }


def test_room_is_what_the_nodes_have_that_may_take_our_pods() -> None:
    one = Capacity(10, 1.5, 1 << 30, 1)
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    others = [
        node(ready="Unknown"),
        node(unschedulable=True),
        node(taints=[taint]),
        node(labels={"pool": "other"}),
    ]
    config = KubernetesConfig(node_selector={"pool": "a"})
    assert measure([node(labels={"pool": "a"}), *others], config) == one
    assert measure([*others[2:3]], KubernetesConfig()) == Capacity(0, 0, 0, 0)
    for toleration in (
        {"operator": "Exists"},
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "gpu", "value": "yes"},
    ):
        assert measure([*others[2:3]], KubernetesConfig(tolerations=[toleration])) == one
    assert measure([node(), node()], KubernetesConfig()) == Capacity(20, 3.0, 2 << 30, 2)
