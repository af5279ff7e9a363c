"""What a cluster's nodes have in all for workers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flame.runners.base import Capacity
from flame.runners.kubernetes_config import KubernetesConfig
from flame.spec.quantities import parse_bytes


def measure(nodes: Sequence[Mapping[str, Any]], config: KubernetesConfig) -> Capacity:
    """What the nodes that may take our pods have together.

    :param nodes: as the API server lists them.
    """
    fit = [node for node in nodes if _fits(node, config)]
    allocatable = [node.get("status", {}).get("allocatable", {}) for node in fit]
    return Capacity(
        slots=sum(int(one.get("pods", 0)) for one in allocatable),
        cpu=sum(_cores(str(one.get("cpu", "0"))) for one in allocatable),
        memory=sum(_bytes(str(one.get("memory", "0"))) for one in allocatable),
        gpu=sum(int(one.get(config.gpu_resource, 0)) for one in allocatable),
    )


def _fits(node: Mapping[str, Any], config: KubernetesConfig) -> bool:
    """Ready, open to pods, of the labels that are asked for, and without a taint that nobody tolerates."""
    spec, labels = node.get("spec", {}), node["metadata"].get("labels", {})
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"].get("conditions", ()))
    return (
        ready
        and not spec.get("unschedulable")
        and all(labels.get(name) == value for name, value in config.node_selector.items())
        and all(
            taint.get("effect") == "PreferNoSchedule" or any(_tolerates(one, taint) for one in config.tolerations)
            for taint in spec.get("taints", ())
        )
    )


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


def _cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _bytes(quantity: str) -> int:
    return 0 if quantity == "0" else parse_bytes(quantity)
