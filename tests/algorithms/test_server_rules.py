"""Every server-side rule against a few lines of numpy in float64, written from its paper, over several rounds."""

import itertools

import numpy as np
import pytest

from flame.errors import RoundFailed, WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update
from flame.sdk.optimizers.base import difference

ROUNDS, TRAINERS = 6, 5
SHAPES = {"conv.weight": (4, 3), "conv.bias": (4,), "bn.running_var": (4,), "bn.num_batches_tracked": ()}
TRAINED = ("conv.weight", "conv.bias")


def random_model(rng, scale=1.0):
    model = {name: (scale * rng.normal(size=shape)).astype("f4") for name, shape in SHAPES.items()}
    model["bn.running_var"] = np.abs(model["bn.running_var"])
    model["bn.num_batches_tracked"] = np.array(rng.integers(0, 100))
    return model


def updates_of(model, rng, number):
    """Models near ``model``, with different numbers of samples."""
    near = [
        {
            name: array + rng.normal(size=array.shape).astype("f4") * 0.1 if array.dtype == np.float32 else array + i
            for name, array in model.items()
        }
        for i in range(number)
    ]
    return [
        Update(end=f"t{i}", weights=weights, count=float(rng.integers(1, 20)), version=0)
        for i, weights in enumerate(near)
    ]


def mean(updates, name):
    total = sum(each.count for each in updates)
    return sum(each.count * each.weights[name].astype("f8") for each in updates) / total


def one_round(optimizer, model, updates, number=0):
    optimizer.begin(model, number)
    for each in updates:
        optimizer.fold(each)
    return optimizer.finish()


class Paper:
    """The adaptive rules of Reddi et al., algorithm 2, and the momentum of Hsu et al., in float64."""

    def __init__(self, sort, beta_1, beta_2, eta, tau, x):
        self.sort, self.beta_1, self.beta_2, self.eta, self.tau = sort, beta_1, beta_2, eta, tau
        self.x = x.astype("f8")
        self.m = np.zeros_like(self.x)
        self.v = np.full_like(self.x, tau**2)

    def step(self, average):
        delta = average - self.x
        if self.sort == "fedavgm":
            self.m = self.beta_1 * self.m + delta
            self.x = self.x + self.eta * self.m
            return
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * delta
        if self.sort == "fedadagrad":
            self.v = self.v + delta**2
        elif self.sort == "fedadam":
            self.v = self.beta_2 * self.v + (1 - self.beta_2) * delta**2
        else:
            self.v = self.v - (1 - self.beta_2) * delta**2 * np.sign(self.v - delta**2)
        self.x = self.x + self.eta * self.m / (np.sqrt(self.v) + self.tau)


@pytest.mark.parametrize("sort", ["fedavgm", "fedadam", "fedadagrad", "fedyogi"])
def test_the_server_steps_as_in_the_paper(sort):
    rng = np.random.default_rng(3)
    model = random_model(rng)
    kwargs = {"beta_1": 0.8, "eta": 0.05}
    if sort != "fedavgm":
        kwargs |= {"beta_2": 0.95, "tau": 0.01}
    optimizer = optimizers.make(sort, kwargs)
    papers = {name: Paper(sort, 0.8, 0.95, 0.05, 0.01, model[name]) for name in TRAINED}
    for number in range(ROUNDS):
        updates = updates_of(model, rng, TRAINERS)
        averages = {name: mean(updates, name) for name in SHAPES}
        model = one_round(optimizer, model, updates, number)
        for name, paper in papers.items():
            paper.step(averages[name])
            np.testing.assert_allclose(model[name], paper.x, atol=1e-5)
        # Statistics and counters are only averaged: a step along them could make a variance negative.
        np.testing.assert_allclose(model["bn.running_var"], averages["bn.running_var"], atol=1e-6)
        assert model["bn.num_batches_tracked"] == np.rint(averages["bn.num_batches_tracked"])


def test_momentum_without_memory_is_federated_averaging():
    rng = np.random.default_rng(4)
    model = random_model(rng)
    updates = updates_of(model, rng, TRAINERS)
    plain = one_round(optimizers.make("fedavg"), model, updates)
    still = one_round(optimizers.make("fedavgm", {"beta_1": 0.0}), model, updates)
    for name in SHAPES:
        np.testing.assert_allclose(plain[name], still[name], atol=1e-6)


def test_stale_differences_count_less_in_the_buffer():
    rng = np.random.default_rng(5)
    model = random_model(rng)
    optimizer = optimizers.make("fedbuff", {"agg_goal": 3, "eta": 0.7})
    assert optimizer.differences
    past = []
    for number in range(ROUNDS):
        past.append({name: array.copy() for name, array in model.items()})
        optimizer.begin(model, number)
        expected = {name: model[name].astype("f8") for name in SHAPES if name != "bn.num_batches_tracked"}
        counters = []
        for i in range(3):
            version = max(0, number - i)
            (update,) = updates_of(past[version], rng, 1)
            moved = difference(update.weights, past[version])
            assert not optimizer.full
            optimizer.fold(Update(end=f"t{i}", weights=moved, count=update.count, version=version))
            factor = 1 / np.sqrt(1 + number - version)
            counters.append((factor, int(update.weights["bn.num_batches_tracked"])))
            for name, values in expected.items():
                values += 0.7 / 3 * factor * (update.weights[name].astype("f8") - past[version][name])
        assert optimizer.full
        model = optimizer.finish()
        for name, values in expected.items():
            np.testing.assert_allclose(model[name], values, atol=1e-5)
        assert model["bn.num_batches_tracked"] == np.rint(sum(f * c for f, c in counters) / sum(f for f, _ in counters))


def test_an_update_from_the_future_is_refused():
    optimizer = optimizers.make("fedbuff")
    optimizer.begin({"w": np.zeros(2, "f4")}, 3)
    with pytest.raises(WorkerError, match="starts from round 4; this is round 3"):
        optimizer.fold(Update(end="t", weights={"w": np.zeros(2, "f4")}, count=1, version=4))


@pytest.mark.parametrize("number", [1, 4, 7])
def test_the_median_is_taken_by_coordinate(number):
    rng = np.random.default_rng(6)
    model = random_model(rng)
    updates = updates_of(model, rng, number)
    result = one_round(optimizers.make("median"), model, updates)
    for name in SHAPES:
        expected = np.median(np.stack([each.weights[name] for each in updates]).astype("f8"), axis=0)
        expected = expected if name != "bn.num_batches_tracked" else np.rint(expected)
        np.testing.assert_allclose(result[name], expected, atol=1e-6)


@pytest.mark.parametrize(("beta", "number", "cut"), [(0.1, 10, 1), (0.25, 7, 1), (0.3, 10, 3), (0.1, 5, 0)])
def test_the_trimmed_mean_leaves_out_both_tails(beta, number, cut):
    rng = np.random.default_rng(7)
    model = random_model(rng)
    updates = updates_of(model, rng, number)
    result = one_round(optimizers.make("trimmedmean", {"beta": beta}), model, updates)
    for name in TRAINED:
        ordered = np.sort(np.stack([each.weights[name] for each in updates]).astype("f8"), axis=0)
        np.testing.assert_allclose(result[name], ordered[cut : number - cut].mean(axis=0), atol=1e-6)


def paper_krum(vectors, f):
    """Indices by rising score, from the definition."""
    scores = []
    for i, own in enumerate(vectors):
        others = sorted(float(((own - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(others[: len(vectors) - f - 2]))
    return np.argsort(scores, kind="stable")


@pytest.mark.parametrize("number", [7, 12])
def test_krum_takes_the_update_amid_its_neighbours(number):
    rng = np.random.default_rng(8)
    for _ in range(ROUNDS):
        model = random_model(rng, scale=100.0)
        updates = updates_of(model, rng, number)
        vectors = [
            np.concatenate([np.ravel(each.weights[name]) for name in SHAPES if name != "bn.num_batches_tracked"])
            for each in updates
        ]
        order = paper_krum([vector.astype("f8") for vector in vectors], 2)
        one = one_round(optimizers.make("krum", {"f": 2}), model, updates)
        np.testing.assert_array_equal(one["conv.weight"], updates[order[0]].weights["conv.weight"])
        several = one_round(optimizers.make("multikrum", {"f": 2, "m": 3}), model, updates)
        expected = np.mean([updates[i].weights["conv.weight"].astype("f8") for i in order[:3]], axis=0)
        np.testing.assert_allclose(several["conv.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize("sort", ["median", "trimmedmean", "krum", "multikrum"])
def test_a_liar_cannot_move_a_robust_rule(sort):
    rng = np.random.default_rng(9)
    model = random_model(rng)
    honest = updates_of(model, rng, 9)
    lie = {name: array + 1000 for name, array in model.items()}
    updates = [*honest, Update(end="liar", weights=lie, count=1e9, version=0)]
    result = one_round(optimizers.make(sort), model, updates)
    for name in TRAINED:
        assert np.abs(result[name] - model[name]).max() < 1


def test_krum_says_how_many_updates_it_needs():
    model = {"w": np.zeros(2, "f4")}
    updates = [Update(end=f"t{i}", weights=model, count=1, version=0) for i in range(6)]
    with pytest.raises(RoundFailed, match="krum with f=2 needs at least 7 updates, this round has 6"):
        one_round(optimizers.make("krum", {"f": 2}), model, updates)


@pytest.mark.parametrize("sort", ["median", "trimmedmean", "krum", "multikrum"])
def test_robust_rules_do_not_depend_on_the_order_of_arrival(sort):
    rng = np.random.default_rng(10)
    model = random_model(rng)
    updates = updates_of(model, rng, 5)
    results = [
        one_round(optimizers.make(sort), model, order)
        for order in itertools.islice(itertools.permutations(updates), 20)
    ]
    for other in results[1:]:
        for name in SHAPES:
            assert np.asarray(results[0][name]).tobytes() == np.asarray(other[name]).tobytes()


def test_only_the_robust_rules_keep_updates():
    kept = {"median", "trimmedmean", "krum", "multikrum"}
    for name in optimizers.names():
        assert optimizers.optimizers.load(name).streaming == (name not in kept)
