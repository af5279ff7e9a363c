"""Hybrid learning: groups average round a ring, one delegate a group speaks for it, and the whole is the weighted mean."""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "mqtt"))
import runkit
from mqttkit import Mosquitto
from peerkit import InThread, Job, Line, close, federated, said

from flame.sdk.mode.hybrid.top_aggregator import TopAggregator
from flame.sdk.mode.hybrid.trainer import Trainer

CHANNELS = [
    {
        "name": "ring",
        "pair": ["trainer", "trainer"],
        "groupBy": {"type": "tag", "value": ["eu", "us"]},
        "funcTags": {"trainer": ["ring_allreduce"]},
    },
    {
        "name": "global",
        "pair": ["trainer", "aggregator"],
        "groupBy": {"type": "tag", "value": ["default"]},
        "funcTags": {"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]},
    },
]
GROUPS = {"eu": [1, 2, 3], "us": [4, 5]}
START = {"w": np.full(3, 9.0), "b": np.array(0.5)}


class Member(InThread, Line, Trainer):
    def __init__(self, config):
        super().__init__(config)
        self.delegate = []

    def evaluate(self):
        super().evaluate()
        self.delegate.append(self.is_committer)
        if self.config.hyperparameters.get("dies") == self._round and self.is_committer:
            self.cm.cleanup()
            raise SystemExit("vanished")

    def hold(self, round):
        if self.config.hyperparameters.get("quits") == [self.number, round]:
            self.cm.cleanup()
            raise SystemExit("vanished")


class Top(InThread, TopAggregator):
    def __init__(self, config):
        self.config = config
        self.after = {}
        self.heard = []

    def initialize(self):
        self.model = {name: np.array(value) for name, value in START.items()}

    def evaluate(self):
        self.after[self._round] = {name: np.array(value) for name, value in self.model.items()}
        self.heard.append((len(self._tally.folded), self._tally.trainers))


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def fill(job, groups=GROUPS, rounds=3, member=Member, **more):
    """The roles of a job; the aggregator first."""
    count = sum(map(len, groups.values()))
    hyper = {"rounds": rounds, **more.pop("hyperparameters", {})}
    common = {"channels": CHANNELS, "hyperparameters": hyper, **more}
    job.add(
        Top, "aggregator", **common, groupAssociation={"global": "default"}, peers={"global": count}
    )  # fmt: skip
    for group, numbers in groups.items():
        for number in numbers:
            places = {"ring": group, "global": "default"}
            peers = {"ring": len(numbers) - 1, "global": 1}
            job.add(member, "trainer", number, **common, groupAssociation=places, peers=peers)
    return job.roles[0], job.roles[1:]


def run_with_deaths(job, timeout=60):
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(timeout)
        assert not thread.is_alive(), "somebody hangs"
    return job.errors


@pytest.mark.parametrize("groups", [GROUPS, {"eu": [1], "us": [2, 3, 4]}])
def test_the_rings_and_the_aggregator_together_give_the_weighted_mean(job, groups):
    top, members = fill(job, groups, rounds=4)
    job.run()
    expected = federated(sum(groups.values(), []), 4, START)  # noqa: RUF017 (two short lists)
    assert all(close(top.after[number], expected[number]) for number in range(1, 5))
    # One update a group, which stands for all of it.
    assert top.heard == [(2, len(members))] * 4
    for numbers in groups.values():
        group = [member for member in members if member.number in numbers]
        assert all(sum(member.delegate[index] for member in group) == 1 for index in range(4))
        mean = federated(numbers, 1, START)[1]
        assert all(close(member.after[1], mean) for member in group), "a member sees the mean of its group"


def test_a_servers_rule_is_applied_once_at_the_aggregator(job):
    top, _ = fill(job, optimizer={"sort": "fedavgm", "kwargs": {"beta_1": 0.5, "eta": 0.25}}, rounds=2)
    job.run()
    first, *_ = (federated([1, 2, 3, 4, 5], 1, START)[1],)
    momentum = {name: first[name] - START[name] for name in START}
    after = {name: START[name] + 0.25 * momentum[name] for name in START}
    assert close(top.after[1], after)


def test_optimizers_with_further_arrays_send_the_groups_mean_of_them(job, tmp_path):
    optimizer = {"sort": "scaffold", "kwargs": {}}
    top, _ = fill(job, rounds=3, optimizer=optimizer, hyperparameters={"learningRate": 0.01})
    job.run()
    alone = Job(tmp_path / "alone")
    apart, _ = fill(
        alone, {str(n): [n] for n in range(1, 6)}, optimizer=optimizer, hyperparameters={"learningRate": 0.01},
        channels=[{**CHANNELS[0], "groupBy": {"type": "tag", "value": list("12345")}}, CHANNELS[1]],
    )  # fmt: skip
    alone.run()
    assert close(top.after[3], apart.after[3])


def test_a_delegate_that_dies_with_its_groups_update_is_followed_by_another(job):
    class Mortal(Member):
        def evaluate(self):
            if self.number > 3:
                self.config.hyperparameters.dies = 0
            super().evaluate()

    top, members = fill(job, rounds=4, member=Mortal, hyperparameters={"dies": 2})
    errors = run_with_deaths(job)
    (victim,) = errors
    assert victim.number in GROUPS["eu"]
    left = [n for n in (1, 2, 3) if n != victim.number]
    # The second round has the other group alone, the later ones also those who are left.
    assert close(top.after[2], federated([4, 5], 1, top.after[1])[1])
    assert close(top.after[4], federated([*left, 4, 5], 2, top.after[2])[2])
    assert top.heard == [(2, 5), (1, 2), (2, 4), (2, 4)]
    successors = [member for member in members if member.number in left]
    assert [sum(each) for each in zip(*(member.delegate[2:] for member in successors), strict=True)] == [1, 1]


def test_a_round_that_cannot_do_without_a_group_is_given_to_it_anew(job):
    class Once(Member):
        gone = threading.Event()

        def evaluate(self):
            if self._round == 2 and self.is_committer and self.number < 4 and not Once.gone.is_set():
                Once.gone.set()
                self.cm.cleanup()
                raise SystemExit("vanished")
            super().evaluate()

    top, _ = fill(job, rounds=3, member=Once, policy={"minTrainers": 4})
    errors = run_with_deaths(job)
    (victim,) = errors
    left = [n for n in (1, 2, 3, 4, 5) if n != victim.number]
    assert close(top.after[2], federated(left, 1, top.after[1])[1])
    assert sorted(top.after) == [1, 2, 3]


def test_a_member_that_dies_while_it_trains_is_not_waited_for(job):
    top, _ = fill(job, rounds=3, hyperparameters={"quits": [2, 2]})
    errors = run_with_deaths(job)
    assert [role.number for role in errors] == [2]
    assert close(top.after[3], federated([1, 3, 4, 5], 2, top.after[1])[2])


def test_only_those_who_were_given_the_round_are_waited_for_in_a_group(job):
    top, members = fill(job, rounds=6, selector={"sort": "random", "kwargs": {"k": 2}})
    job.run()
    assert sorted(top.after) == [1, 2, 3, 4, 5, 6]
    assert all(trainers == 2 for _, trainers in top.heard)
    assert sum(len(member.trained) for member in members) == 12
    assert said("warning", [top, *members]) == []


def test_scripts_of_flames_library_name_the_same_classes():
    from flame.mode.hybrid.top_aggregator import TopAggregator as NamedTop
    from flame.mode.hybrid.trainer import Trainer as Named

    assert (Named, NamedTop) == (Trainer, TopAggregator)
    assert Named.get_func_tags() == ["fetch", "upload", "ring_allreduce"]


# The example, through the whole system: p2p within the groups, mqtt between them and the aggregator.


@pytest.fixture
def broker(tmp_path):
    mosquitto = Mosquitto(tmp_path / "mosquitto")
    yield f"brokers={json.dumps([{'sort': 'mqtt', 'host': mosquitto.address}])}"
    mosquitto.kill()


def test_two_backends_in_one_job_compute_what_the_formula_says(tmp_path, broker):
    with runkit.Run(tmp_path, "hybrid", broker) as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = runkit.federated([1, 2, 3, 4], 15)
    assert np.allclose(result.models["model.safetensors"]["weights"], weights, rtol=0, atol=1e-9)
    assert np.allclose(result.models["model.safetensors"]["bias"], bias, rtol=0, atol=1e-9)


def test_a_killed_member_of_a_ring_is_done_without(tmp_path, broker):
    with runkit.Run(tmp_path, "hybrid", broker, "hyperparameters.rounds=100", "policy.minTrainers=2") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 100
    assert "the job goes on without it" in result.text
