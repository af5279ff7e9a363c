"""Evaluating a model at its sites gives what it would measure on all their data in one place."""

import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from runkit import Run
from syncjob import InThread, Job

from flame.errors import RoundFailed, WorkerError
from flame.sdk import Aggregator, Trainer
from flame.sdk.mode.evaluation.aggregator import EvaluationAggregator
from flame.sdk.mode.evaluation.evaluator import Evaluator

MODEL = {"w": np.array([0.5, -1.0, 2.0])}


def data(number):
    rng = np.random.default_rng(number)
    return rng.standard_normal((20 + 15 * number, 3)), rng.standard_normal(20 + 15 * number)


def errors(w, number):
    x, y = data(number)
    return np.square(x @ w - y)


class Site(InThread, Evaluator):
    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id.split("-")[1])

    def load_data(self):
        self.dataset_size = len(data(self.number)[0])

    def initialize(self):
        self.model = {"w": np.zeros(3)}

    def train(self):
        raise AssertionError("nothing is trained")

    def evaluate(self):
        self.update_metrics({"loss": errors(self.model["w"], self.number).mean()})
        if self.number == 2:
            self.update_metrics({"here only": 7})


class Trial(InThread, EvaluationAggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {name: array.copy() for name, array in MODEL.items()}


@pytest.mark.parametrize("deterministic", [False, True])
def test_metrics_are_those_of_the_pooled_data(tmp_path, deterministic):
    job = Job(tmp_path)
    policy = {"deterministic": deterministic}
    trial = job.add(Trial, "aggregator", rounds=1, trainers=4, policy=policy)
    sites = [job.add(Site, "trainer", number, policy=policy) for number in range(4)]
    job.run()
    each = [errors(MODEL["w"], number) for number in range(4)]
    ((number, metrics),) = trial.link_for_test.of("round")
    assert number == 1
    assert metrics == pytest.approx(
        {
            "loss": np.concatenate(each).mean(),
            "min loss": min(one.mean() for one in each),
            "max loss": max(one.mean() for one in each),
            "here only": 7,
            "min here only": 7,
            "max here only": 7,
            "sites": 4,
            "samples": sum(map(len, each)),
        }
    )
    assert sites[1].link_for_test.of("metrics") == [(1, {"loss": pytest.approx(each[1].mean())})]
    assert (trial.model["w"] == MODEL["w"]).all()


def test_a_registered_model_goes_before_the_one_that_is_made(tmp_path):
    registry = {"sort": "local", "uri": str(tmp_path / "registry")}

    class Made(InThread, Aggregator):
        def __init__(self, config):
            self.config = config

        def initialize(self):
            self.model = {"w": np.zeros(3)}

    class Trained(InThread, Trainer):
        def __init__(self, config):
            self.config = config

        def initialize(self):
            self.model = {"w": np.zeros(3)}

        def train(self):
            self.model["w"] = np.array([3.0, 1.0, -2.0])
            self.dataset_size = 1

    first = Job(tmp_path / "1")
    first.add(Made, "aggregator", rounds=1, trainers=1, registry=registry)
    first.add(Trained, "trainer", 0)
    first.run()
    second = Job(tmp_path / "2")
    base = {"name": "test", "version": 1}
    trial = second.add(Trial, "aggregator", rounds=1, trainers=1, registry=registry, baseModel=base)
    second.add(Site, "trainer", 0)
    second.run()
    ((_, metrics),) = trial.link_for_test.of("round")
    assert metrics["loss"] == pytest.approx(errors(np.array([3.0, 1.0, -2.0]), 0).mean())


class Held(Site):
    """Site 2 waits in evaluate, and dies there."""

    reached, go = threading.Event(), threading.Event()

    def evaluate(self):
        if self.number == 2:
            self.reached.set()
            assert self.go.wait(30)
            raise RuntimeError("killed")
        super().evaluate()


@pytest.mark.parametrize("least", [2, 3])
def test_a_site_that_leaves_is_not_waited_for(tmp_path, least):
    job = Job(tmp_path)
    held = type("Held", (Held,), {"reached": threading.Event(), "go": threading.Event()})
    policy = {"minTrainers": least, "joinDeadline": 0.5}
    trial = job.add(Trial, "aggregator", rounds=1, trainers=3, policy=policy)
    for number in range(3):
        job.add(held, "trainer", number, policy=policy)
    for role in job.roles:
        job.start(role)
    assert held.reached.wait(30)
    held.go.set()
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive()
    if least == 3:
        assert isinstance(job.errors[trial], RoundFailed)
        return
    ((_, metrics),) = trial.link_for_test.of("round")
    assert metrics["loss"] == pytest.approx(np.concatenate([errors(MODEL["w"], 0), errors(MODEL["w"], 1)]).mean())
    assert metrics["sites"] == 2


def test_a_site_that_measures_nothing_is_told_so(tmp_path):
    job = Job(tmp_path)
    job.add(Trial, "aggregator", rounds=1, trainers=1, policy={"joinDeadline": 0.5})
    site = job.add(type("Blind", (Site,), {"evaluate": lambda self: None}), "trainer", 0)
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive()
    with pytest.raises(WorkerError, match="Blind has measured nothing"):
        raise job.errors[site]


# Through the whole system, as processes over p2p.


def test_the_example_measures_a_model_at_four_sites(tmp_path):
    with Run(tmp_path, "evaluation") as run:
        result = run.result()
    assert result.state == "completed", result.text
    assert result.models == {}
    assert float(re.findall(r"accuracy ([\d.]+)", result.text)[0]) > 0.98
    (kept,) = run.data.glob("registry/runs/*/metrics.jsonl")
    metrics = json.loads(kept.read_text())["metrics"]
    assert (metrics["sites"], metrics["samples"]) == (4, 1437)
    assert metrics["min accuracy"] <= metrics["accuracy"] <= metrics["max accuracy"]


def test_a_killed_site_is_not_waited_for_where_the_policy_does_without_it(tmp_path):
    settings = ["hyperparameters={rounds: 300}", "policy.minTrainers=3"]
    with Run(tmp_path, "evaluation", *settings) as run:
        run.wait_for("round 1/")
        run.kill_one("trainer")
        result = run.result()
    assert "SIGKILL" in result.text
    assert result.state == "completed", result.text
