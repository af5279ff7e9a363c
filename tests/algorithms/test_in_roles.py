"""The algorithms in real roles, over real channels: what a job names is what happens."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "sdk"))
from syncjob import InThread, Job

from flame.errors import SpecError, WorkerError
from flame.sdk import Aggregator, Trainer, optimizers
from flame.sdk.selectors.base import PROP_ROUND_DURATION, PROP_STAT_UTILITY

RATE, STEPS, TARGETS = 0.1, 4, ([0.0, 4.0], [2.0, 0.0], [4.0, 2.0])


class Site(InThread, Trainer):
    """Gradient steps towards a point of its own, with the algorithm's term. The mean of the points is (2, 2)."""

    local_steps = STEPS
    stat_utility = 3.5

    def __init__(self, config):
        self.config = config
        self.target = np.array(TARGETS[int(config.task_id.split("-")[1])])
        self.told = []

    def load_data(self):
        self.data = self.datasampler.load_dataset([(float(i), 0) for i in range(10)])

    def initialize(self):
        self.model = {"w": np.zeros(2), "n": np.zeros((), np.int64)}

    def train(self):
        if self.config.datasampler.sort == "fedbalancer":
            self.used = len(self.datasampler.sample(self.data, losses=np.ones(10)))
            self.told.append(self.datasampler.threshold)
        for _ in range(STEPS):
            slope = self.regularizer.gradient({"w": self.model["w"]}).get("w", 0)
            self.model["w"] = self.model["w"] - RATE * (self.model["w"] - self.target + slope)
        self.model["n"] = np.asarray(self.model["n"] + 1)
        self.dataset_size = 10

    def evaluate(self): ...


class Center(InThread, Aggregator):
    def __init__(self, config):
        self.config = config
        self.seen = {}

    def load_data(self): ...

    def initialize(self):
        self.model = {"w": np.zeros(2), "n": np.zeros((), np.int64)}

    def evaluate(self):
        channel = self.channel("distribute")
        for end in channel.all_ends():
            noted = [channel.get_end_property(end, key) for key in (PROP_STAT_UTILITY, PROP_ROUND_DURATION)]
            if noted[0] is not None:
                self.seen[end] = noted


def run(tmp_path, *, rounds, **more):
    job = Job(tmp_path)
    more["hyperparameters"] = {"rounds": rounds, "learningRate": RATE}
    center = job.add(Center, "aggregator", trainers=len(TARGETS), **more)
    sites = [job.add(Site, "trainer", number, **more) for number in range(len(TARGETS))]
    job.run()
    return center, sites


KWARGS = {
    "fedprox": {"mu": 0.1},
    "feddyn": {"alpha": 1.0},
    "krum": {"f": 0},
    "multikrum": {"f": 0},
    "fedadam": {"eta": 0.3},
    "fedyogi": {"eta": 0.3},
    "fedadagrad": {"eta": 1.0},
}


@pytest.mark.parametrize("sort", sorted(set(optimizers.names()) - {"fedgft", "krum"}))
def test_every_optimizer_brings_a_job_to_its_goal(tmp_path, sort):
    center, _ = run(tmp_path, rounds=60, optimizer={"sort": sort, "kwargs": KWARGS.get(sort, {})})
    np.testing.assert_allclose(center.model["w"], 2.0, atol=0.15)
    assert center.model["n"].dtype == np.int64
    assert center.model["n"] == 60


def private(**kwargs):
    return {"sort": "dp", "kwargs": {"clip_threshold": 1.0, "noise_factor": 2.0, "delta": 1e-3, **kwargs}}


@pytest.mark.parametrize("sort", ["fedavg", "fedbuff"])
def test_a_private_job_reports_epsilon_and_ends_at_its_budget(tmp_path, sort):
    center, _ = run(tmp_path, rounds=50, privacy=private(budget=8.0), optimizer={"sort": sort, "kwargs": {}})
    reported = [metrics["epsilon"] for _, metrics in center.link_for_test.of("round")]
    assert 1 < len(reported) < 50
    assert reported == sorted(reported)
    assert reported[-1] <= 8.0
    assert any("privacy's budget" in warning for warning in center.link_for_test.of("warning"))
    assert center.model["n"] == 0  # counters stay at home
    assert center.model["w"].any()


def test_a_budget_for_less_than_a_round_is_refused_before_anything_is_sent(tmp_path):
    job = Job(tmp_path)
    job.add(Center, "aggregator", privacy=private(budget=0.01))
    with pytest.raises(SpecError, match="budget is less than one round costs"):
        job.run()


def test_arrays_that_privacy_does_not_cover_do_not_leave(tmp_path):
    with pytest.raises(WorkerError, match="does not cover the further arrays that the optimizer 'scaffold' sends"):
        run(
            tmp_path,
            rounds=2,
            privacy=private(),
            optimizer={"sort": "scaffold", "kwargs": {}},
            policy={"joinDeadline": 5},
        )


def test_the_aggregator_notes_what_oort_wants_to_know(tmp_path):
    center, sites = run(tmp_path, rounds=4, selector={"sort": "oort", "kwargs": {"k": 2, "seed": 1}})
    assert set(center.seen) <= {site.config.task_id for site in sites}
    assert center.seen
    for utility, seconds in center.seen.values():
        assert utility == 3.5
        assert 0 < seconds < 60


def test_both_sides_of_fedbalancer_talk(tmp_path):
    sampler = {"sort": "fedbalancer", "kwargs": {"w": 1, "lss": 0.5, "epochs": 1}}
    center, sites = run(tmp_path, rounds=6, datasampler=sampler)
    assert all(site.used == 10 for site in sites)
    assert center._datasampler.deadline > 0
    assert set(center._datasampler.durations) == {site.config.task_id for site in sites}
