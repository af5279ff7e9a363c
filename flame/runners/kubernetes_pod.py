"""From a worker to the pod and the secret that make it one, and back. Pure.

A pod's labels say whose it is, so that a restarted server finds it. Everything that the flamelet is told by its environment
is in a Secret that belongs to the pod: who may read pods does not read keys, and the cluster removes it with the pod. The pod is made
first, since a Secret can only belong to what is there; the kubelet waits for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from flame.runners.base import WorkerInfo, WorkerSpec
from flame.runners.kubernetes_config import KubernetesConfig

Object = dict[str, Any]

#: The container that runs the flamelet, and the one before it that installs what the job requires.
CONTAINER = "worker"
INSTALLER = "dependencies"

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,57}[a-z0-9])?")
_FOLDER = "/flame"
_ENVIRONMENT = f"{_FOLDER}/environment"
#: Where crashes are tried, the folder in which a worker is told where (:mod:`flame.sdk.chaospoints`): none of the server's, which no pod sees.
POINTS = f"{_FOLDER}/points"
# The installer says which interpreter has it all: the image's own, where nothing was missing.
_WITH_DEPENDENCIES = (
    f"import os; p = open('{_ENVIRONMENT}/python').read(); os.execv(p, [p, '-P', '-m', os.environ['FLAME_MODULE']])"
)


def selector(instance: str) -> str:
    """What finds all pods of a server."""
    return f"flame-instance={_label(instance)}"


def selector_of_job(job: str) -> str:
    """What finds all pods of a job."""
    return f"flame-job={_label(job)}"


def pod_name(instance: str, worker: WorkerSpec | WorkerInfo) -> str:
    """A pod's name: the same for the same attempt, another one for another server."""
    name = f"flame-{instance[:8]}-{worker.task}-{worker.attempt}"
    if _NAME.fullmatch(name):
        return name
    return "flame-" + hashlib.sha256(f"{instance}/{worker.task}/{worker.attempt}".encode()).hexdigest()[:40]


def make_pod(spec: WorkerSpec, config: KubernetesConfig, *, instance: str, secret: str) -> Object:
    """The pod of a worker.

    :param secret: the name of the Secret with its environment.
    """
    labels = {
        "app.kubernetes.io/name": "flame-worker",
        "app.kubernetes.io/managed-by": "flame",
        "flame-instance": _label(instance),
        "flame-job": _label(spec.job),
        "flame-task": _label(spec.task),
        "flame-attempt": str(spec.attempt),
    }
    said = {"flame/job": spec.job, "flame/task": spec.task}
    image = spec.image or config.image
    volumes = [{"name": "flame", "emptyDir": {}}]
    container: Object = {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["python", "-P", "-m", spec.module],
        "env": [
            {"name": "FLAME_P2P_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "FLAME_WORK_DIR", "value": f"{_FOLDER}/work"},
        ],
        "envFrom": [{"secretRef": {"name": secret}}],
        "resources": _resources(spec, config),
        "volumeMounts": [{"name": "flame", "mountPath": _FOLDER}],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _contained(),
    }
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(instance, spec),
            "labels": {**config.labels, **labels},
            "annotations": {**config.annotations, **said},
        },
        "spec": {
            "restartPolicy": "Never",  # an attempt is never run twice
            "containers": [container],
            "volumes": volumes,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # Then the worker is not process 1, which would have to reap what a role's code leaves behind, and takes no signal
            # that it has not asked for.
            "shareProcessNamespace": True,
            "terminationGracePeriodSeconds": 10,
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "imagePullSecrets": [{"name": name} for name in config.image_pull_secrets],
            "nodeSelector": config.node_selector,
            "tolerations": config.tolerations,
        },
    }
    if config.service_account:
        pod["spec"]["serviceAccountName"] = config.service_account
    if spec.dependencies:
        container["command"] = ["python", "-P", "-c", _WITH_DEPENDENCIES]
        container["env"].append({"name": "FLAME_MODULE", "value": spec.module})
        pod["spec"]["initContainers"] = [
            {
                "name": INSTALLER,
                "image": image,
                "imagePullPolicy": config.image_pull_policy,
                "command": ["python", "-P", "-m", "flame.runners.environments", _ENVIRONMENT, *spec.dependencies],
                "resources": container["resources"],
                "volumeMounts": container["volumeMounts"],
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": _contained(),
            }
        ]
    whole: Object = merge(pod, config.pod_template)
    whole["metadata"]["labels"] |= labels
    whole["metadata"]["annotations"] |= said
    whole["metadata"]["name"] = pod["metadata"]["name"]
    whole["spec"]["restartPolicy"] = "Never"
    if not spec.dependencies:  # what the template says of the installer is for pods that have one
        before = whole["spec"].get("initContainers", [])
        whole["spec"]["initContainers"] = [container for container in before if container["name"] != INSTALLER]
    return whole


def make_secret(name: str, pod: Object, environment: Mapping[str, str]) -> Object:
    """The Secret with a worker's environment, which goes when the pod goes.

    :param pod: as the cluster has made it.
    """
    if "FLAME_CHAOS" in environment:
        environment = {**environment, "FLAME_CHAOS": POINTS}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": name,
            "labels": {
                label: value for label, value in pod["metadata"]["labels"].items() if label.startswith("flame-")
            },
            "ownerReferences": [
                {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
            ],
        },
        "stringData": dict(environment),
    }


def secret_of(pod: Object) -> str:
    """The name of the Secret that a pod waits for."""
    worker = next(container for container in pod["spec"]["containers"] if container["name"] == CONTAINER)
    return str(next(source["secretRef"]["name"] for source in worker["envFrom"] if "secretRef" in source))


def read_info(pod: Object) -> WorkerInfo:
    """Whose pod it is.

    :raises KeyError: not one of ours.
    """
    meta = pod["metadata"]
    said = meta.get("annotations", {})
    return WorkerInfo(said["flame/task"], said["flame/job"], int(meta["labels"]["flame-attempt"]), meta["name"])


def merge(base: Any, over: Any) -> Any:
    """``over`` laid over ``base``: mappings key by key, lists of things with names by name, all else replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        both = {key: merge(base[key], over[key]) if key in base else over[key] for key in over}
        return {**base, **both}
    if isinstance(base, list) and isinstance(over, list):
        key = next((key for key in ("mountPath", "name") if _all_have(key, base, over)), None)
        if key is not None:
            new = {one[key]: one for one in over}
            merged = [merge(one, new.pop(one[key])) if one[key] in new else one for one in base]
            return merged + list(new.values())
    return over


def _all_have(key: str, *lists: list[Any]) -> bool:
    return all(isinstance(one, Mapping) and key in one for items in lists for one in items)


def _resources(spec: WorkerSpec, config: KubernetesConfig) -> Object:
    """What the job says of a worker counts before what the compute says of all."""
    requests: Object = dict(config.resources.requests)
    limits: Object = dict(config.resources.limits)
    if spec.resources.cpu is not None:
        requests["cpu"] = limits["cpu"] = f"{round(spec.resources.cpu * 1000)}m"
    if spec.resources.memory_bytes is not None:
        requests["memory"] = limits["memory"] = str(spec.resources.memory_bytes)
    if spec.resources.gpu:
        limits[config.gpu_resource] = spec.resources.gpu
    return {"requests": requests, "limits": limits}


def _contained() -> Object:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _label(value: str) -> str:
    """A label's value: as it is where Kubernetes allows that, else a digest."""
    return value if _LABEL.fullmatch(value) else hashlib.sha256(value.encode()).hexdigest()[:32]
