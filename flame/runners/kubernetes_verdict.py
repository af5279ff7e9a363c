"""What a pod's status means for its worker. Pure.

Kubernetes tells in half a dozen places why a pod does not run; this module knows them all, and says it in one sentence.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

from flame.runners.base import WorkerExit
from flame.runners.kubernetes_pod import CONTAINER, INSTALLER
from flame.spec.quantities import show_bytes

_HOPELESS = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_PULLING = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"})
_REFUSED = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_CANNOT_RUN = frozenset({"StartError", "ContainerCannotRun"})
_LONGEST = 500


class Stage(enum.Enum):
    """Where a pod is on its way; what it waits for, and so who decides for how long."""

    ROOM = "waits for a node"
    IMAGE = "its image cannot be pulled"
    REFUSED = "its container cannot be made"
    STARTING = "is on its node"
    RUNNING = "runs"
    LEAVING = "is being removed"
    DOOMED = "can never run"
    ENDED = "has ended"


class Verdict(NamedTuple):
    """A stage, the sentence about it, and how the worker ended when it has. ``judged``: the scheduler has said why no node takes it."""

    stage: Stage
    message: str | None = None
    exit: WorkerExit | None = None
    judged: bool = False


def judge(pod: Mapping[str, Any]) -> Verdict:
    """What has become of a worker.

    :param pod: as the API server gives it.
    """
    status: Mapping[str, Any] = pod.get("status", {})
    phase = status.get("phase")
    cause = _removal(pod)
    worker, installer = _container(status, CONTAINER), _container(status, INSTALLER)
    ended = worker.get("state", {}).get("terminated")
    failed = installer.get("state", {}).get("terminated", {})
    if not ended and failed.get("exitCode"):
        cause = cause or f"What the job requires could not be installed: {_last_line(failed.get('message')) or failed}"
    if ended or phase in ("Succeeded", "Failed") or failed.get("exitCode"):
        return Verdict(Stage.ENDED, exit=_exit(ended, cause or _no_container(status, ended), pod))
    if cause is not None:
        return Verdict(Stage.LEAVING, cause)
    if phase == "Running":
        return Verdict(Stage.RUNNING)
    if phase == "Unknown":
        return Verdict(Stage.RUNNING, f"Its node {_node(pod)} has not been heard of.")
    return _waiting(pod, worker, installer)


def _waiting(pod: Mapping[str, Any], worker: Mapping[str, Any], installer: Mapping[str, Any]) -> Verdict:
    name, conditions = pod["metadata"]["name"], _conditions(pod)
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") != "True":
        why = scheduled.get("message")
        if why:
            return Verdict(Stage.ROOM, f"No node takes its pod {name}: {_short(why)}", judged=True)
        return Verdict(Stage.ROOM, f"Its pod {name} waits.")
    for container in (worker, installer):
        waiting = container.get("state", {}).get("waiting", {})
        reason, message = waiting.get("reason"), _short(waiting.get("message") or "")
        image = container.get("image")
        if reason in _HOPELESS:
            return Verdict(Stage.DOOMED, f"Its image {image!r} cannot be had ({reason}): {message}")
        if reason in _PULLING:
            return Verdict(Stage.IMAGE, f"Its image {image!r} cannot be pulled ({reason}): {message}")
        if reason in _REFUSED:
            return Verdict(Stage.REFUSED, f"Its container cannot be made ({reason}): {message}")
    if "running" in installer.get("state", {}):
        return Verdict(Stage.STARTING, f"Its pod {name} installs what the job requires.")
    return Verdict(Stage.STARTING, f"Its pod {name} is being started on node {_node(pod)}.")


def _removal(pod: Mapping[str, Any]) -> str | None:
    """Why somebody else ends the pod; None where nobody does."""
    status: Mapping[str, Any] = pod.get("status", {})
    name = pod["metadata"]["name"]
    reason, message = status.get("reason"), _short(status.get("message") or "")
    disruption = _conditions(pod).get("DisruptionTarget", {})
    if reason == "Evicted":
        return f"Its pod {name} was evicted from node {_node(pod)}: {message}"
    if disruption.get("status") == "True":
        said = _short(disruption.get("message") or "")
        return f"Its pod {name} was taken from node {_node(pod)} ({disruption.get('reason')}): {said}"
    if reason:
        return f"Its pod {name} was ended by node {_node(pod)} ({reason}): {message}"
    if pod["metadata"].get("deletionTimestamp"):
        return f"Its pod {name} was deleted, and not by Flame."
    return None


def _no_container(status: Mapping[str, Any], ended: Any) -> str | None:
    """The sentence for a pod that ended and whose container never was."""
    if ended is None:
        return "Its pod ended before its container was made" + (f": {m}" if (m := status.get("message")) else ".")
    return None


def _exit(ended: Mapping[str, Any] | None, cause: str | None, pod: Mapping[str, Any]) -> WorkerExit:
    if ended is None:
        return WorkerExit(None, None, cause)
    code, reason = int(ended.get("exitCode", 0)), ended.get("reason")
    if reason in _CANNOT_RUN:
        return WorkerExit(code, None, f"Its container could not be started: {_short(ended.get('message') or reason)}")
    name = _signal(code)
    if reason == "OOMKilled" and cause is None:
        return WorkerExit(None if name else code, name, _out_of_memory(pod))
    if name is not None:
        return WorkerExit(None, name, cause)
    return WorkerExit(code, None, cause)


def _out_of_memory(pod: Mapping[str, Any]) -> str:
    for container in pod.get("spec", {}).get("containers", ()):
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if container["name"] == CONTAINER and limit:
            limit = show_bytes(int(limit)) if limit.isdigit() else limit
            return f"Its worker ran out of memory (OOMKilled): its pod may use {limit}."
    return "Its worker ran out of memory (OOMKilled)."


def _signal(code: int) -> str | None:
    """A container's status of more than 128 stands for a signal."""
    try:
        return signal.Signals(code - 128).name if code > 128 else None
    except ValueError:
        return None


def _container(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    known = [*status.get("containerStatuses", ()), *status.get("initContainerStatuses", ())]
    found: Mapping[str, Any] = next((one for one in known if one.get("name") == name), {})
    return found


def _conditions(pod: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {one["type"]: one for one in pod.get("status", {}).get("conditions", ())}


def _node(pod: Mapping[str, Any]) -> str:
    return str(pod.get("spec", {}).get("nodeName") or "?")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _last_line(text: str | None) -> str:
    return _short((text or "").strip().rpartition("\n")[2])
