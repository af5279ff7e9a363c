"""Gossip learning: each member's model is what the mixing matrix says, and the matrix keeps the mean."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import peerkit
import runkit
from peerkit import InThread, Job, Line, close, said

from flame.errors import RoundFailed, SpecError
from flame.sdk.mode.gossip.graph import graph_of, metropolis_weights
from flame.sdk.mode.gossip.trainer import Trainer

CHANNEL = {**peerkit.RING, "name": "neighbours", "funcTags": {"trainer": ["gossip"]}}


class Member(InThread, Line, Trainer):
    pass


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def members(job, numbers, cls=Member, hyper=None, **more):
    hyper = {"rounds": 3, **(hyper or {})}
    more = {**peerkit.settings(CHANNEL, peers=len(numbers) - 1), "hyperparameters": hyper, **more}
    return [job.add(cls, "trainer", number, **more) for number in numbers]


def in_order(peers):
    return sorted(peers, key=lambda peer: peer._table.me.order)


def run_with_deaths(job, timeout=60):
    for role in job.roles:
        job.start(role)
    for thread in job.threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a member hangs"
    return {role.number: error for role, error in job.errors.items()}


# The mixing matrix, written from the paper.


def matrix(adjacent):
    """Metropolis-Hastings weights of a boolean adjacency matrix."""
    degrees = adjacent.sum(axis=1)
    w = np.where(adjacent, 1 / (1 + np.maximum.outer(degrees, degrees)), 0.0)
    return w + np.diag(1 - w.sum(axis=1))


def adjacency(kind, size):
    near = np.zeros((size, size), bool)
    for i in range(size):
        for j in range(size):
            near[i, j] = i != j and (kind == "complete" or (i - j) % size in (1, size - 1))
    return near


graphs = st.one_of(
    st.sampled_from(["ring", "complete", "random"]),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(list), max_size=20),
)


@given(graphs, st.integers(0, 9), st.integers(0, 5), st.integers(0, 3))
def test_the_weights_are_doubly_stochastic_and_symmetric_for_any_graph(chosen, size, number, seed):
    names = [f"m{i}" for i in range(size)]
    graph = graph_of(chosen, names, number, seed)
    w = np.zeros((size, size))
    for i, name in enumerate(names):
        own, others = metropolis_weights(graph, name)
        w[i, i] = own
        for other, weight in others.items():
            w[i, names.index(other)] = weight
    assert np.allclose(w, w.T)
    assert np.allclose(w.sum(axis=0), 1)
    assert (np.diag(w) > 0).all()
    assert (w >= 0).all()


@given(st.integers(2, 9))
def test_named_graphs_give_the_papers_weights_and_bring_all_to_the_mean(size):
    names = [f"m{i}" for i in range(size)]
    for kind in ("ring", "complete"):
        graph = graph_of(kind, names, 1, 0)
        near = np.array([[other in graph[name] for other in names] for name in names])
        assert np.array_equal(near, adjacency(kind, size))
        mixed = np.linalg.matrix_power(matrix(near), 2000)
        assert np.allclose(mixed, 1 / size, atol=1e-6)


@pytest.mark.parametrize("chosen", ["star", [[0]], [[0, "b"]], 7])
def test_what_is_no_graph_is_refused_in_words(job, chosen):
    members(job, [1], hyper={"graph": chosen})
    with pytest.raises(SpecError, match="is no graph"):
        job.run()


# The job.


def expected(order, near, rounds):
    """Each member's model after each round, by plain numpy: train, then mix."""
    w = matrix(near)
    models = [{"w": np.full(3, float(order[0])), "b": np.array(0.5)} for _ in order]
    after = []
    for _ in range(rounds):
        trained = [peerkit.step(model, number) for model, number in zip(models, order, strict=True)]
        models = [
            {name: sum(w[i, j] * trained[j][name] for j in range(len(order))) for name in trained[0]}
            for i in range(len(order))
        ]
        after.append(models)
    return after


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["ring", "complete"])
@pytest.mark.parametrize("numbers", [[1], [1, 2], [1, 2, 3, 4, 5]])
def test_every_members_model_is_what_the_matrix_says(job, numbers, kind, deterministic):
    peers = members(job, numbers, hyper={"rounds": 4, "graph": kind}, policy={"deterministic": deterministic})
    job.run()
    order = in_order(peers)
    after = expected([peer.number for peer in order], adjacency(kind, len(order)), 4)
    for place, peer in enumerate(order):
        assert all(close(peer.after[number + 1], after[number][place]) for number in range(4))
    assert [number for number, _ in said("round", peers)] == [1, 2, 3, 4]
    assert len(said("model", peers)) == 1


def test_a_graph_of_ones_own_is_given_as_pairs_of_places(job):
    peers = members(job, [1, 2, 3, 4], hyper={"rounds": 3, "graph": [[0, 1], [1, 2], [1, 3]]})
    job.run()
    order = in_order(peers)
    near = np.zeros((4, 4), bool)
    near[1, [0, 2, 3]] = near[[0, 2, 3], 1] = True
    after = expected([peer.number for peer in order], near, 3)
    assert all(close(peer.after[3], after[2][place]) for place, peer in enumerate(order))


def test_models_travel_to_neighbours_alone(job):
    peers = members(job, [1, 2, 3, 4, 5], hyper={"rounds": 2})
    job.run()
    assert all(len(peer.neighbours) == 2 for peer in peers)


def test_large_models_do_not_wait_for_each_other_in_a_circle(job):
    class Large(Member):
        def initialize(self):
            self.model = {"w": np.zeros(2_200_000)}  # more than a channel's window

        def train(self):
            self.model["w"] += self.number

        def evaluate(self):
            pass

    peers = members(job, [1, 2, 3], cls=Large, hyper={"rounds": 1, "graph": "complete"})
    job.run()
    assert all(np.allclose(peer.model["w"], 2) for peer in peers)


class Mortal(Member):
    def hold(self, round):
        if self.config.hyperparameters.get("dies") == ["train", self.number, round]:
            self.vanish()

    def _combine(self, plan):
        if self.config.hyperparameters.get("dies") == ["mix", self.number, plan.round]:
            self.vanish()
        super()._combine(plan)

    def vanish(self):
        self.cm.cleanup()
        raise SystemExit("vanished")


@pytest.mark.parametrize("place", ["train", "mix"])
def test_a_member_that_dies_is_not_waited_for(job, place):
    peers = members(job, [1, 2, 3, 4], cls=Mortal, hyper={"rounds": 4, "dies": [place, 2, 2]})
    errors = run_with_deaths(job)
    assert list(errors) == [2]
    assert isinstance(errors[2], SystemExit)
    left = [peer for peer in in_order(peers) if peer.number != 2]
    assert all(sorted(peer.after) == [1, 2, 3, 4] for peer in left)
    # Among those who are left the mean goes on from what they had.
    for number in (2, 3, 4):
        before = {name: [peer.after[number - 1][name] for peer in left] for name in ("w", "b")}
        trained = [peerkit.step({name: before[name][i] for name in before}, peer.number) for i, peer in enumerate(left)]
        for name in ("w", "b"):
            now = np.mean([peer.after[number][name] for peer in left], axis=0)
            assert np.allclose(now, np.mean([model[name] for model in trained], axis=0), atol=1e-9)


def test_too_few_members_end_the_work_of_all_in_words(job):
    policy = {"minTrainers": 3, "joinDeadline": 0.5}
    members(job, [1, 2, 3], cls=Mortal, hyper={"rounds": 4, "dies": ["train", 2, 2]}, policy=policy)
    errors = run_with_deaths(job)
    assert isinstance(errors.pop(2), SystemExit)
    assert set(errors) == {1, 3}
    assert all(isinstance(error, RoundFailed) for error in errors.values())


# The example, through the whole system.


def test_the_example_computes_what_the_matrix_says(tmp_path):
    with runkit.Run(tmp_path, "gossip", "hyperparameters.graph=complete") as run:
        result = run.result()
    assert result.state == "completed"
    assert result.rounds == list(range(1, 21))
    # On the complete graph each mix is the plain mean.
    sites = [runkit.Softmax(number, epochs=2, batch=32, rate=0.1) for number in (1, 2, 3, 4)]
    w, b = np.zeros((64, 10)), np.zeros(10)
    for _ in range(20):
        trained = [site.train(w, b) for site in sites]
        w, b = np.mean([one for one, _ in trained], axis=0), np.mean([one for _, one in trained], axis=0)
    assert np.allclose(result.models["model.safetensors"]["weights"], w, rtol=0, atol=1e-9)


def test_a_killed_member_is_done_without_where_the_policy_allows_it(tmp_path):
    with runkit.Run(tmp_path, "gossip", "hyperparameters.rounds=200") as run:
        run.wait_for("round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert result.rounds[-1] == 200
    assert "the job goes on without it" in result.text
