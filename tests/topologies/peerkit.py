"""Jobs without a server in the threads of one process, and what they must compute, by plain numpy."""

import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "sdk"))
from syncjob import InThread, Job

RING = {
    "name": "ring",
    "pair": ["trainer", "trainer"],
    "groupBy": {"type": "tag", "value": ["default"]},
    "funcTags": {"trainer": ["ring_allreduce"]},
}


def data_of(number, size=40):
    """A member's samples: 3 features and a target."""
    rng = np.random.default_rng(number)
    x = rng.normal(size=(size + 7 * number, 3)) + number
    return x, x @ np.array([1.0, -2.0, 0.5]) + rng.normal(size=len(x))


def step(weights, number, rate=0.01, size=40):
    """A round of local training: one step of gradient descent on the mean squared error."""
    x, y = data_of(number, size)
    error = x @ weights["w"] + weights["b"] - y
    return {"w": weights["w"] - rate * error @ x / len(y), "b": weights["b"] - rate * error.mean()}


def mean(models, counts):
    total = sum(counts)
    return {
        name: sum(count / total * model[name] for model, count in zip(models, counts, strict=True))
        for name in models[0]
    }


def count_of(number, size=40):
    return size + 7 * number


class Line:
    """The user's part of a peer: the same for every topology. Remembers the model after each round."""

    number: int
    pause: "threading.Event | None" = None

    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id.split("-")[1])
        self.after = {}
        self.trained = []

    def load_data(self):
        self.dataset_size = count_of(self.number)

    def initialize(self):
        self.model = {"w": np.full(3, float(self.number)), "b": np.array(0.5)}

    def train(self):
        self.trained.append(self._round)
        self.hold(self._round)
        self.model.update(step(self.model, self.number))

    def hold(self, round):
        """For tests that stop a member in its tracks."""

    def evaluate(self):
        self.after[self._round] = {name: np.array(value) for name, value in self.model.items()}
        self.update_metrics({"w0": self.model["w"][0]})


def settings(channel=RING, peers=0, rounds=3, **more):
    """What every member's configuration says."""
    return {
        "channels": [channel],
        "groupAssociation": {channel["name"]: "default"},
        "peers": {channel["name"]: peers},
        "rounds": rounds,
        **more,
    }


def federated(numbers, rounds, start=None, size=40):
    """FedAvg among some members, by plain numpy: the model after each round."""
    model = start or {"w": np.full(3, float(min(numbers))), "b": np.array(0.5)}
    after = {}
    for number in range(1, rounds + 1):
        model = mean([step(model, n, size=size) for n in numbers], [count_of(n, size) for n in numbers])
        after[number] = model
    return after


def close(one, other, tolerance=1e-9):
    return all(np.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in other)


def said(kind, roles):
    """What some members reported, together."""
    return [entry for role in roles for entry in role.link_for_test.of(kind)]


__all__ = ["RING", "InThread", "Job", "Line", "close", "count_of", "federated", "mean", "said", "settings", "step"]
