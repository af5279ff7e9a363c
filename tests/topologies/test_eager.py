"""An eager tree computes the weighted mean whatever the parts, and loses only those that are late, not their groups."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runkit import Run, federated
from test_hierarchical import Steps
from treekit import InThread, Middle, Site, Top, Tree, central, four_tiers, spec, three_tiers, trained

from flame.sdk.mode.horizontal.eager_syncfl.middle_aggregator import MiddleAggregator
from flame.sdk.mode.horizontal.eager_syncfl.top_aggregator import TopAggregator


class EagerTop(Top, TopAggregator):
    """Notes who has sent how many updates, or parts of them, in a round."""

    def __init__(self, config):
        super().__init__(config)
        self.parts = []

    def _take(self, channel, tally, end, message):
        if message is not None:
            self.parts.append((self._round, end, message["metadata"]["trainers"]))
        super()._take(channel, tally, end, message)


class EagerMiddle(InThread, MiddleAggregator):
    pass


CLASSES = {"trainer": Site, "leaf": EagerMiddle, "middle": EagerMiddle, "top": EagerTop}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("goal", [None, 1, 2])
def test_four_tiers_give_the_mean_over_all_trainers_in_every_round(tmp_path, goal, deterministic):
    groups = {"uk": 4, "fr": 1, "jp": 3, "kr": 2}
    made = spec(5, **({"aggGoal": goal} if goal else {}))
    job = Tree(tmp_path, four_tiers(), groups, CLASSES, modelSpec=made, policy={"deterministic": deterministic})
    job.run()
    (top,) = job["top"]
    np.testing.assert_allclose(top.after, central(range(10), 5), rtol=1e-12)
    for number in range(1, 6):
        said = [(end, trainers) for at, end, trainers in top.parts if at == number]
        assert sum(trainers for _, trainers in said) == 10
        assert len(said) > 2  # more than one update of each group below the top
    assert [number for number, _ in top.link_for_test.of("round")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("sort", ["scaffold", "feddyn", "fedbuff"])
def test_parts_carry_what_an_algorithm_needs(tmp_path, sort):
    kwargs = {"alpha": 0.5} if sort == "feddyn" else {}
    made = spec(6, {"sort": sort, "kwargs": kwargs}, learningRate=0.1, aggGoal=1)
    after = []
    for name, middle in (("whole", None), ("parts", EagerMiddle)):
        classes = CLASSES | {"trainer": Steps, "middle": middle or Middle, "top": Top}
        job = Tree(tmp_path / name, three_tiers(), {"eu": 3, "na": 2}, classes, modelSpec=made)
        job.run()
        after.append(job["top"][0].after)
    np.testing.assert_allclose(after[1], after[0], rtol=1e-9)


def test_what_was_sent_early_counts_although_the_rest_is_too_late(tmp_path):
    go, reached = threading.Event(), threading.Event()

    class Slow(Site):
        def train(self):
            if self.number == 3 and self._round == 2:
                reached.set()
                assert go.wait(30)
            super().train()

    job = Tree(
        tmp_path, three_tiers(), {"eu": 2, "na": 2}, CLASSES | {"trainer": Slow},
        modelSpec=spec(2, aggGoal=1), policy={"roundDeadline": 1.5},
    )  # fmt: skip
    for role in job.roles:
        job.start(role)
    assert reached.wait(30)
    job.threads[job.roles.index(job["top"][0])].join(30)
    go.set()
    job.join()
    first = central(range(4), 1)[0]
    second = sum((n + 1) * trained(first, n) for n in (0, 1, 2)) / 6
    np.testing.assert_allclose(job["top"][0].after, [first, second], rtol=1e-12)


def test_a_trainer_that_leaves_is_not_waited_for(tmp_path):
    class Mortal(Site):
        def train(self):
            if self.number == 2 and self._round == 2:
                raise RuntimeError("killed")
            super().train()

    job = Tree(tmp_path, three_tiers(), {"eu": 2, "na": 2}, CLASSES | {"trainer": Mortal}, modelSpec=spec(3, aggGoal=1))
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    w = central(range(4), 1)[0]
    for after in job["top"][0].after[1:]:
        w = sum((n + 1) * trained(w, n) for n in (0, 1, 3)) / 7
        np.testing.assert_allclose(after, w, rtol=1e-12)


# The example, through the whole system.


def test_the_example_computes_over_p2p_what_the_formula_says(tmp_path):
    with Run(tmp_path, "eager") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = federated([1, 2, 3, 4], 15)
    np.testing.assert_allclose(result.models["model.safetensors"]["weights"], weights, atol=1e-9)
    np.testing.assert_allclose(result.models["model.safetensors"]["bias"], bias, atol=1e-9)


def test_a_killed_trainer_is_done_without_where_the_policy_allows_it(tmp_path):
    with Run(tmp_path, "eager", "hyperparameters.rounds=150", "policy.minTrainers=3") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 150
