"""An optimizer that is restarted from its checkpoint goes on to the same bits."""

import numpy as np
import pytest

from flame.errors import WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update
from flame.sdk.optimizers.fedgft import SUMS

KWARGS = {
    "feddyn": {"alpha": 0.1},
    "fedprox": {"mu": 0.1},
    "fedgft": {"fair": "SP", "gamma": 0.5},
    "krum": {"f": 0},
    "multikrum": {"f": 0},
}


def play(optimizer, model, first, last):
    """Rounds ``first`` to ``last`` with updates that depend on the round alone."""
    for number in range(first, last):
        rng = np.random.default_rng(number)
        optimizer.begin(model, number)
        for k in range(4):
            weights = {
                "w": (model["w"] + rng.normal(size=(50, 3))).astype("f4"),
                "bn.running_mean": rng.normal(size=3).astype("f4"),
                "n": model["n"] + k,
            }
            extra = {name: rng.normal(size=value.shape).astype("f4") for name, value in optimizer.extra().items()}
            if optimizer.sort == "fedgft":
                extra = {SUMS: rng.random(4)}
            optimizer.fold(
                Update(end=f"t{(k + number) % 5}", weights=weights, count=k + 1.5, version=number, extra=extra)
            )
        model = optimizer.finish()
    return model


@pytest.mark.parametrize("sort", optimizers.names())
def test_a_restart_in_the_middle_changes_nothing(sort):
    start = {"w": np.zeros((50, 3), "f4"), "bn.running_mean": np.zeros(3, "f4"), "n": np.array(3)}
    whole = optimizers.make(sort, KWARGS.get(sort))
    expected = play(whole, start, 0, 6)

    before = optimizers.make(sort, KWARGS.get(sort))
    middle = {name: np.array(array) for name, array in play(before, start, 0, 3).items()}
    saved = {name: np.array(array) for name, array in before.state().items()}
    after = optimizers.make(sort, KWARGS.get(sort))
    after.load_state(saved)
    for name, array in after.state().items():
        np.testing.assert_array_equal(array, saved[name])
    result = play(after, middle, 3, 6)

    for name, array in expected.items():
        assert np.asarray(array).tobytes() == np.asarray(result[name]).tobytes()
    for name, array in whole.state().items():
        assert np.asarray(array).tobytes() == np.asarray(after.state()[name]).tobytes()


def test_the_state_of_another_model_is_refused():
    optimizer = optimizers.make("fedadam")
    optimizer.begin({"w": np.zeros(3, "f4")}, 0)
    other = optimizers.make("fedadam")
    other.load_state(optimizer.state())
    with pytest.raises(WorkerError, match=r"does not fit the model: see m\.w"):
        other.begin({"w": np.zeros(4, "f4")}, 0)


@pytest.mark.parametrize(("sort", "kwargs"), [("feddyn", {"alpha": 0.1}), ("scaffold", {})])
def test_a_restarted_trainer_keeps_its_part(sort, kwargs):
    model = {"w": np.arange(4, dtype="f8")}
    moved = {"w": model["w"] + 0.5}
    first = optimizers.make(sort, kwargs).regularizer()
    first.begin(model, {})
    first.finish(moved, 2, 0.1)
    second = optimizers.make(sort, kwargs).regularizer()
    second.load_state(first.state())
    for each in (first, second):
        each.begin(moved, {})
    np.testing.assert_array_equal(first.gradient(moved)["w"], second.gradient(moved)["w"])
    assert np.abs(first.gradient(moved)["w"]).max() > 0
