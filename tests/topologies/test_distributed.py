"""Distributed learning: the members' models are averaged exactly, by members that come, go and die as they like."""

import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "mqtt"))
sys.path.insert(0, str(Path(__file__).parent.parent / "sdk"))
import peerkit
import runkit
from byhand import Hand
from mqttkit import Mosquitto
from peerkit import InThread, Job, Line, close, federated, said

from flame.errors import RoundFailed, SpecError
from flame.sdk.mode.distributed.agreement import NEWCOMER, Plan, Stand, decide
from flame.sdk.mode.distributed.post import PLAN, STAND, Post
from flame.sdk.mode.distributed.ring import allreduce
from flame.sdk.mode.distributed.trainer import Trainer
from flame.spec.nouns import RoundPolicy


class Member(InThread, Line, Trainer):
    pass


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def members(job, numbers, cls=Member, **more):
    more = {"peers": len(numbers) - 1, **more}
    return [job.add(cls, "trainer", number, **peerkit.settings(**more)) for number in numbers]


# The ring by itself.


def in_a_ring(vectors, counts, piece):
    """Run the all-reduce in threads, over queues; gives each member's result and total."""
    size = len(vectors)
    pipes = [queue.Queue() for _ in range(size)]
    flats = [
        {group: array.astype(array.dtype) * count for group, array in flat.items()}
        for flat, count in zip(vectors, counts, strict=True)
    ]
    totals = [None] * size

    def member(rank):
        def send(index, parts, samples):
            pipes[(rank + 1) % size].put((index, {group: part.copy() for group, part in parts.items()}, samples))

        def receive(index):
            number, parts, samples = pipes[rank].get(timeout=20)
            assert number == index
            return parts, samples

        totals[rank] = allreduce(flats[rank], counts[rank], rank, size, send, receive, piece=piece)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return flats, totals


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 7),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    piece=st.sampled_from([8, 24, 64, 1 << 20]),
    counts=st.lists(st.integers(0, 1000), min_size=7, max_size=7),
)
def test_the_ring_gives_all_the_weighted_mean_whatever_the_size_of_model_piece_and_ring(size, lengths, piece, counts):
    counts = [*map(float, counts[: size - 1]), 3.0]
    rng = np.random.default_rng(size)
    kinds = [np.float64, np.float32, np.complex128]
    vectors = [
        {f"g{i}": rng.normal(size=length).astype(kinds[i]) for i, length in enumerate(lengths)} for _ in range(size)
    ]
    flats, totals = in_a_ring(vectors, counts, piece)
    assert totals == [sum(counts)] * size
    for group in vectors[0]:
        expected = sum(c * v[group].astype(complex) for c, v in zip(counts, vectors, strict=True)) / sum(counts)
        assert np.allclose(flats[0][group], expected, atol=1e-5)
        assert all(np.array_equal(flat[group], flats[0][group]) for flat in flats), "not the same bits everywhere"


# Who does what next.

stands = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(lambda done, trained: Stand(done, trained and done != NEWCOMER, 1), st.integers(-1, 3), st.booleans()),
    min_size=1,
)


def test_a_round_is_done_again_with_all_where_nobody_else_has_the_model_of_who_is_behind():
    where = {"a": Stand(3, True, 1), "b": Stand(3, False, 1), "c": Stand(2, True, 1)}
    plan = decide("p", where, sorted(where), 1, whole=True, own=True)
    assert (plan.round, plan.ring, plan.to) == (3, ["a", "b", "c"], [])
    early = where | {"c": Stand(2, False, 1)}
    plan = decide("p", early, sorted(early), 1, whole=True, own=True)
    assert (plan.round, plan.members) == (3, set()), "it has to train first"
    gift = Plan(id="p", round=3, giver="a", to=["c"], tickets={"a": 1, "b": 1, "c": 1})
    assert decide("p", where, sorted(where), 1, whole=True) == gift, "all have the same model"
    assert decide("p", where, sorted(where), 1, own=True).to == ["c"], "nobody is waited for"


@given(stands, st.integers(1, 3))
def test_a_plan_never_averages_updates_of_different_models_and_leaves_nobody_out(stands, least):
    order = sorted(stands)
    plan = decide("p", stands, order, least)
    ahead = max(stand.done for stand in stands.values())
    assert all(stands[end].done == ahead and stands[end].trained for end in plan.ring)
    if plan.failure:
        return
    assert not plan.ring or len(plan.ring) >= least
    assert plan.ring == sorted(plan.ring)
    # After it nobody is behind the others but those who have not trained yet.
    behind = {end for end in order if stands[end].done < ahead}
    assert set(plan.to) == behind if ahead != NEWCOMER else set(plan.to) == set(order[1:])
    assert not behind or plan.giver not in behind


@settings(max_examples=200)
@given(stands, st.integers(1, 3))
def test_plans_come_to_an_end(stands, least):
    """Members that do as they are told, and train before they come back, reach a common end."""
    stands = {end: Stand(stand.done, stand.done != NEWCOMER, 1) for end, stand in stands.items()}
    for _ in range(30):
        plan = decide("p", stands, sorted(stands), least)
        if plan.failure:
            assert len(stands) < least
            return
        for end in {*plan.members, plan.giver}:
            stands = {**stands, end: Stand(plan.round, False, 1)}
        if all(stand.done >= 5 for stand in stands.values()):
            return
        stands = {end: Stand(stand.done, True, 1) for end, stand in stands.items()}
    raise AssertionError(stands)


# The job.


@pytest.mark.parametrize("numbers", [[1], [1, 2], [1, 2, 3, 4, 5]])
def test_every_round_gives_all_members_the_mean_weighted_by_their_samples(job, numbers):
    peers = members(job, numbers, rounds=4)
    job.run()
    first = min(peers, key=lambda peer: peer._table.me.order)
    start = {"w": np.full(3, float(first.number)), "b": np.array(0.5)}
    expected = federated(numbers, 4, start)
    for peer in peers:
        assert sorted(peer.after) == [1, 2, 3, 4]
        for number, model in peer.after.items():
            assert close(model, expected[number])
            assert np.array_equal(model["w"], peers[0].after[number]["w"]), "not the same bits everywhere"
    # One of them reports the rounds and keeps the model.
    assert [number for number, _ in said("round", peers)] == [1, 2, 3, 4]
    assert len(said("model", peers)) == 1


def test_full_participation_equals_gradient_descent_on_the_pooled_data(job):
    numbers = [1, 2, 3]
    peers = members(job, numbers, rounds=5)
    job.run()
    x = np.vstack([peerkit.data_of(n)[0] for n in numbers])
    y = np.concatenate([peerkit.data_of(n)[1] for n in numbers])
    first = min(peers, key=lambda peer: peer._table.me.order)
    w, b = np.full(3, float(first.number)), 0.5
    for _ in range(5):
        error = x @ w + b - y
        w, b = w - 0.01 * error @ x / len(y), b - 0.01 * error.mean()
    assert np.allclose(peers[0].after[5]["w"], w, atol=1e-10)


def test_equal_datasets_do_not_confuse_the_ring(job):
    class Equal(Member):
        def load_data(self):
            self.dataset_size = 10

    peers = members(job, [1, 2, 3, 4], cls=Equal, rounds=2)
    job.run()
    assert all(sorted(peer.after) == [1, 2] for peer in peers)
    assert all(np.array_equal(peer.after[2]["w"], peers[0].after[2]["w"]) for peer in peers)


def test_integers_and_half_floats_are_averaged_in_their_own_types(job):
    class Mixed(Member):
        def initialize(self):
            self.model = {"n": np.array([3], np.int64), "h": np.zeros(5, np.float16), "f": np.zeros((2, 2), np.float32)}

        def train(self):
            self.model["n"] = self.model["n"] + self.number
            self.model["h"] = self.model["h"] + np.float16(self.number)
            self.model["f"] = self.model["f"] + np.float32(self.number)
            self.dataset_size = 1

        def evaluate(self):
            pass

    peers = members(job, [1, 2, 3], cls=Mixed, rounds=2)
    job.run()
    for peer in peers:
        assert (peer.model["n"].dtype, peer.model["n"].tolist()) == (np.int64, [7])
        assert (peer.model["h"].dtype, peer.model["h"].tolist()) == (np.float16, [4] * 5)
        assert peer.model["f"].tolist() == [[4, 4], [4, 4]]


class Mortal(Member):
    """Disappears at a place of a round, as a killed process does: nothing more is said."""

    def hold(self, round):
        if self.config.hyperparameters.get("dies") == ["train", round]:
            self.vanish()

    def _combine(self, plan):
        if self.config.hyperparameters.get("dies") == ["reduce", plan.round]:
            self.vanish()
        if self.config.hyperparameters.get("dies") == ["gather", plan.round]:
            table, count = self._table, iter(range(10**6))
            send = table.send_segment
            stop = 2 * (len(plan.ring) - 1) - 1

            def some(*told):
                if next(count) == stop:
                    self.vanish()
                send(*told)

            table.send_segment = some
        super()._combine(plan)

    def vanish(self):
        self.cm.cleanup()
        raise SystemExit("vanished")

    def compose(self):
        super().compose()


def run_with_a_death(job, timeout=60):
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a member hangs"
    return {role.number: error for role, error in job.errors.items()}


@pytest.mark.parametrize("place", ["train", "reduce", "gather"])
@pytest.mark.parametrize("victim", [1, 2, 3, 4])
def test_the_ring_is_formed_anew_of_those_who_are_left(job, place, victim):
    numbers = [1, 2, 3, 4]
    for number in numbers:
        hyper = {"rounds": 4, **({"dies": [place, 2]} if number == victim else {})}
        job.add(Mortal, "trainer", number, **peerkit.settings(peers=3), hyperparameters=hyper)
    errors = run_with_a_death(job)
    assert list(errors) == [victim]
    assert isinstance(errors[victim], SystemExit)
    left = [role for role in job.roles if role.number != victim]
    for role in left:
        assert set(role.after) == {1, 2, 3, 4} if place != "gather" else {1, 4} <= set(role.after)
        assert np.array_equal(role.model["w"], left[0].model["w"])
    if place != "gather":
        rest = [n for n in numbers if n != victim]
        expected = federated(rest, 3, left[0].after[1])
        assert close(left[0].after[4], expected[3])
    assert len(said("model", left)) == 1


def test_too_few_members_end_the_work_of_all_in_words(job):
    for number in (1, 2, 3):
        hyper = {"rounds": 4, **({"dies": ["train", 2]} if number == 2 else {})}
        more = {**peerkit.settings(peers=2), "policy": {"minTrainers": 3, "joinDeadline": 0.5}}
        job.add(Mortal, "trainer", number, **more, hyperparameters=hyper)
    errors = run_with_a_death(job)
    assert set(errors) == {1, 2, 3}
    for number in (1, 3):
        assert isinstance(errors[number], RoundFailed)
        assert "Round 2 has 2 of at least 3 updates" in errors[number].message


def test_who_joins_later_gets_the_model_and_takes_part_from_the_next_round_on(job):
    come, there = threading.Event(), threading.Event()

    class Patient(Member):
        def hold(self, round):
            if round == 2:
                come.set()
                assert there.wait(30)

    first = members(job, [1, 2], cls=Patient, rounds=5)
    for role in first:
        job.start(role)
    assert come.wait(30)

    class Late(Member):
        def member_check(self):
            there.set()
            super().member_check()

    late = job.add(Late, "trainer", 3, **peerkit.settings(peers=0, rounds=5))
    job.start(late)
    job.join()
    assert set(first[0].after) == {1, 2, 3, 4, 5}
    joined = min(late.after)
    assert joined in (3, 4)  # it came while the others worked on the second
    assert set(late.after) == set(range(joined, 6))
    expected = federated([1, 2, 3], 6 - joined, first[0].after[joined - 1])
    for role in (*first, late):
        assert close(role.after[5], expected[6 - joined])


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_a_member_that_is_too_slow_is_left_behind_and_takes_part_again(job, slow):
    """Whoever it is: the one who speaks for all, too."""
    on, back = threading.Event(), threading.Event()

    class Slow(Member):
        def hold(self, round):
            if self.number == slow and round == 2:
                assert on.wait(30)
            elif round == 4:  # else they would be at the end before it is back
                assert back.wait(30)

        def evaluate(self):
            super().evaluate()
            if self._round >= 2:
                (back if self.number == slow else on).set()

    policy = {"roundDeadline": 1.0, "joinDeadline": 1.0}
    peers = members(job, [1, 2, 3], cls=Slow, rounds=6, policy=policy)
    job.run()
    others = [peer for peer in peers if peer.number != slow]
    assert all(np.array_equal(peer.model["w"], others[0].model["w"]) for peer in peers)
    assert all(set(peer.after) == {1, 2, 3, 4, 5, 6} for peer in others)
    assert close(others[0].after[2], federated([peer.number for peer in others], 1, others[0].after[1])[1])
    assert close(others[0].after[6], federated([1, 2, 3], 1, others[0].after[5])[1])


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_a_member_that_comes_with_its_update_when_the_others_have_ended_leaves(job, slow):
    kept = threading.Event()

    class Slow(Member):
        def hold(self, round):
            if self.number == slow and round == 2:
                assert kept.wait(30)

        def save_model(self):
            super().save_model()
            kept.set()

    peers = members(job, [1, 2, 3], cls=Slow, rounds=3, policy={"roundDeadline": 0.5, "joinDeadline": 0.5})
    job.run()
    assert [set(peer.after) for peer in peers] == [{1} if peer.number == slow else {1, 2, 3} for peer in peers]


def test_an_update_with_values_that_are_not_finite_is_left_out(job):
    class Broken(Member):
        def train(self):
            super().train()
            if self.number == 2 and self._round == 2:
                self.model["w"] = self.model["w"] * np.nan

    peers = members(job, [1, 2, 3], cls=Broken, rounds=2)
    job.run()
    assert close(peers[0].after[2], federated([1, 3], 1, peers[0].after[1])[1])
    assert "not finite" in peers[1].link_for_test.of("warning")[0]


def test_a_servers_rule_is_refused_in_words(job):
    members(job, [1], optimizer={"sort": "fedadam", "kwargs": {}})
    with pytest.raises(SpecError, match="no place for a server's rule such as 'fedadam'"):
        job.run()


def test_the_proximal_term_knows_what_training_began_from(job):
    seen = []

    class Proximal(Member):
        def train(self):
            super().train()
            seen.append(self.regularizer.gradient(self.model))

    members(job, [1, 2], cls=Proximal, rounds=2, optimizer={"sort": "fedprox", "kwargs": {"mu": 0.1}})
    job.run()
    assert all(np.abs(gradient["w"]).max() > 0 for gradient in seen)


def test_all_begin_from_the_registered_model_that_the_job_names(tmp_path):
    registry = {"sort": "local", "uri": str(tmp_path / "registry")}
    first = Job(tmp_path / "first")
    before = members(first, [1, 2], rounds=2, registry=registry)
    first.run()
    second = Job(tmp_path / "second")
    after = members(second, [1, 2, 3], rounds=1, registry=registry, baseModel={"name": "test", "version": 1})
    second.run()
    expected = federated([1, 2, 3], 1, before[0].after[2])[1]
    assert all(close(peer.after[1], expected) for peer in after)


def test_updates_are_private_where_the_job_says_so_and_the_budget_ends_the_work(job):
    privacy = {"sort": "dp", "kwargs": {"clip_threshold": 0.5, "noise_factor": 2.0, "budget": 8.0}}
    peers = members(job, [1, 2, 3], rounds=50, privacy=privacy)
    job.run()
    rounds = said("round", peers)
    spent = [metrics["epsilon"] for _, metrics in rounds]
    assert spent == sorted(spent)
    assert 1 <= len(rounds) < 50
    assert all(np.array_equal(peer.model["w"], peers[0].model["w"]) for peer in peers)


def test_a_script_of_flames_library_names_the_same_class():
    from flame.mode.distributed.trainer import TAG_RING_ALLREDUCE
    from flame.mode.distributed.trainer import Trainer as Named

    assert Named is Trainer
    assert Named.get_func_tags() == [TAG_RING_ALLREDUCE] == ["ring_allreduce"]


# What members have said.


def said_by(end, kind, metadata):
    return SimpleNamespace(kind=kind, attempt=1, metadata=metadata)


def test_a_word_that_another_speaker_has_answered_is_not_a_members_last_one():
    me = SimpleNamespace(end="a", attempt=1, order="")
    channel = SimpleNamespace(get_backend_id=lambda: "a", member=lambda end: me)
    post = Post(channel, RoundPolicy(), None)
    post._note("b", said_by("b", STAND, {"stand": [NEWCOMER, False, 2]}))  # "a" was the speaker for a moment
    answered = Plan(id="c/1/1", round=0, giver="c", to=["a", "b"], tickets={"a": 5, "b": 3})
    post._note("c", said_by("c", PLAN, {"plan": msgspec.to_builtins(answered)}))
    assert post._stands == {}
    post._note("b", said_by("b", STAND, {"stand": [1, True, 4]}))
    assert post._stands == {"b": (1, Stand(1, True, 4))}


# By hand, as processes.

SCRIPT = """
import time
import numpy as np
from flame.sdk import Config
from flame.sdk.mode.distributed.trainer import Trainer

class Member(Trainer):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(1000)}

    def train(self):
        print("training", self._round, flush=True)
        if self.config.hyperparameters.get("stop") == self._round:
            time.sleep(3600)
        self.model["w"] += int(self.config.task_id[-2:])
        self.dataset_size = 1

    def evaluate(self):
        print("mean", self._round, self.model["w"][0], flush=True)
        # The others go on when the third one is back.
        channel = self.channel("ring_allreduce")
        if self._round == self.config.hyperparameters.get("await"):
            assert channel.wait_until(lambda: len(channel.all_ends()) == 2, 60)

member = Member(Config("config.json"))
member.compose()
member.run()
"""


def test_a_killed_member_that_is_started_anew_is_given_the_model_and_takes_part(tmp_path):
    (tmp_path / "member.py").write_text(SCRIPT)
    hand = Hand(tmp_path, channels=[peerkit.RING], groupAssociation={"ring": "default"}, peers={"ring": 2})
    try:
        steady = [
            hand.start("trainer", number, tmp_path / "member.py", hyperparameters={"rounds": 6, "await": 2})
            for number in (1, 2)
        ]
        victim = hand.start("trainer", 3, tmp_path / "member.py", hyperparameters={"rounds": 6, "stop": 2})
        victim.wait_for("training 2")
        victim.kill()
        for worker in steady:
            worker.wait_for("mean 2 3.5")  # 2 after the first round, then the mean of 1 and 2
        anew = hand.start("trainer", 3, tmp_path / "member.py", 2, hyperparameters={"rounds": 6})
        assert [worker.end() for worker in (*steady, anew)] == [0, 0, 0], anew.text
    finally:
        hand.stop()
    last = [next(line for line in worker.lines if line.startswith("mean 6")) for worker in (*steady, anew)]
    assert len(set(last)) == 1
    began = int(next(line for line in anew.lines if line.startswith("training")).split()[1])
    assert began in (3, 4)
    # 1.5 a round without it, 2 with it.
    assert float(last[0].split()[2]) == 3.5 + 1.5 * (began - 3) + 2 * (7 - began)


# The example, through the whole system.


def test_the_ring_of_the_example_computes_what_the_formula_says(tmp_path):
    with runkit.Run(tmp_path, "distributed") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 16))
    weights, bias = runkit.federated([1, 2, 3, 4], 15)
    assert np.allclose(result.models["model.safetensors"]["weights"], weights, rtol=0, atol=1e-9)
    assert np.allclose(result.models["model.safetensors"]["bias"], bias, rtol=0, atol=1e-9)


def test_the_ring_works_over_mqtt_too(tmp_path):
    mosquitto = Mosquitto(tmp_path / "mosquitto")
    try:
        broker = f'brokers=[{{"sort": "mqtt", "host": "{mosquitto.address}"}}]'
        with runkit.Run(tmp_path, "distributed", "backend=mqtt", broker, "hyperparameters.rounds=3") as run:
            result = run.result()
    finally:
        mosquitto.kill()
    assert result.state == "completed"
    weights, _ = runkit.federated([1, 2, 3, 4], 3)
    assert np.allclose(result.models["model.safetensors"]["weights"], weights, rtol=0, atol=1e-9)


def test_a_killed_member_is_done_without_where_the_policy_allows_it(tmp_path):
    with runkit.Run(tmp_path, "distributed", "hyperparameters.rounds=200") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 200
    assert "the job goes on without it" in result.text
    assert "model.safetensors" in result.models


def test_a_killed_member_that_the_policy_needs_ends_the_job(tmp_path):
    with runkit.Run(tmp_path, "distributed", "hyperparameters.rounds=100000", "policy.minTrainers=4") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "failed"
    assert "SIGKILL" in result.text
