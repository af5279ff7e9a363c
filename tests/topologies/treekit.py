"""Jobs of any topology in the threads of one process: a real schema, really expanded, real roles over real channels."""

import sys
import uuid
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from syncjob import InThread, Job, Recorder

from flame.sdk import Aggregator, MiddleAggregator, Trainer
from flame.sdk.config import Config
from flame.spec.expand import expand
from flame.spec.nouns import JobForm

DOWN = ["distribute", "aggregate"]
UP = ["fetch", "upload"]


def channel(name, lower, upper, groups=("default",), **more):
    return {
        "name": name,
        "pair": [lower, upper],
        "groupBy": {"type": "tag", "value": list(groups)},
        "funcTags": {lower: UP, upper: DOWN},
        **more,
    }


def three_tiers(groups=("eu", "na"), upper=None, lower=None):
    """Trainers in groups, an aggregator a group, one on top."""
    return {
        "name": "three",
        "roles": [
            {"name": "trainer", "isDataConsumer": True, "groupAssociation": [{"param": g} for g in groups]},
            {"name": "middle", "groupAssociation": [{"param": g, "global": "default"} for g in groups]},
            {"name": "top"},
        ],
        "channels": [
            channel("param", "trainer", "middle", groups, **(lower or {})),
            channel("global", "middle", "top", **(upper or {})),
        ],
    }


def four_tiers():
    """Two regions of two groups each."""
    groups = {"west": ("uk", "fr"), "east": ("jp", "kr")}
    leaves = [g for each in groups.values() for g in each]
    return {
        "name": "four",
        "roles": [
            {"name": "trainer", "isDataConsumer": True, "groupAssociation": [{"param": g} for g in leaves]},
            {
                "name": "leaf",
                "groupAssociation": [{"param": g, "region": r} for r, each in groups.items() for g in each],
            },
            {"name": "middle", "groupAssociation": [{"region": r, "global": "default"} for r in groups]},
            {"name": "top"},
        ],
        "channels": [
            channel("param", "trainer", "leaf", leaves),
            channel("region", "leaf", "middle", groups),
            channel("global", "middle", "top"),
        ],
    }


class Site(InThread, Trainer):
    """A site with a point of its own, towards which it steps; stands for number + 1 samples."""

    def __init__(self, config):
        self.config = config
        self.number = int(config.dataset.rsplit("/", 1)[1])
        self.rounds = []

    def initialize(self):
        self.model = {"w": np.zeros(3), "n": np.zeros((), np.int64)}

    def train(self):
        self.rounds.append(self._round)
        self.model["w"] = trained(self.model["w"], self.number)
        self.model["n"] = self.model["n"] + 1
        self.dataset_size = self.number + 1


class Middle(InThread, MiddleAggregator):
    pass


class Top(InThread, Aggregator):
    def __init__(self, config):
        self.config = config
        self.after = []

    def initialize(self):
        self.model = {"w": np.zeros(3), "n": np.zeros((), np.int64)}

    def evaluate(self):
        self.after.append(np.array(self.model["w"]))
        self.update_metrics({"norm": float(np.linalg.norm(self.model["w"]))})


def trained(w, number):
    """What a site's training makes of a model: not linear, and different at each site."""
    return w + 0.3 * (np.array([number, 1.0 - number, 0.5 * number]) - w) + 0.1 * np.sin(w + number)


def central(numbers, rounds):
    """What one aggregator of all sites would compute, by the paper's formula."""
    w, after = np.zeros(3), []
    for _ in range(rounds):
        counts = [number + 1 for number in numbers]
        w = sum(c * trained(w, n) for n, c in zip(numbers, counts, strict=True)) / sum(counts)
        after.append(w)
    return np.array(after)


def tasks_of(schema, groups, **more):
    """The configurations of a job's tasks.

    :param groups: how many datasets each group of the trainers has.
    """
    spec, number = {}, 0
    for group, count in groups.items():
        spec[group] = [str(number + at) for at in range(count)]
        number += count
    raw = {
        "name": "test",
        "schema": schema,
        "backend": "inproc",
        "registry": {"sort": "dummy"},
        "datasets": [{"id": str(n), "name": str(n), "url": f"file:///{n}"} for n in range(number)],
        "dataSpec": [{"role": "trainer", "datasetGroups": spec}],
        "restart": {"attempts": 0},  # nobody would replace a thread
        **more,
    }
    form = msgspec.convert(raw, JobForm)
    return expand(form, None, {dataset.id: dataset for dataset in form.datasets}, uuid.uuid4().hex[:24])


class Tree(Job):
    """A job of any schema.

    :param classes: the class of each role.
    :param settings: the job's, such as ``modelSpec`` and ``policy``.
    """

    def __init__(self, folder, schema, groups, classes, **settings):
        super().__init__(folder)
        self.by_role = {}
        for task in tasks_of(schema, groups, **settings):
            role = classes[task.role](Config(task))
            role.link_for_test = Recorder(folder / task.taskid)
            self.roles.append(role)
            self.by_role.setdefault(task.role, []).append(role)

    def __getitem__(self, role):
        return self.by_role[role]


def spec(rounds, optimizer=None, selector=None, **hyperparameters):
    made = {"hyperparameters": {"rounds": rounds, **hyperparameters}}
    if optimizer:
        made["optimizer"] = optimizer
    if selector:
        made["selector"] = selector
    return made
