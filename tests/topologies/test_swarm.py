"""Swarm learning: whoever aggregates, the model is the same; and the role moves on, also when its bearer dies."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import peerkit
import runkit
from peerkit import InThread, Job, Line, close, federated, said

from flame.errors import RoundFailed, SpecError
from flame.sdk.mode.distributed.carrier import Torn
from flame.sdk.mode.distributed.post import INVITE, MODEL, TORN
from flame.sdk.mode.swarm.trainer import Trainer

CHANNEL = {**peerkit.RING, "name": "swarm", "funcTags": {"trainer": ["elect", "handover"]}}


class Member(InThread, Line, Trainer):
    def __init__(self, config):
        super().__init__(config)
        self.kept = []

    def evaluate(self):
        super().evaluate()
        if self.is_aggregating:
            self.kept.append(self._round)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def members(job, numbers, cls=Member, **more):
    more = {"peers": len(numbers) - 1, **more}
    return [job.add(cls, "trainer", number, **peerkit.settings(CHANNEL, **more)) for number in numbers]


def start_of(peers):
    first = min(peers, key=lambda peer: peer._table.me.order)
    return {"w": np.full(3, float(first.number)), "b": np.array(0.5)}


def run_with_deaths(job, timeout=60):
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a member hangs"
    return {role.number: error for role, error in job.errors.items()}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("numbers", [[1], [1, 2], [1, 2, 3, 4]])
def test_every_round_is_the_weighted_mean_and_every_member_has_its_turn(job, numbers, deterministic):
    peers = members(job, numbers, rounds=8, policy={"deterministic": deterministic})
    job.run()
    expected = federated(numbers, 8, start_of(peers))
    for peer in peers:
        assert all(close(peer.after[number], expected[number]) for number in range(1, 9))
        assert len(peer.kept) == 8 // len(numbers)
    assert sorted(number for peer in peers for number in peer.kept) == list(range(1, 9))
    assert [number for number, _ in said("round", peers)] == list(range(1, 9))
    assert len(said("model", peers)) == 1


def test_the_servers_momentum_moves_along_with_the_role(job):
    optimizer = {"sort": "fedavgm", "kwargs": {"beta_1": 0.5, "eta": 0.8}}
    peers = members(job, [1, 2, 3], rounds=6, optimizer=optimizer)
    job.run()
    x = start_of(peers)
    v = {name: np.zeros_like(array) for name, array in x.items()}
    for number in range(1, 7):
        mean = federated([1, 2, 3], 1, x)[1]
        v = {name: 0.5 * v[name] + mean[name] - x[name] for name in x}
        x = {name: x[name] + 0.8 * v[name] for name in x}
        assert all(close(peer.after[number], x) for peer in peers)


def test_a_robust_rule_works_without_a_server(job):
    peers = members(job, [1, 2, 3], rounds=1, optimizer={"sort": "median", "kwargs": {}})
    job.run()
    start = start_of(peers)
    trained = [peerkit.step(start, number) for number in (1, 2, 3)]
    assert np.allclose(peers[0].after[1]["w"], np.median([model["w"] for model in trained], axis=0))


def test_control_variates_go_along(job):
    optimizer = {"sort": "scaffold", "kwargs": {}}
    peers = members(job, [1, 2], rounds=3, optimizer=optimizer)
    for peer in peers:
        peer.config.hyperparameters.learning_rate = 0.01
    job.run()
    assert all(np.array_equal(peer.model["w"], peers[0].model["w"]) for peer in peers)
    assert np.abs(peers[0]._extra["w"]).max() > 0


class Mortal(Member):
    """Disappears when it is its turn in the second round: before it has asked, having folded, or while handing over."""

    def vanish(self):
        self.cm.cleanup()
        raise SystemExit("vanished")

    def _aggregate(self, plan):
        place = self.config.hyperparameters.get("place")
        if plan.round == 2 and place == "asking" and len(plan.ring) == 4:
            self.vanish()
        super()._aggregate(plan)
        if plan.round == 2 and place == "folding" and len(plan.ring) == 4:
            self.vanish()
        if plan.round == 2 and place == "giving" and len(plan.ring) == 4:
            other = next(end for end in plan.ring if end != self._table.me.end)
            self._table.give(self._gift(), [other])
            self.vanish()


@pytest.mark.parametrize("place", ["asking", "folding", "giving"])
def test_the_next_in_order_aggregates_when_the_one_whose_turn_it_is_dies(job, place):
    for number in (1, 2, 3, 4):
        hyper = {"rounds": 4, "place": place}
        job.add(Mortal, "trainer", number, **peerkit.settings(CHANNEL, peers=3), hyperparameters=hyper)
    errors = run_with_deaths(job)
    ((victim, error),) = errors.items()
    assert isinstance(error, SystemExit)
    left = [role for role in job.roles if role.number != victim]
    rest = [role.number for role in left]
    # What one member has been given in the second round holds for all; else it is done anew without the victim.
    counted = [1, 2, 3, 4] if place == "giving" else rest
    expected = federated(counted, 1, left[0].after[1])[1]
    assert all(close(role.after[2], expected) for role in left)
    if place != "giving":
        assert all(close(role.after[4], federated(rest, 2, expected)[2]) for role in left)
    assert all(np.array_equal(role.model["w"], left[0].model["w"]) for role in left)
    assert len(said("model", left)) == 1


class Shaken(Member):
    """In the third round the connections to all others break, and are there again, while this member aggregates."""

    shaken = False

    def _aggregate(self, plan):
        if plan.round == 3 and not self.shaken:
            self.shaken = True
            channel = self._table.channel
            for end in channel.all_ends():
                channel._inbox.on_join(channel.member(end))
        super()._aggregate(plan)


def undisturbed(job, cls):
    """Three members whose round is disturbed come to the models of those whose is not."""
    peers = members(job, [1, 2, 3], cls, rounds=5, policy={"deterministic": True})
    cls.others = peers
    job.run()
    expected = federated([1, 2, 3], 5, start_of(peers))
    for peer in peers:
        assert all(close(peer.after[number], expected[number]) for number in range(1, 6))
    return peers


def test_a_deterministic_round_is_begun_anew_when_an_update_may_be_lost_with_its_connection(job):
    assert sum(peer.shaken for peer in undisturbed(job, Shaken)) == 1


class Torn4(Member):
    """In the fourth round the last member tears the plan; the first one, whom the second one listens to, hears it from that one."""

    tore = False

    def _combine(self, plan):
        first, _, last = plan.ring
        table = self._table
        if plan.round == 4 and not any(each.tore for each in self.others):
            if table.me.end == last:
                self.tore = True
                raise Torn
            if table.me.end == first:
                table.until(lambda: plan.id in table._torn or None, 30, lambda: "the plan to be torn")
        super()._combine(plan)


def test_whoever_aggregates_hears_of_a_torn_plan_from_each_one_alone(job):
    assert sum(peer.tore for peer in undisturbed(job, Torn4)) == 1


class TornAtOnce(Torn4):
    """As before, and the one who aggregates hears all of that before it begins."""

    def _combine(self, plan):
        first, second, _ = plan.ring
        if plan.round == 4 and not self.told.is_set():
            if self._table.me.end == first:
                tear = self._table.tear

                def tell(torn):
                    tear(torn)
                    self.told.set()

                self._table.tear = tell
            elif self._table.me.end == second:
                assert self.told.wait(30)
                self._table._hear()
        super()._combine(plan)


def test_whoever_aggregates_does_not_wait_in_a_plan_that_it_knows_to_be_torn(job):
    TornAtOnce.told = threading.Event()
    assert sum(peer.tore for peer in undisturbed(job, TornAtOnce)) == 1


class Unheard(Member):
    """In the third round what this member says of itself is lost with the connection to the speaker, which is there again."""

    lost = False

    def _close_round(self, tag):
        table = self._table
        speaker = table.order()[0]
        if self._round == 3 and speaker != table.me.end:
            channel, told = table.channel, table.channel.send

            def lose(end, *arguments, **more):
                self.lost, channel.send = True, told
                channel._inbox.on_join(channel.member(speaker))

            channel.send = lose
        super()._close_round(tag)


def test_what_a_member_says_of_itself_is_said_again_when_it_was_lost_with_its_connection(job):
    assert sum(peer.lost for peer in undisturbed(job, Unheard)) == 2


class Unreached(Member):
    """In the fourth round the first word of some kind reaches nobody: those whom it is for have not come yet, for the one who says it."""

    kind = ""
    missed = False

    def _combine(self, plan):
        channel, broadcast = self._table.channel, self._table.channel.broadcast
        last = self._table.me.end == plan.ring[-1]

        def miss(message, ends=None, timeout=None, *, kind="", metadata=None):
            if kind != self.kind or any(each.missed for each in self.others):
                return broadcast(message, ends, timeout, kind=kind, metadata=metadata)
            self.missed, channel.broadcast = True, broadcast
            return dict.fromkeys(ends, "is not there")

        if plan.round == 4:
            channel.broadcast = miss
            if self.kind == TORN and last and not self.missed:
                raise Torn
        super()._combine(plan)


@pytest.mark.parametrize("kind", [TORN, MODEL, INVITE])
def test_whom_a_word_does_not_reach_hears_later_that_nothing_comes_of_the_plan(job, kind):
    class Missed(Unreached):
        pass

    Missed.kind = kind
    assert sum(peer.missed for peer in undisturbed(job, Missed)) == 1


def test_too_few_members_end_the_work_of_all_in_words(job):
    class Quits(Member):
        def hold(self, round):
            if (self.number, round) == (2, 2):
                self.cm.cleanup()
                raise SystemExit("vanished")

    members(job, [1, 2, 3], cls=Quits, rounds=4, policy={"minTrainers": 3, "joinDeadline": 0.5})
    errors = run_with_deaths(job)
    assert isinstance(errors.pop(2), SystemExit)
    assert all(isinstance(error, RoundFailed) and "2 of at least 3" in error.message for error in errors.values())
    assert set(errors) == {1, 3}


def test_an_optimizer_for_updates_of_different_rounds_is_refused(job):
    members(job, [1], optimizer={"sort": "fedbuff", "kwargs": {}})
    with pytest.raises(SpecError, match="goes by rounds"):
        job.run()


# The example, through the whole system.


def test_the_example_computes_what_the_formula_says(tmp_path):
    with runkit.Run(tmp_path, "swarm") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = runkit.federated([1, 2, 3, 4], 15)
    assert np.allclose(result.models["model.safetensors"]["weights"], weights, rtol=0, atol=1e-9)
    assert np.allclose(result.models["model.safetensors"]["bias"], bias, rtol=0, atol=1e-9)


def test_a_killed_member_is_done_without_where_the_policy_allows_it(tmp_path):
    with runkit.Run(tmp_path, "swarm", "hyperparameters.rounds=200") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 200
    assert "the job goes on without it" in result.text
