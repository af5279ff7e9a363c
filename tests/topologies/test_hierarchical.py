"""A tree of aggregators computes what one aggregator of all trainers would, at any depth, and loses no more than it must."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mqtt"))
sys.path.insert(0, str(Path(__file__).parent))
from mqttkit import Mosquitto
from runkit import Run, federated
from treekit import Middle, Site, Top, Tree, central, four_tiers, spec, three_tiers, trained

from flame.errors import RoundFailed, WorkerError
from flame.sdk.optimizers.base import Update, population_of, trainers_of

CLASSES = {"trainer": Site, "leaf": Middle, "middle": Middle, "top": Top}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("schema", "groups"),
    [
        (three_tiers(), {"eu": 3, "na": 1}),
        (three_tiers(("eu", "na", "as")), {"eu": 1, "na": 2, "as": 4}),
        (four_tiers(), {"uk": 2, "fr": 1, "jp": 3, "kr": 1}),
    ],
    ids=["3 tiers", "3 groups", "4 tiers"],
)
def test_every_round_gives_the_mean_over_all_trainers(tmp_path, schema, groups, deterministic):
    job = Tree(tmp_path, schema, groups, CLASSES, modelSpec=spec(5), policy={"deterministic": deterministic})
    job.run()
    (top,) = job["top"]
    count = sum(groups.values())
    np.testing.assert_allclose(top.after, central(range(count), 5), rtol=1e-12)
    assert top.model["n"] == 5
    assert all(site.rounds == [1, 2, 3, 4, 5] for site in job["trainer"])
    # The rounds are told by who closes them, and by nobody else.
    assert [number for number, _ in top.link_for_test.of("round")] == [1, 2, 3, 4, 5]
    assert not any(role.link_for_test.of("round") for role in job["middle"])
    assert not any(role.link_for_test.of("warning") for role in job.roles)


SCAFFOLD = {"sort": "scaffold", "kwargs": {}}
RULES = [
    ("fedavgm", {}),
    ("fedadam", {"eta": 0.1}),
    ("fedyogi", {"eta": 0.1}),
    ("feddyn", {"alpha": 0.5}),
    ("scaffold", {}),
    ("fedbuff", {"eta": 0.7}),
]


class Steps(Site):
    """Gradient steps with the algorithm's term."""

    local_steps = 3

    def train(self):
        for _ in range(self.local_steps):
            slope = self.regularizer.gradient({"w": self.model["w"]}).get("w", 0)
            self.model["w"] = self.model["w"] - 0.1 * (self.model["w"] - self.number + slope)
        self.dataset_size = 4.0


@pytest.mark.parametrize(("sort", "kwargs"), RULES)
def test_server_rules_are_applied_once_at_the_top(tmp_path, sort, kwargs):
    """The same job in two tiers and in four; what the rules compute in two is tested beside them."""
    made = spec(6, {"sort": sort, "kwargs": kwargs}, learningRate=0.1)
    flat = three_tiers(("all",))
    flat["roles"], flat["channels"] = [flat["roles"][0], flat["roles"][2]], flat["channels"][:1]
    flat["channels"][0]["pair"] = ["trainer", "top"]
    flat["channels"][0]["funcTags"] = {"trainer": ["fetch", "upload"], "top": ["distribute", "aggregate"]}
    classes = CLASSES | {"trainer": Steps}
    after = []
    for name, schema, groups in (("2", flat, {"all": 7}), ("4", four_tiers(), {"uk": 2, "fr": 1, "jp": 3, "kr": 1})):
        job = Tree(tmp_path / name, schema, groups, classes, modelSpec=made)
        job.run()
        after.append(job["top"][0].after)
    np.testing.assert_allclose(after[1], after[0], rtol=1e-9)


def test_a_middle_aggregator_can_evaluate_its_groups_model(tmp_path):
    class Watching(Middle):
        def initialize(self):
            self.model = {"w": np.zeros(3), "n": np.zeros((), np.int64)}

        def evaluate(self):
            self.update_metrics({"first": self.model["w"][0]})

    job = Tree(tmp_path, three_tiers(), {"eu": 2, "na": 1}, CLASSES | {"middle": Watching}, modelSpec=spec(1))
    job.run()
    said = {role.config.group("param"): role.link_for_test.of("metrics") for role in job["middle"]}
    ((eu, metrics),) = said["eu"]
    assert (eu, metrics["first"]) == (1, pytest.approx(central([0, 1], 1)[0][0]))
    assert said["na"][0][1]["first"] == pytest.approx(central([2], 1)[0][0])


class Held(Site):
    """Waits in round 2 for the test."""

    def __init__(self, config):
        super().__init__(config)
        self.reached, self.go, self.dies = threading.Event(), threading.Event(), False

    def train(self):
        if self._round == 2:
            self.reached.set()
            assert self.go.wait(30)
            if self.dies:
                raise RuntimeError("killed")
        super().train()


def started(tmp_path, groups, held, **settings):
    def make(config):
        number = int(config.dataset.rsplit("/", 1)[1])
        return (Held if number in held else Site)(config)

    job = Tree(tmp_path, three_tiers(), groups, CLASSES | {"trainer": make}, **settings)
    for role in job.roles:
        job.start(role)
    sites = {site.number: site for site in job["trainer"]}
    for number in held:
        assert sites[number].reached.wait(30)
    return job, sites


def joined(job):
    for thread in job.threads:
        thread.join(30)
        assert not thread.is_alive(), "a role did not end"


def after_loss(everyone, others, rounds):
    """The first round with all, the others without those that were lost."""
    w, after = np.zeros(3), []
    for number in range(1, rounds + 1):
        here = everyone if number == 1 else others
        w = sum((n + 1) * trained(w, n) for n in here) / sum(n + 1 for n in here)
        after.append(w)
    return after


@pytest.mark.parametrize(("groups", "lost"), [({"eu": 2, "na": 2}, 3), ({"eu": 3, "na": 1}, 3)], ids=["some", "all"])
def test_a_trainer_that_leaves_is_not_waited_for_though_it_be_its_groups_last(tmp_path, groups, lost):
    job, sites = started(tmp_path, groups, [lost], modelSpec=spec(4))
    sites[lost].dies = True
    sites[lost].go.set()
    joined(job)
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    np.testing.assert_allclose(job["top"][0].after, after_loss(range(4), [0, 1, 2], 4))


def test_min_trainers_counts_trainers_in_the_whole_tree(tmp_path):
    policy = {"minTrainers": 4, "joinDeadline": 0.5}
    job, sites = started(tmp_path, {"eu": 2, "na": 2}, [3], modelSpec=spec(4), policy=policy)
    sites[3].dies = True
    sites[3].go.set()
    joined(job)
    error = job.errors[job["top"][0]]
    assert isinstance(error, RoundFailed)
    assert "Round 2 has 3 of at least 4 updates (policy.minTrainers)" in error.message


def test_a_late_trainer_does_not_make_its_group_late(tmp_path):
    job, sites = started(tmp_path, {"eu": 2, "na": 2}, [3], modelSpec=spec(2), policy={"roundDeadline": 1.5})
    job.threads[job.roles.index(job["top"][0])].join(30)
    sites[3].go.set()
    joined(job)
    assert job.errors == {}
    np.testing.assert_allclose(job["top"][0].after, after_loss(range(4), [0, 1, 2], 2))


def test_a_middle_aggregator_that_leaves_is_not_waited_for(tmp_path):
    class Mortal(Middle):
        def _distribute_weights(self, tag):
            if self._round == 2 and self.config.group("param") == "na":
                raise RuntimeError("killed")
            super()._distribute_weights(tag)

    job = Tree(
        tmp_path, three_tiers(), {"eu": 2, "na": 2}, CLASSES | {"middle": Mortal}, modelSpec=spec(3),
        policy={"joinDeadline": 1.0},
    )  # fmt: skip
    for role in job.roles:
        job.start(role)
    joined(job)
    np.testing.assert_allclose(job["top"][0].after, after_loss(range(4), [0, 1], 3))
    # Its trainers end by themselves, in words.
    orphans = [error for error in job.errors.values() if not isinstance(error, RuntimeError)]
    assert len(orphans) == 2
    assert all("No worker of role middle was on channel param (group na) within 1 s" in str(e) for e in orphans)


# The example, through the whole system.


def test_the_example_computes_over_p2p_what_the_formula_says(tmp_path):
    with Run(tmp_path, "hierarchical") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = federated([1, 2, 3, 4], 15)
    np.testing.assert_allclose(result.models["model.safetensors"]["weights"], weights, atol=1e-9)
    np.testing.assert_allclose(result.models["model.safetensors"]["bias"], bias, atol=1e-9)


def test_a_killed_trainer_is_done_without_where_the_policy_allows_it(tmp_path):
    with Run(tmp_path, "hierarchical", "hyperparameters.rounds=150", "policy.minTrainers=3") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 150
    assert "the job goes on without it" in result.text


@pytest.mark.parametrize("role", ["trainer", "middle-aggregator"])
def test_a_killed_worker_that_the_policy_needs_fails_the_job(tmp_path, role):
    with Run(tmp_path, "hierarchical", "hyperparameters.rounds=100000") as run:
        run.wait_for("round 5/")
        run.kill_one(role)
        result = run.result()
    assert result.state == "failed"
    assert f"{role}/" in result.text
    assert "SIGKILL" in result.text


def test_an_algorithm_that_asks_who_did_not_take_part_is_told_through_the_tree(tmp_path):
    """FedDyn's share of trainers, where each group's aggregator chooses one of two in turn; all have four samples."""
    made = spec(5, {"sort": "feddyn", "kwargs": {"alpha": 0.5}}, learningRate=0.1)
    in_turn = {"selector": {"sort": "round_robin", "kwargs": {"k": 1}}}
    shares = []

    class Noting(Top):
        def _aggregate_weights(self, tag):
            super()._aggregate_weights(tag)
            shares.append(self._optimizer._share)

    schema, classes = three_tiers(lower=in_turn), CLASSES | {"trainer": Steps, "top": Noting}
    Tree(tmp_path, schema, {"eu": 2, "na": 2}, classes, modelSpec=made).run()
    assert shares == [1.0, 0.5, 0.5, 0.5, 0.5]  # in the first round nobody knows of the others yet


def test_the_example_runs_with_its_upper_tier_over_mqtt_and_its_lower_one_over_p2p(tmp_path):
    broker = Mosquitto(tmp_path / "broker")
    try:
        overrides = [
            "schema.channels[global-channel].backend=mqtt",
            f"brokers=[{{sort: mqtt, host: '{broker.address}'}}]",
        ]
        with Run(tmp_path, "hierarchical", *overrides) as run:
            result = run.result()
    finally:
        broker.kill()
    assert result.state == "completed"
    weights, _ = federated([1, 2, 3, 4], 15)
    np.testing.assert_allclose(result.models["model.safetensors"]["weights"], weights, atol=1e-9)


@pytest.mark.parametrize(
    "lie",
    [{"trainers": -1}, {"trainers": True}, {"population": 3}, {"population": [1, "many"]}, {"population": [-1, 2]}],
)
def test_an_update_that_lies_about_its_trainers_is_refused_in_words(lie):
    update = Update(end="e", weights={}, count=1.0, version=1, metadata=lie)
    with pytest.raises(WorkerError, match=r"The update of e .* which is no number of trainers"):
        (trainers_of if "trainers" in lie else population_of)(update)
