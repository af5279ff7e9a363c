"""Trainers stay spread over the aggregators that there are, and every version is what FedBuff makes of who came."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_asynchronous import ETA, FEDBUFF, Logged, discount
from test_coordinated import coordinated
from treekit import InThread, Site, Top, Tree, spec, trained

from flame.sdk.mode.horizontal.coord_asyncfl import coordinator as coordination
from flame.sdk.mode.horizontal.coord_asyncfl import middle_aggregator, top_aggregator, trainer


class Worker(Site, trainer.Trainer):
    pass


class Middle(Logged, InThread, middle_aggregator.MiddleAggregator):
    dies = None

    def _aggregate_weights(self, tag):
        if self.dies is not None and self._round >= self.dies:
            raise RuntimeError("killed")
        super()._aggregate_weights(tag)


class CoordTop(Logged, Top, top_aggregator.TopAggregator):
    """Waits after version 10 until a condition holds."""

    until = None

    def evaluate(self):
        super().evaluate()
        deadline = time.monotonic() + 30
        while self._round == 10 and self.until is not None and not self.until():
            assert time.monotonic() < deadline
            time.sleep(0.001)


class Coordinator(InThread, coordination.Coordinator):
    pass


CLASSES = {"trainer": Worker, "middle": Middle, "top": CoordTop, "coordinator": Coordinator}


def made_of(job, rounds):
    """Every version from the logs and the formula; the middle aggregators send sums of two, the top takes one."""
    (top,), number = job["top"], {site.config.task_id: site.number for site in job["trainer"]}
    below = {middle.config.task_id: iter(middle.log) for middle in job["middle"]}
    made = [np.zeros(3)]
    for version in range(1, rounds + 1):
        ((end, since),) = [(end, since) for at, end, since in top.log if at == version]
        taken = [next(below[end]) for _ in range(2)]
        group = [discount(since - v) * (trained(made[v - 1], number[who]) - made[v - 1]) for _, who, v in taken]
        made.append(made[-1] + ETA * discount(version - since) * sum(group) / 2)
    return made[1:]


@pytest.mark.parametrize("dies", [None, 1])
def test_versions_are_fedbuffs_and_a_dead_aggregators_trainers_go_to_the_others(tmp_path, dies):
    rounds = 20
    made = spec(rounds, FEDBUFF, aggGoals={"top": 1, "middle": 2})
    job = Tree(tmp_path, coordinated(2), {"default": 5}, CLASSES, modelSpec=made)
    victim = job["middle"][0]
    victim.dies = dies
    (coordinator,) = job["coordinator"]
    if dies:
        job["top"][0].until = lambda: len(coordinator.agg_to_trainer) == 1
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"
    assert [type(error) for error in job.errors.values()] == ([RuntimeError] if dies else [])
    np.testing.assert_allclose(job["top"][0].after, made_of(job, rounds), rtol=1e-10)
    counts = {len(role._trainers) for role in job["middle"] if role is not victim or dies is None}
    assert counts == ({5} if dies else {2, 3})
