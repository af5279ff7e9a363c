"""Federated averaging and the flat arithmetic under it."""

import numpy as np
import pytest

from flame.errors import WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update


def update(end, weights, count=1.0, version=0, **more):
    return Update(end=end, weights=weights, count=count, version=version, **more)


def run_round(optimizer, weights, updates, round=0):
    optimizer.begin(weights, round)
    for each in updates:
        optimizer.fold(each)
    return optimizer.finish()


def test_the_mean_is_weighted_by_samples():
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 4), "b": (), "c": (0, 2), "d": (5,)}
    models = [{k: rng.normal(size=s).astype("f4") for k, s in shapes.items()} for _ in range(5)]
    counts = [3, 1, 10, 7, 2]
    optimizer = optimizers.make("fedavg")
    result = run_round(optimizer, models[0], [update(f"t{i}", m, c) for i, (m, c) in enumerate(zip(models, counts))])
    for name in shapes:
        expected = sum(c * m[name].astype("f8") for c, m in zip(counts, models)) / sum(counts)
        assert result[name].dtype == np.float32
        assert result[name].shape == shapes[name]
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, atol=1e-7)


def test_a_round_without_updates_keeps_the_model():
    model = {"w": np.ones(3, "f4")}
    assert run_round(optimizers.make("fedavg"), model, []) is model


def test_values_that_are_not_finite_are_refused_and_leave_no_trace():
    model = {"w": np.zeros(200_000, "f4")}
    bad = model["w"].copy()
    bad[-1] = np.inf
    optimizer = optimizers.make("fedavg")
    optimizer.begin(model, 0)
    optimizer.fold(update("good", {"w": np.full(200_000, 2, "f4")}, 5))
    with pytest.raises(WorkerError, match="evil.*not finite"):
        optimizer.fold(update("evil", {"w": bad}, 50))
    assert (optimizer.finish()["w"] == 2).all()
