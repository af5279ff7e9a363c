"""Federated averaging and the flat arithmetic under it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.errors import WorkerError
from flame.sdk import optimizers
from flame.sdk.optimizers import Update
from flame.sdk.optimizers import layout as layouts


def update(end, weights, count=1.0, version=0, **more):
    return Update(end=end, weights=weights, count=count, version=version, **more)


def average(models, counts, optimizer=None):
    optimizer = optimizer or optimizers.make("fedavg")
    optimizer.begin(models[0], 0)
    for i, (model, count) in enumerate(zip(models, counts, strict=True)):
        optimizer.fold(update(f"t{i:03}", model, count))
    return optimizer.finish()


def side_by_side(shapes, rng, dtype="f4"):
    """A model whose tensors are views of one buffer, as the codec makes them."""
    buffer = rng.normal(size=sum(int(np.prod(s)) for s in shapes.values())).astype(dtype)
    buffer.setflags(write=False)
    model, at = {}, 0
    for name, shape in shapes.items():
        model[name] = buffer[at : at + int(np.prod(shape))].reshape(shape)
        at += int(np.prod(shape))
    return model


SHAPES = {"a": (3, 4), "b": (), "empty": (0, 2), "c": (70_000,), "d": (5, 2, 2)}


@pytest.mark.parametrize("together", [True, False])
def test_the_mean_is_weighted_by_samples(together):
    rng = np.random.default_rng(1)
    models = [side_by_side(SHAPES, rng) for _ in range(5)]
    if not together:
        models = [{name: np.array(array, order="F") for name, array in model.items()} for model in models]
    counts = [3, 1, 10, 7, 2]
    result = average(models, counts)
    assert list(result) == list(SHAPES)
    for name, shape in SHAPES.items():
        expected = sum(c * m[name].astype("f8") for c, m in zip(counts, models, strict=True)) / sum(counts)
        assert result[name].dtype == np.float32
        assert result[name].shape == shape
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, atol=1e-6)


def test_tensors_that_lie_side_by_side_are_folded_as_one():
    rng = np.random.default_rng(1)
    model = side_by_side({f"t{i}": (700,) for i in range(160)}, rng)
    layout = layouts.Layout(model)
    assert len(layout.runs(model, "t")) == 1
    assert len(layout.runs({name: array.copy() for name, array in model.items()}, "t")) > 1


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("i8", [100, 103, 105], 104),  # (100 + 2 * 103 + 3 * 105) / 6 = 103.5 -> 104 (ties to even)
        ("u1", [250, 255, 255], 254),
        ("?", [True, False, True], True),
        ("?", [True, False, False], False),
        ("f2", [1000.0, 1010.0, 1020.0], 1013.5),
        ("f8", [1.0, 2.0, 4.0], 17 / 6),
        ("c8", [1 + 1j, 2, 4j], (5 + 13j) / 6),
    ],
)
def test_every_type_is_averaged_in_a_wide_one_and_given_back(dtype, values, expected):
    models = [{"w": np.full(3, v, dtype), "f": np.zeros(2, "f4")} for v in values]
    result = average(models, [1, 2, 3])["w"]
    assert result.dtype == np.dtype(dtype)
    np.testing.assert_allclose(result, np.array(expected, dtype), rtol=1e-6)


def test_batch_norm_counters_of_pytorch_survive():
    torch = pytest.importorskip("torch")
    norms = [torch.nn.BatchNorm1d(4) for _ in range(3)]
    for i, norm in enumerate(norms):
        for _ in range(i + 3):
            norm(torch.randn(5, 4))
    states = [{name: value.numpy() for name, value in norm.state_dict().items()} for norm in norms]
    result = average(states, [1, 1, 1])
    assert result["num_batches_tracked"].dtype == np.int64
    assert result["num_batches_tracked"] == 4
    norms[0].load_state_dict({name: torch.from_numpy(value) for name, value in result.items()})


def test_bfloat16_of_pytorch_is_averaged_in_float32():
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    models = [{"w": torch.randn(40).to(torch.bfloat16), "v": torch.randn(3)} for _ in range(4)]
    result = average(models, [1, 2, 3, 4])
    wide = sum(c * m["w"].double() for c, m in zip([1, 2, 3, 4], models, strict=True)) / 10
    assert result["w"].dtype is torch.bfloat16
    assert torch.equal(result["w"], wide.to(torch.bfloat16))


def test_a_type_that_cannot_be_averaged_is_named():
    with pytest.raises(WorkerError, match="<U1 cannot be averaged"):
        optimizers.make("fedavg").begin({"w": np.array(["x"])}, 0)


def test_a_round_without_updates_keeps_the_model():
    model = {"w": np.ones(3, "f4")}
    optimizer = optimizers.make("fedavg")
    optimizer.begin(model, 0)
    assert optimizer.finish() is model


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(bad, dtype):
    model = {"w": np.zeros(200_000, dtype)}
    wrong = model["w"].copy()
    wrong[-1] = bad
    optimizer = optimizers.make("fedavg")
    optimizer.begin(model, 0)
    optimizer.fold(update("good", {"w": np.full(200_000, 2, dtype)}, 5))
    with pytest.raises(WorkerError, match="evil has values that are not finite"):
        optimizer.fold(update("evil", {"w": wrong}, 50))
    assert (optimizer.finish()["w"] == 2).all()


def test_large_values_whose_squares_overflow_are_not_refused():
    model = {"w": np.full(10, 1e30, "f4")}
    np.testing.assert_array_equal(average([model, model], [1, 1])["w"], model["w"])


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"w": np.zeros((2, 3), "f4")}, "'b' is in only one"),
        ({"w": np.zeros((2, 3), "f4"), "c": np.zeros(2, "f4")}, "'b' is in only one"),
        (
            {"w": np.zeros((3, 2), "f4"), "b": np.zeros(2, "f4")},
            r"'w' is float32\[3, 2\], the model's is float32\[2, 3\]",
        ),
        ({"w": np.zeros((2, 3), "f4"), "b": np.zeros(2, "f8")}, "'b' is float64"),
    ],
)
@pytest.mark.parametrize("sort", ["fedavg", "median"])
def test_an_update_that_does_not_fit_is_refused_with_the_first_difference(weights, says, sort):
    optimizer = optimizers.make(sort)
    optimizer.begin({"w": np.zeros((2, 3), "f4"), "b": np.zeros(2, "f4")}, 0)
    with pytest.raises(WorkerError, match=f"update of t7 does not fit the model: {says}"):
        optimizer.fold(update("t7", weights))


@pytest.mark.parametrize("count", [0, -1, float("nan"), float("inf")])
def test_an_update_must_stand_for_some_samples(count):
    optimizer = optimizers.make("fedavg")
    optimizer.begin({"w": np.zeros(2, "f4")}, 0)
    with pytest.raises(WorkerError, match="t1 has the weight"):
        optimizer.fold(update("t1", {"w": np.zeros(2, "f4")}, count))


def test_the_order_of_names_in_an_update_does_not_matter():
    first, second = np.arange(3, dtype="f4"), np.ones(2, "f4")
    optimizer = optimizers.make("fedavg")
    optimizer.begin({"a": first, "b": second}, 0)
    optimizer.fold(update("t", {"b": second, "a": first}))
    result = optimizer.finish()
    assert list(result) == ["a", "b"]
    np.testing.assert_array_equal(result["a"], first)


def test_two_buffers_take_turns_however_many_rounds():
    optimizer = optimizers.make("fedavg")
    model = {"w": np.zeros(100_000, "f4")}
    seen = set()
    for number in range(6):
        optimizer.begin(model, number)
        optimizer.fold(update("t", {"w": np.full(100_000, number, "f4")}))
        model = optimizer.finish()
        seen.add(model["w"].__array_interface__["data"][0])
    assert len(seen) == 2


def test_a_model_that_somebody_still_holds_is_never_overwritten():
    optimizer = optimizers.make("fedavg")
    model, held = {"w": np.zeros(1000, "f4")}, []
    for number in range(5):
        optimizer.begin(model, number)
        optimizer.fold(update("t", {"w": np.full(1000, number, "f4")}))
        model = optimizer.finish()
        held.append(memoryview(model["w"]))
    for number, view in enumerate(held):
        assert (np.asarray(view) == number).all()


models = st.lists(
    st.tuples(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4),
        st.floats(1e-3, 1e5),
    ),
    min_size=1,
    max_size=12,
)


def as_models(drawn):
    return [{"w": np.array(values, "f4")} for values, _ in drawn], [count for _, count in drawn]


@given(models, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_arrival_changes_the_mean_by_rounding_only(drawn, random):
    shuffled = drawn[:]
    random.shuffle(shuffled)
    np.testing.assert_allclose(
        average(*as_models(drawn))["w"], average(*as_models(shuffled))["w"], rtol=1e-5, atol=1e-2
    )


@given(models)
@settings(max_examples=50, deadline=None)
def test_the_same_order_gives_the_same_bits(drawn):
    first, second = average(*as_models(drawn))["w"], average(*as_models(drawn))["w"]
    assert first.tobytes() == second.tobytes()


@given(models, st.floats(1e-2, 1e3))
@settings(max_examples=50, deadline=None)
def test_only_the_ratio_of_counts_matters(drawn, factor):
    values, counts = as_models(drawn)
    scaled = average(values, [factor * count for count in counts])["w"]
    np.testing.assert_allclose(average(values, counts)["w"], scaled, rtol=1e-5, atol=1e-3)


@given(st.floats(-1e6, 1e6, width=32), st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_a_constant_stays_what_it_is(value, counts):
    result = average([{"w": np.full(3, value, "f4")}] * len(counts), counts)["w"]
    np.testing.assert_allclose(result, value, rtol=2e-6)


def test_a_small_model_of_many_tensors_is_folded_in_one_go():
    rng = np.random.default_rng(1)
    model = {f"t{i}": rng.normal(size=3).astype("f2" if i % 2 else "f4") for i in range(160)} | {"n": np.array(3)}
    layout = layouts.Layout(model)
    assert {run.group: run.array.dtype.name for run in layout.runs(model, "t")} == {
        "float32": "float32",
        layouts.COUNTED: "float64",
    }
    result = average([model, {name: array * 3 for name, array in model.items()}], [1, 1])
    for name, array in model.items():
        assert result[name].dtype == array.dtype
        np.testing.assert_allclose(result[name], array * 2, rtol=1e-3)
