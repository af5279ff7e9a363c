"""The names that a job can choose from: algorithms, backends, registries, compressions, function tags.

This is what the control plane knows of the data plane: names, so that a misspelt one is refused when the job is
submitted and not when its workers have started. The code behind a name is in :mod:`flame.sdk`, which the
control plane never imports. A name that is not built in may come from a package that is installed beside
Flame and declares it as an entry point; those are looked up only when a name is not found here, because
the look-up reads the metadata of every installed package.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flame.spec.shape import suggestion


class Kind(NamedTuple):
    """One kind of choice.

    :ivar noun: what one is called in a sentence, such as ``optimizer``.
    :ivar names: the built-in names.
    :ivar group: the entry point group by which packages add to them; None where none can.
    """

    noun: str
    names: tuple[str, ...]
    group: str | None = None


OPTIMIZERS = Kind(
    "optimizer",
    (
        "fedavg",
        "fedavgm",
        "fedprox",
        "fedadam",
        "fedadagrad",
        "fedyogi",
        "feddyn",
        "scaffold",
        "fedbuff",
        "fedgft",
        "median",
        "trimmedmean",
        "krum",
        "multikrum",
    ),
    "flame.optimizers",
)
SELECTORS = Kind("selector", ("default", "random", "oort", "fedbuff", "async_oort", "round_robin"), "flame.selectors")
DATASAMPLERS = Kind("datasampler", ("default", "fedbalancer"), "flame.datasamplers")
PRIVACIES = Kind("privacy", ("default", "dp"), "flame.privacies")
BACKENDS = Kind("backend", ("inproc", "p2p", "mqtt"), "flame.backends")
REGISTRIES = Kind("registry", ("default", "mlflow", "local", "dummy"), "flame.registries")
COMPRESSIONS = Kind("compression", ("none", "float16", "bfloat16", "int8", "topk"), "flame.compressions")
PRIORITIES = Kind("priority", ("low", "medium", "high"))

#: Which functions of a role can be bound to a channel: those that the roles of Flame's library declare, and
#: those of the further topologies.
FUNC_TAGS = Kind(
    "function tag",
    (
        # two and more tiers, synchronous, asynchronous, eager
        "fetch",
        "upload",
        "distribute",
        "aggregate",
        "heartbeat_send",
        "heartbeat_recv",
        # FedGFT
        "distributeBias",
        "aggregateBias",
        # coordinated
        "coordinate",
        "coordinateWithTopAgg",
        "coordinateWithMidAgg",
        "coordinateWithLeafAgg",
        "coordinateWithTrainer",
        "notifyCoordinator",
        "getAggregator",
        "getTrainers",
        "getMetaData",
        # distributed and hybrid
        "ring_allreduce",
        # gossip
        "gossip",
        # vertical: alignment of samples, activations, gradients
        "align",
        "forward",
        "backward",
        # swarm: the aggregating role is handed on
        "elect",
        "handover",
        # analytics and evaluation
        "query",
        "answer",
        "evaluate",
        "report",
        # plain messages of a role of one's own
        "put",
        "get",
    ),
    "flame.functags",
)

#: A function tag of one's own begins so, and is never refused.
OWN_TAG = "x-"


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


_BUILT_IN: dict[str, dict[str, str]] = {}


def canonical(kind: Kind, name: str) -> str | None:
    """The name as it is spelt here, or None if there is none such.

    Case, dashes, underscores and blanks do not matter, so ``FedAvg`` and ``trimmed_mean`` are understood.
    """
    names = _BUILT_IN.setdefault(kind.noun, {_folded(built_in): built_in for built_in in kind.names})
    found = names.get(_folded(name))
    if found is None and kind.group is not None:
        from importlib.metadata import entry_points

        found = next((entry.name for entry in entry_points(group=kind.group) if entry.name == name), None)
    return found


def canonical_tag(tag: str) -> str | None:
    """A function tag as it is spelt here, or None; tags are code, so their spelling matters."""
    if tag.startswith(OWN_TAG) and len(tag) > len(OWN_TAG):
        return tag
    if tag in FUNC_TAGS.names:
        return tag
    from importlib.metadata import entry_points

    return next((tag for entry in entry_points(group=FUNC_TAGS.group or "") if entry.name == tag), None)


def unknown(kind: Kind, name: str) -> str:
    """The sentence about a name that is not known, with the likely one or all there are."""
    plural = {"privacy": "the privacies", "registry": "the registries", "priority": "the priorities"}
    return f"unknown {kind.noun} {name!r}; {suggestion(name, kind.names, plural.get(kind.noun, f'the {kind.noun}s'))}"
