"""A coordinator spreads the trainers evenly, the result is the mean over all of them, and a dead aggregator's go to others."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from runkit import ROOT, Run, federated
from test_hierarchical import after_loss
from treekit import InThread, Site, Top, Tree, central, channel, spec

from flame.errors import WorkerError
from flame.sdk.mode.horizontal.coord_syncfl import coordinator, middle_aggregator, top_aggregator, trainer
from flame.sdk.mode.horizontal.coord_syncfl.balance import rebalance, spread, steps


def coordinated(middles=2):
    def told(name, role, tag, mine):
        return {"name": name, "pair": [role, "coordinator"], "funcTags": {role: [tag], "coordinator": [mine]}}

    return {
        "name": "coordinated",
        "roles": [
            {"name": "trainer", "isDataConsumer": True},
            {"name": "middle", "replica": middles},
            {"name": "top"},
            {"name": "coordinator"},
        ],
        "channels": [
            channel("param", "trainer", "middle"),
            channel("global", "middle", "top"),
            told("to-trainer", "trainer", "getAggregator", "coordinateWithTrainer"),
            told("to-middle", "middle", "coordinate", "coordinateWithMidAgg"),
            told("to-top", "top", "coordinate", "coordinateWithTopAgg"),
        ],
    }


class CoordSite(Site, trainer.Trainer):
    pass


class CoordMiddle(InThread, middle_aggregator.MiddleAggregator):
    dies = None

    def _give_to(self, channel, chosen):
        self.given = {**getattr(self, "given", {}), self._round: sorted(chosen)}
        super()._give_to(channel, chosen)

    def _aggregate_weights(self, tag):
        if self._round == self.dies:
            raise RuntimeError("killed")
        super()._aggregate_weights(tag)


class CoordTop(Top, top_aggregator.TopAggregator):
    pass


class Coordinator(InThread, coordinator.Coordinator):
    pass


CLASSES = {"trainer": CoordSite, "middle": CoordMiddle, "top": CoordTop, "coordinator": Coordinator}


def numbered(names):
    return [f"e{name}" for name in names]


@given(
    st.lists(st.integers(0, 50), unique=True).map(numbered), st.lists(st.integers(0, 9), unique=True, min_size=1).map(numbered)
)  # fmt: skip
def test_everyone_is_given_once_and_numbers_differ_by_one_at_most(trainers, aggregators):
    given_to = spread(trainers, aggregators)
    assert sorted(each for some in given_to.values() for each in some) == sorted(trainers)
    counts = [len(some) for some in given_to.values()]
    assert max(counts) - min(counts) <= 1


@given(
    st.lists(st.integers(0, 50), unique=True).map(numbered),
    st.lists(st.integers(0, 50), unique=True).map(numbered),
    st.lists(st.integers(0, 9), unique=True, min_size=1),
    st.data(),
)
def test_a_change_moves_no_more_than_it_must(before, after, aggregators, data):
    old = spread(before, numbered(aggregators))
    left = data.draw(st.lists(st.sampled_from(aggregators), unique=True, min_size=1))
    new = rebalance(old, after, numbered(left))
    assert sorted(each for some in new.values() for each in some) == sorted(after)
    counts = [len(some) for some in new.values()]
    assert max(counts) - min(counts) <= 1
    most = -(-len(after) // len(left))
    for aggregator, some in new.items():
        stayed = [each for each in old[aggregator] if each in after]
        assert len(set(stayed) - set(some)) <= max(0, len(stayed) - most + 1)


def test_a_slow_aggregator_is_given_less():
    assert steps({"a": 0.001, "b": 0.009}) == {"a": 1.0, "b": 1.0}  # nothing to speak of
    costs = steps({"a": 0.1, "b": 0.31, "c": 0.12})
    assert costs == {"a": 1.0, "b": 4.0, "c": 1.0}
    counts = {each: len(some) for each, some in spread(numbered(range(18)), ["a", "b", "c"], costs).items()}
    assert counts == {"a": 8, "b": 2, "c": 8}


@pytest.mark.parametrize(("trainers", "middles"), [(5, 2), (7, 3), (1, 2)])
def test_every_round_gives_the_mean_over_all_trainers(tmp_path, trainers, middles):
    job = Tree(tmp_path, coordinated(middles), {"default": trainers}, CLASSES, modelSpec=spec(5))
    job.run()
    np.testing.assert_allclose(job["top"][0].after, central(range(trainers), 5), rtol=1e-12)
    for number in range(1, 6):
        counts = [len(middle.given.get(number, ())) for middle in job["middle"] if hasattr(middle, "given")]
        assert sum(counts) == trainers
        assert max(counts) - min(counts) <= 1
    known = {role.config.task_id for role in job["middle"]}
    assert all(site.aggregator_id in known for site in job["trainer"])
    assert not any(role.link_for_test.of("warning") for role in job.roles)


def test_a_dead_aggregators_trainers_go_to_the_others_in_the_same_round(tmp_path):
    job = Tree(tmp_path, coordinated(3), {"default": 6}, CLASSES, modelSpec=spec(4))
    victim = job["middle"][1]
    victim.dies = 2
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"
    assert {role: type(error) for role, error in job.errors.items()} == {victim: RuntimeError}
    # Not one update is missing.
    np.testing.assert_allclose(job["top"][0].after, central(range(6), 4), rtol=1e-12)
    assert "Round 2: 1 of role middle left; the trainers go to others." in job["top"][0].link_for_test.of("warning")
    others = [role for role in job["middle"] if role is not victim]
    assert sorted(len(role.given[4]) for role in others) == [3, 3]


def test_a_trainer_that_leaves_is_not_waited_for(tmp_path):
    class Mortal(CoordSite):
        def train(self):
            if self.number == 3 and self._round == 2:
                raise RuntimeError("killed")
            super().train()

    job = Tree(tmp_path, coordinated(2), {"default": 4}, CLASSES | {"trainer": Mortal}, modelSpec=spec(3))
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    np.testing.assert_allclose(job["top"][0].after, after_loss(range(4), [0, 1, 2], 3), rtol=1e-12)


def test_without_its_coordinator_the_job_fails_in_words(tmp_path):
    class Dying(Coordinator):
        def await_request(self):
            super().await_request()
            if self._round == 2:
                raise RuntimeError("killed")

    job = Tree(
        tmp_path, coordinated(2), {"default": 2}, CLASSES | {"coordinator": Dying}, modelSpec=spec(3),
        policy={"joinDeadline": 1.0},
    )  # fmt: skip
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"
    error = job.errors[job["top"][0]]
    assert isinstance(error, WorkerError)
    assert "The coordinator left in round 2" in str(error)


# The example, through the whole system.


def test_the_example_computes_over_p2p_what_the_formula_says(tmp_path):
    with Run(tmp_path, "coordinated") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = federated([1, 2, 3, 4], 15)
    np.testing.assert_allclose(result.models["model.safetensors"]["weights"], weights, atol=1e-9)
    np.testing.assert_allclose(result.models["model.safetensors"]["bias"], bias, atol=1e-9)


@pytest.mark.parametrize("role", ["middle-aggregator", "trainer"])
def test_the_job_goes_on_without_a_killed_worker(tmp_path, role):
    with Run(tmp_path, "coordinated", "hyperparameters.rounds=60", "policy.minTrainers=3") as run:
        run.wait_for("round 5/")
        run.kill_one(role)
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 60
    assert "the job goes on without it" in result.text


def test_the_job_fails_with_its_coordinator(tmp_path):
    with Run(tmp_path, "coordinated", "hyperparameters.rounds=100000") as run:
        run.wait_for("round 5/")
        run.kill_one("coordinator")
        result = run.result()
    assert result.state == "failed"


def test_without_rounds_it_takes_other_import_lines_and_nothing_else(tmp_path):
    shutil.copytree(ROOT / "examples" / "coordinated", tmp_path / "coordinated")
    shutil.copytree(ROOT / "examples" / "digits" / "data", tmp_path / "digits" / "data")
    for script in (tmp_path / "coordinated").glob("*/main.py"):
        script.write_text(script.read_text().replace("coord_syncfl", "coord_asyncfl"))
    overrides = ["optimizer.sort=fedbuff", "hyperparameters.aggGoal=2", "hyperparameters.rounds=100"]
    with Run(tmp_path, tmp_path / "coordinated", *overrides) as run:
        run.wait_for("round 5/")
        run.kill_one("middle-aggregator")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 100
