"""FedBuff in two tiers and in three: what was aggregated is what the formula makes of who came when; nobody hangs."""

import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runkit import ROOT, Run
from treekit import DOWN, UP, InThread, Site, Top, Tree, spec, three_tiers, trained

from flame.errors import RoundFailed, SpecError
from flame.sdk.mode.horizontal.asyncfl.middle_aggregator import MiddleAggregator
from flame.sdk.mode.horizontal.asyncfl.top_aggregator import TopAggregator
from flame.sdk.mode.horizontal.asyncfl.trainer import Trainer

ETA, ALPHA = 0.8, 0.5
FEDBUFF = {"sort": "fedbuff", "kwargs": {"eta": ETA, "alpha": ALPHA}}


def two_tiers():
    return {
        "name": "two",
        "roles": [{"name": "trainer", "isDataConsumer": True}, {"name": "top"}],
        "channels": [{"name": "param", "pair": ["trainer", "top"], "funcTags": {"trainer": UP, "top": DOWN}}],
    }


class Logged:
    """Notes who was folded into which version, from which version it began; and who works at the same time."""

    def __init__(self, config):
        super().__init__(config)
        self.log, self.most = [], 0

    def _take(self, channel, tally, end, message):
        if message is not None:
            self.most = max(self.most, self._working(channel))
            self.log.append((self._round, end, message["model_version"]))
        super()._take(channel, tally, end, message)


class AsyncSite(Site, Trainer):
    """Site 0 is slow: it waits in its first training until the test says so."""

    go = None

    def train(self):
        if self.number == 0 and self.go is not None and not self.rounds:
            assert self.go.wait(30)
        super().train()


class AsyncTop(Logged, Top, TopAggregator):
    go, at = None, 0

    def evaluate(self):
        super().evaluate()
        if self.go is not None and self._round == self.at:
            self.go.set()


class AsyncMiddle(Logged, InThread, MiddleAggregator):
    pass


CLASSES = {"trainer": AsyncSite, "middle": AsyncMiddle, "top": AsyncTop}


def discount(staleness):
    return (1 + staleness) ** -ALPHA


def versions_of(job, rounds, goal):
    """Every version of the model, from the log and the formula alone."""
    number = {site.config.task_id: site.number for site in job["trainer"]}
    made, (top,) = [np.zeros(3)], job["top"]
    for version in range(1, rounds + 1):
        taken = [(end, since) for at, end, since in top.log if at == version]
        assert len(taken) == goal
        moves = [discount(version - v) * (trained(made[v - 1], number[end]) - made[v - 1]) for end, v in taken]
        made.append(made[-1] + ETA / goal * sum(moves))
    return made[1:]


@pytest.mark.parametrize("goal", [1, 3])
def test_each_version_is_what_fedbuff_makes_of_the_updates_that_came(tmp_path, goal):
    rounds = 12
    job = Tree(tmp_path, two_tiers(), {"default": 4}, CLASSES, modelSpec=spec(rounds, FEDBUFF, aggGoal=goal))
    job.run()
    (top,) = job["top"]
    np.testing.assert_allclose(top.after, versions_of(job, rounds, goal), rtol=1e-10)
    assert [number for number, _ in top.link_for_test.of("round")] == list(range(1, rounds + 1))


def test_nobody_waits_for_the_slowest_whose_update_then_counts_less(tmp_path):
    rounds, go = 10, threading.Event()
    job = Tree(tmp_path, two_tiers(), {"default": 3}, CLASSES, modelSpec=spec(rounds, FEDBUFF, aggGoal=2))
    (top,) = job["top"]
    top.go, top.at = go, 6
    slow = next(site for site in job["trainer"] if site.number == 0)
    slow.go = go
    job.run()
    late = [(at, since) for at, end, since in top.log if end == slow.config.task_id]
    if late:  # it came in before the end
        assert late[0][0] > 6
        assert late[0][1] == 1
    np.testing.assert_allclose(top.after, versions_of(job, rounds, 2), rtol=1e-10)


@pytest.mark.parametrize(
    ("selector", "more"),
    [({"sort": "fedbuff", "kwargs": {"c": 2}}, {}), (None, {"concurrency": 2})],
    ids=["selector", "hyperparameter"],
)
def test_no_more_trainers_work_at_once_than_are_allowed(tmp_path, selector, more):
    made = spec(15, FEDBUFF, selector, aggGoal=2, **more)
    job = Tree(tmp_path, two_tiers(), {"default": 5}, CLASSES, modelSpec=made)
    job.run()
    (top,) = job["top"]
    assert 1 <= top.most <= 2
    np.testing.assert_allclose(top.after, versions_of(job, 15, 2), rtol=1e-10)


def test_where_not_all_may_work_at_once_they_take_turns(tmp_path):
    job = Tree(tmp_path, two_tiers(), {"default": 5}, CLASSES, modelSpec=spec(15, FEDBUFF, aggGoal=1, concurrency=1))
    job.run()
    (top,) = job["top"]
    assert sorted(Counter(end for _, end, _ in top.log).values()) == [3] * 5


def test_three_tiers_discount_at_each_of_them(tmp_path):
    rounds, goals = 8, {"top": 2, "middle": 2}
    job = Tree(
        tmp_path, three_tiers(), {"eu": 3, "na": 2}, CLASSES, modelSpec=spec(rounds, FEDBUFF, aggGoals=goals)
    )  # fmt: skip
    job.run()
    (top,), number = job["top"], {site.config.task_id: site.number for site in job["trainer"]}
    below = {middle.config.task_id: iter(middle.log) for middle in job["middle"]}
    made = [np.zeros(3)]
    for version in range(1, rounds + 1):
        sums = []
        for end, since in ((end, since) for at, end, since in top.log if at == version):
            taken = [next(below[end]) for _ in range(2)]  # a middle's updates come in order, each one of two
            assert [base for base, _, _ in taken] == [since, since]
            group = [discount(since - v) * (trained(made[v - 1], number[who]) - made[v - 1]) for _, who, v in taken]
            sums.append(discount(version - since) * sum(group))
        assert len(sums) == 2
        made.append(made[-1] + ETA / 4 * sum(sums))
    np.testing.assert_allclose(top.after, made[1:], rtol=1e-10)
    assert not any(role.link_for_test.of("warning") for role in job.roles)


def test_a_rule_that_needs_models_of_one_round_is_refused(tmp_path):
    job = Tree(tmp_path, two_tiers(), {"default": 1}, CLASSES, modelSpec=spec(1), policy={"joinDeadline": 0.2})
    with pytest.raises(
        SpecError, match=r"asynchronous aggregation needs a rule .* such as fedbuff, which 'fedavg' is not"
    ):
        job.run()


def mortal(*dying_ones):
    """Sites some of which die in their third training; the others do not end the work before that."""

    class Mortal(AsyncSite):
        died = threading.Event()

        def train(self):
            if len(self.rounds) == 2:
                if self.number in dying_ones:
                    self.died.set()
                    raise RuntimeError("killed")
                assert self.died.wait(30)
            super().train()

    return Mortal


def ended(job):
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"


@pytest.mark.parametrize("tiers", [2, 3])
def test_a_trainer_that_leaves_is_not_waited_for(tmp_path, tiers):
    schema, groups = (two_tiers(), {"default": 3}) if tiers == 2 else (three_tiers(), {"eu": 1, "na": 2})
    made = spec(12, FEDBUFF, aggGoal=1)
    job = Tree(
        tmp_path, schema, groups, CLASSES | {"trainer": mortal(0)}, modelSpec=made, policy={"joinDeadline": 0.5}
    )  # fmt: skip
    ended(job)
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    assert len(job["top"][0].after) == 12


@pytest.mark.parametrize("tiers", [2, 3])
def test_without_any_trainer_the_job_fails_in_words(tmp_path, tiers):
    schema, groups = (two_tiers(), {"default": 3}) if tiers == 2 else (three_tiers(), {"eu": 1, "na": 2})
    made = spec(50, FEDBUFF, aggGoal=2)
    job = Tree(
        tmp_path, schema, groups, CLASSES | {"trainer": mortal(0, 1, 2)}, modelSpec=made, policy={"joinDeadline": 0.5}
    )
    ended(job)
    error = job.errors[job["top"][0]]
    assert isinstance(error, RoundFailed)
    assert "of at least 1 updates (policy.minTrainers)" in error.message


# The example, through the whole system.


@pytest.mark.parametrize("job", ["async", "async/three-tiers.yaml"])
def test_the_example_learns_to_read(tmp_path, job):
    with Run(tmp_path, job) as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 41))
    with np.load(ROOT / "examples" / "async" / "aggregator" / "held-out.npz") as data:
        x, y = data["x"].reshape(-1, 64) / 16, data["y"]
    model = result.models["model.safetensors"]
    assert ((x @ model["weights"] + model["bias"]).argmax(1) == y).mean() > 0.8


def test_a_killed_trainer_is_done_without_where_the_policy_allows_it(tmp_path):
    with Run(tmp_path, "async", "hyperparameters.rounds=150", "policy.minTrainers=2") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 150
    assert "the job goes on without it" in result.text


def test_a_version_that_nobody_answers_in_time_fails_the_job(tmp_path):
    go = threading.Event()

    class Stuck(AsyncSite):
        def train(self):
            assert go.wait(30)
            super().train()

    policy = {"roundDeadline": 0.5, "joinDeadline": 5}
    job = Tree(
        tmp_path, two_tiers(), {"default": 2}, CLASSES | {"trainer": Stuck}, modelSpec=spec(2, FEDBUFF), policy=policy
    )  # fmt: skip
    for role in job.roles:
        job.start(role)
    job.threads[job.roles.index(job["top"][0])].join(30)
    error = job.errors[job["top"][0]]
    assert isinstance(error, RoundFailed)
    assert (
        "Round 1 has 0 of at least 1 updates (policy.minTrainers) after 0.5 s (policy.roundDeadline)" in error.message
    )
    go.set()


def test_goals_by_role_must_name_every_aggregating_role(tmp_path):
    made = spec(1, FEDBUFF, aggGoals={"tip": 2})
    job = Tree(tmp_path, two_tiers(), {"default": 1}, CLASSES, modelSpec=made, policy={"joinDeadline": 0.2})
    with pytest.raises(SpecError, match=r"aggGoals.* also for 'top'"):
        job.run()
