"""What is compressed comes back within its bounds, what is lost is made up for, and what cannot be sent is refused."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flame.errors import CodecError, SpecError
from flame.sdk import compression
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.inproc import InprocBackend
from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.compression.base import Compressor
from flame.sdk.compression.casts import BFloat16, Float16
from flame.sdk.compression.exchange import Exchange
from flame.sdk.compression.int8 import SCALES, Int8
from flame.sdk.compression.topk import INDICES, VALUES, TopK
from flame.sdk.mode.message import MessageType
from flame.spec import known

SORTS = ["none", "float16", "bfloat16", "int8", "topk"]

floats = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32),
)
models = st.dictionaries(st.text(st.characters(codec="ascii"), max_size=5), floats, max_size=4)


def roundtrip(compressor: Compressor, weights: dict[str, Any]) -> dict[str, Any]:
    arrays, metadata = compressor.compress(weights)
    for array in arrays.values():
        array.setflags(write=False)
    back = compressor.decompress(arrays, metadata)
    assert set(back) == set(weights)
    for name, array in weights.items():
        assert back[name].shape == array.shape
        assert back[name].dtype == array.dtype
    return back


@given(models)
def test_float16_is_within_half_a_unit_in_the_last_place(weights: dict[str, Any]) -> None:
    back = roundtrip(Float16(), weights)
    for name, array in weights.items():
        assert (np.abs(back[name] - array) <= np.maximum(np.abs(array) * 2.0**-11, 2.0**-25)).all()


@given(models)
def test_bfloat16_is_within_half_a_unit_in_the_last_place(weights: dict[str, Any]) -> None:
    back = roundtrip(BFloat16(), weights)
    for name, array in weights.items():
        assert (np.abs(back[name] - array) <= np.abs(array) * 2.0**-8 * 1.001 + 1e-38).all()


def test_bfloat16_rounds_as_pytorch_does() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    back = roundtrip(BFloat16(), {"w": values})["w"]
    assert np.array_equal(back, torch.from_numpy(values).bfloat16().float().numpy())


@given(models, st.sampled_from([0, 1, 4, 1024]), st.sampled_from(["nearest", "stochastic"]))
def test_int8_is_within_a_step_of_its_block(weights: dict[str, Any], block: int, rounding: str) -> None:
    back = roundtrip(Int8(block=block, rounding=rounding, seed=1), weights)
    for name, array in weights.items():
        flat, got = array.reshape(-1), back[name].reshape(-1)
        size = block or max(1, flat.size)
        for start in range(0, flat.size, size):
            part = flat[start : start + size]
            step = np.abs(part).max() / 127
            bound = step * (0.5 if rounding == "nearest" else 1.0) * 1.001 + 2e-36
            assert (np.abs(got[start : start + size] - part) <= bound).all()


@given(models, st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_topk_sends_the_largest_changes(weights: dict[str, Any], k: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    compressor = TopK(k)
    reference = {
        name: array + random.standard_normal(array.shape).astype(array.dtype) for name, array in weights.items()
    }
    reference = {name: np.asarray(array) for name, array in reference.items()}
    compressor.reference(reference)
    back = roundtrip(compressor, weights)
    for name, array in weights.items():
        if array.size == 0:
            continue
        change = (array - reference[name]).reshape(-1)
        moved = np.flatnonzero((back[name] - reference[name]).reshape(-1))
        assert len(moved) <= max(1, round(k * array.size))
        left = np.delete(np.abs(change), moved)
        if len(moved) and len(left):
            assert np.abs(change)[moved].min() >= left.max() - 1e-2
        assert np.allclose(back[name].reshape(-1)[moved], array.reshape(-1)[moved], rtol=1e-5, atol=1e-2)


def test_topk_with_everything_is_the_model_itself() -> None:
    weights = {"w": np.arange(10, dtype=np.float32)}
    compressor = TopK(1.0)
    compressor.reference({"w": np.zeros(10, np.float32)})
    assert np.array_equal(roundtrip(compressor, weights)["w"], weights["w"])


def test_int8_takes_a_quarter_and_topk_a_fraction_of_the_bytes() -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}
    size = weights["w"].nbytes
    arrays, _ = Int8().compress(weights)
    assert sum(array.nbytes for array in arrays.values()) < size * 0.252
    compressor = TopK(0.01)
    compressor.reference({"w": np.zeros((256, 1024), np.float32)})
    arrays, _ = compressor.compress(weights)
    assert sum(array.nbytes for array in arrays.values()) <= size * 0.0201


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)),
    st.integers(1, 12),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_int8_with_feedback_sums_to_the_truth(rounding: str, value: Any, rounds: int, seed: int) -> None:
    """All messages together differ from all models by the last error only, however many there were."""
    random = np.random.default_rng(seed)
    compressor = Int8(rounding=rounding, seed=seed)
    true = np.zeros(value.shape)
    said = np.zeros(value.shape)
    for _ in range(rounds):
        model = (value * random.uniform(0.5, 1.5, value.shape)).astype(np.float32)
        true += model
        said += roundtrip(compressor, {"w": model})["w"]
    step = 100 * 1.5 * 1.02 / 127
    assert (np.abs(said - true) <= step * (0.51 if rounding == "nearest" else 1.02) + rounds * 1e-4).all()


def test_the_mean_of_what_is_decoded_tends_to_the_truth() -> None:
    value = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    errors = []
    for rounds in (1, 10, 100):
        compressor = Int8()
        mean = sum(roundtrip(compressor, {"w": value})["w"].astype(float) for _ in range(rounds)) / rounds
        errors.append(np.abs(mean - value).max())
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[0] / 50


def test_stochastic_rounding_is_right_on_average_without_feedback() -> None:
    value = np.full(4096, 0.3, np.float32)
    value[0] = 1
    back = roundtrip(Int8(block=0, rounding="stochastic", seed=3), {"w": value})["w"]
    assert abs(back[1:].mean() - 0.3) < 0.001
    assert len(np.unique(back[1:])) == 2


@given(st.integers(1, 60), st.sampled_from([0.02, 0.1, 0.5]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_topk_with_feedback_sums_to_the_truth(size: int, k: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    compressor = TopK(k)
    true = np.zeros(size)
    said = np.zeros(size)
    for _ in range(20):
        reference = random.standard_normal(size).astype(np.float32)
        change = random.standard_normal(size).astype(np.float32)
        compressor.reference({"w": reference})
        said += roundtrip(compressor, {"w": reference + change})["w"] - reference
        true += change
    left = compressor._errors["w"]
    assert np.allclose(said + left, true, atol=1e-3)


def test_without_feedback_nothing_is_remembered() -> None:
    weights = {"w": np.random.default_rng(0).standard_normal(100).astype(np.float32)}
    for compressor in (Int8(feedback=False), BFloat16(feedback=False), Float16(feedback=False)):
        first, second = (compressor.compress(weights)[0] for _ in range(2))
        assert np.array_equal(first["w"], second["w"])
    for remembering in (Int8(), BFloat16(), Float16()):
        first, second = (remembering.compress(weights)[0] for _ in range(2))
        assert not np.array_equal(first["w"], second["w"])


@pytest.mark.parametrize("sort", SORTS[1:])
def test_integers_and_empty_arrays_pass_through(sort: str) -> None:
    weights = {
        "steps": np.array(12345678901, np.int64),
        "mask": np.array([True, False]),
        "empty": np.empty((0, 3), np.float32),
        "w": np.ones((2, 2), np.float32),
    }
    compressor = compression.compressors.make(sort)
    compressor.reference({name: np.zeros_like(array) for name, array in weights.items()})
    back = roundtrip(compressor, weights)
    for name in ("steps", "mask", "empty"):
        assert np.array_equal(back[name], weights[name])


@pytest.mark.parametrize("sort", SORTS[1:])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(sort: str, bad: float) -> None:
    compressor = compression.compressors.make(sort)
    weights = {"layer.weight": np.array([1, bad], np.float32)}
    compressor.reference({"layer.weight": np.zeros(2, np.float32)})
    with pytest.raises(CodecError, match=r"'layer\.weight' holds values that are not finite"):
        compressor.compress(weights)
    weights["layer.weight"] = np.ones(2, np.float32)
    roundtrip(compressor, weights)


def test_what_a_type_cannot_say_is_refused() -> None:
    with pytest.raises(CodecError, match="beyond 65504, which float16 cannot say"):
        Float16().compress({"w": np.array([1e6], np.float32)})
    with pytest.raises(CodecError, match="bfloat16 cannot say"):
        BFloat16().compress({"w": np.array([1e300])})
    for compressor, name in ((Int8(), SCALES), (TopK(), INDICES), (TopK(), VALUES)):
        with pytest.raises(CodecError, match="cannot be named"):
            compressor.compress({name: np.ones(3, np.float32)})
    with pytest.raises(CodecError, match="cannot be sent as a difference"):
        TopK().compress({"w": np.ones(3, np.float32)})


@pytest.mark.parametrize(
    ("sort", "kwargs", "words"),
    [
        ("int8", {"block": -1}, "block must be at least 0"),
        ("int8", {"rounding": "up"}, "nearest or stochastic"),
        ("topk", {"k": 0}, "k must be above 0"),
        ("topk", {"k": 1.5}, "k must be"),
        ("topk", {"history": 0}, "history must be at least 1"),
        ("int8", {"blocks": 3}, "Did you mean 'block'"),
        ("int4", {}, "no compression 'int4'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(sort: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        compression.make(sort, kwargs)


def test_the_names_are_those_that_the_control_plane_knows() -> None:
    assert compression.names() == sorted(known.COMPRESSIONS.names)


def damage(draw: st.DrawFn, arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Change something that a peer could change."""
    what = draw(st.sampled_from(["drop array", "retype", "reshape", "drop key", "odd value", "extra", "numbers"]))
    names = sorted(arrays)
    name = draw(st.sampled_from(names))
    if what == "drop array":
        del arrays[name]
    elif what == "retype":
        arrays[name] = arrays[name].astype(draw(st.sampled_from([np.float64, np.int16, np.uint32])))
    elif what == "reshape":
        arrays[name] = np.resize(arrays[name], draw(st.integers(0, 40)))
    elif what == "drop key":
        metadata.pop(draw(st.sampled_from(sorted(metadata))))
    elif what == "odd value":
        odd = [None, -1, "x", 10**15, [], {}, [["w", "float32", 10**15]], [["w"]], {"w": "object"}, {"q": "float32"}]
        metadata[draw(st.sampled_from(sorted(metadata)))] = draw(st.sampled_from(odd))
    elif what == "extra":
        arrays["extra"] = np.ones(3, np.float32)
    elif arrays[name].size:
        arrays[name] = np.full_like(arrays[name], draw(st.sampled_from([0, 3, 100])))


@given(st.data(), st.sampled_from(SORTS[1:]))
@settings(max_examples=300, deadline=None)
def test_damaged_arrays_are_refused_or_harmless(data: st.DataObject, sort: str) -> None:
    weights = {"w": np.arange(30, dtype=np.float32).reshape(5, 6), "b": np.ones(3), "n": np.array([1, 2])}
    compressor = compression.compressors.make(sort)
    compressor.reference({name: np.zeros_like(array) for name, array in weights.items()})
    arrays, metadata = compressor.compress(weights)
    for _ in range(data.draw(st.integers(1, 2))):
        if arrays and metadata:
            data.draw(st.composite(lambda draw: damage(draw, arrays, metadata))())
    try:
        back = compressor.decompress(arrays, metadata)
    except CodecError:
        return
    assert sum(array.nbytes for array in back.values()) < 10_000


# Over channels.


class Pair:
    """An aggregator's and a trainer's channel, joined, with compressions of their own."""

    def __init__(self, sort: str, kwargs: dict[str, Any] | None = None, trainers: int = 1, **settings: Any) -> None:
        self.made = []

        def make(end: str, role: str, other: str) -> Channel:
            me = Member(end=end, role=role)
            backend = InprocBackend(BackendContext(job=f"compression {id(self)}", key=b"k", me=me))
            chosen = compression.make(sort, kwargs, **settings)
            channel = Channel("param", backend=backend, job="job", me=me, other_role=other, compression=chosen)
            channel.join()
            self.made.append(channel)
            return channel

        self.make = make
        self.aggregator = make("agg", "aggregator", "trainer")
        self.trainers = [make(f"t{i}", "trainer", "aggregator") for i in range(trainers)]

    def close(self) -> None:
        for channel in self.made:
            channel.leave()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Any:
    pairs = []

    def make(*args: Any, **kwargs: Any) -> Pair:
        pairs.append(Pair(*args, **kwargs))
        return pairs[-1]

    yield make
    for each in pairs:
        each.close()


def rounds_of(pair: Pair, count: int, size: int = 200) -> tuple[Any, Any]:
    """Some rounds of federated averaging towards each trainer's own target; gives the model and what it should be."""
    random = np.random.default_rng(5)
    targets = [random.standard_normal(size).astype(np.float32) for _ in pair.trainers]
    model = {"w": np.zeros(size, np.float32), "steps": np.array([0])}
    for number in range(count):
        pair.aggregator.broadcast({MessageType.WEIGHTS: model, MessageType.ROUND: number})
        for trainer, target in zip(pair.trainers, targets, strict=True):
            message, _ = trainer.recv("agg", 10)
            given = message[MessageType.WEIGHTS]
            after = given["w"] + 0.05 * (target - given["w"])
            answer = {MessageType.WEIGHTS: {"w": after, "steps": given["steps"] + 1}, MessageType.DATASET_SIZE: 1}
            trainer.send("agg", answer, 10)
        total = np.zeros(size)
        for trainer_number in range(len(targets)):
            message, _ = pair.aggregator.recv(f"t{trainer_number}", 10)
            assert message["dataset_size"] == 1
            assert "compression" not in message
            total += message["weights"]["w"]
            steps = message["weights"]["steps"]
        model = {"w": (total / len(targets)).astype(np.float32), "steps": steps}
    assert model["steps"].tolist() == [count]
    return model["w"], np.mean(targets, axis=0)


@pytest.mark.parametrize(
    ("sort", "kwargs", "tolerance"),
    [
        ("none", {}, 1e-3),
        ("float16", {}, 0.01),
        ("bfloat16", {}, 0.01),
        ("int8", {}, 0.03),
        ("int8", {"rounding": "stochastic", "block": 64, "seed": 1}, 0.06),
        ("topk", {"k": 0.2}, 0.3),  # what is held back swings with the trainers' differences
    ],
)
def test_training_over_a_compressed_channel_reaches_the_same_model(
    pair: Any, sort: str, kwargs: dict[str, Any], tolerance: float
) -> None:
    got, wanted = rounds_of(pair(sort, kwargs, trainers=2), 200)
    assert np.abs(got - wanted).max() < tolerance


def test_fewer_bytes_travel(pair: Any) -> None:
    model = {"w": np.random.default_rng(0).standard_normal(100_000).astype(np.float32)}
    sizes = {}
    for sort in SORTS:
        made = pair(sort)
        made.aggregator.send("t0", {"weights": model})
        message, _ = made.trainers[0].recv("agg", 10)
        assert np.abs(message["weights"]["w"] - model["w"]).max() < 0.05
        after = {"w": message["weights"]["w"] + np.float32(0.5)}
        made.trainers[0].send("agg", {"weights": after})
        answer, _ = made.aggregator.recv("t0", 10)
        sizes[sort] = answer.nbytes
    assert sizes["float16"] < sizes["none"] * 0.51
    assert sizes["int8"] < sizes["none"] * 0.26
    assert sizes["topk"] < sizes["none"] * 0.03


def test_messages_without_weights_are_left_alone(pair: Any) -> None:
    made = pair("int8")
    made.aggregator.send("t0", {"eot": True, "extra": {"w": np.array([1.5, 1e-9])}})
    message, _ = made.trainers[0].recv("agg", 10)
    assert message["extra"]["w"].tolist() == [1.5, 1e-9]


def test_a_model_given_again_to_others_in_the_same_round_is_the_same_reference(pair: Any) -> None:
    made = pair("topk", {"k": 1.0}, trainers=2)
    model = {"w": np.arange(5, dtype=np.float32)}
    made.aggregator.send("t0", {"weights": model})
    made.aggregator.send("t1", {"weights": model})
    for trainer in made.trainers:
        given, _ = trainer.recv("agg", 10)
        trainer.send("agg", {"weights": {"w": given["weights"]["w"] * 2}})
    for end in ("t0", "t1"):
        answer, _ = made.aggregator.recv(end, 10)
        assert answer["weights"]["w"].tolist() == [0, 2, 4, 6, 8]


def test_an_answer_to_a_model_that_is_not_kept_is_no_message(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = pair("topk", {"k": 1.0})
    made.aggregator.send("t0", {"weights": {"w": np.zeros(3, np.float32)}})
    made.trainers[0].recv("agg", 10)
    made.trainers[0].send("agg", {"weights": {"w": np.ones(3, np.float32)}})
    made.aggregator.send("t0", {"weights": {"w": np.full(3, 2, np.float32)}})
    answer, _ = made.aggregator.recv("t0", 10)
    assert answer is None
    assert "not kept any more" in caplog.text


def test_with_a_history_older_models_may_be_answered(pair: Any) -> None:
    made = pair("topk", {"k": 1.0, "history": 2})
    model = {"w": np.zeros(3, np.float32)}
    made.aggregator.send("t0", {"weights": model})
    made.trainers[0].recv("agg", 10)
    made.trainers[0].send("agg", {"weights": {"w": np.ones(3, np.float32)}})
    model["w"] += 5  # in its own memory, as models do
    made.aggregator.send("t0", {"weights": model})
    answer, _ = made.aggregator.recv("t0", 10)
    assert answer["weights"]["w"].tolist() == [1, 1, 1]


def test_differences_of_the_algorithm_itself_are_compressed_as_they_are(pair: Any) -> None:
    made = pair("topk", {"k": 0.5}, differences=True)
    for number in range(3):
        made.aggregator.send("t0", {"weights": {"w": np.full(4, 100 + number, np.float32)}})
    for _ in range(3):
        made.trainers[0].recv("agg", 10)
    made.trainers[0].send("agg", {"weights": {"w": np.array([0.1, -3, 0.2, 4], np.float32)}})
    answer, _ = made.aggregator.recv("t0", 10)
    assert answer["weights"]["w"].tolist() == [0, -3, 0, 4]


def test_a_restarted_aggregator_does_not_take_answers_to_its_predecessor(pair: Any) -> None:
    made = pair("topk", {"k": 1.0})
    made.aggregator.send("t0", {"weights": {"w": np.zeros(3, np.float32)}})
    made.trainers[0].recv("agg", 10)
    made.aggregator.leave()
    again = made.make("agg", "aggregator", "trainer")
    made.trainers[0].send("agg", {"weights": {"w": np.ones(3, np.float32)}})
    assert again.recv("t0", 10)[0] is None
    again.send("t0", {"weights": {"w": np.full(3, 7, np.float32)}})
    given, _ = made.trainers[0].recv("agg", 10)
    made.trainers[0].send("agg", {"weights": {"w": given["weights"]["w"] + 1}})
    answer, _ = again.recv("t0", 10)
    assert answer["weights"]["w"].tolist() == [8, 8, 8]


def test_torch_tensors_are_compressed_too(pair: Any) -> None:
    torch = pytest.importorskip("torch")
    made = pair("float16")
    made.aggregator.send("t0", {"weights": {"w": torch.full((2, 2), 0.5)}})
    message, _ = made.trainers[0].recv("agg", 10)
    assert message["weights"]["w"].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_two_sides_that_disagree_are_told(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    exchange = compression.make("int8")
    sent = exchange.compress({"weights": {"w": np.ones(3, np.float32)}})
    with pytest.raises(CodecError, match="compressed with 'int8', not with 'float16'"):
        compression.make("float16").restore(Message(dict(sent)))
    for how in (7, {}, {"sort": "int8"}, {"sort": "int8", "answers": 5, "metadata": 3}):
        with pytest.raises(CodecError):
            compression.make("int8").restore(Message({"weights": {}, "compression": how}))


def test_several_threads_may_send(pair: Any) -> None:
    made = pair("int8")
    exchange = made.trainers[0]._compression
    assert isinstance(exchange, Exchange)
    model = {"w": np.random.default_rng(0).standard_normal(50_000).astype(np.float32)}
    threads = [
        threading.Thread(target=lambda: [made.trainers[0].send("agg", {"weights": model}) for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(20):
        message, _ = made.aggregator.recv("t0", 10)
        assert np.abs(message["weights"]["w"] - model["w"]).max() < 0.05


@pytest.mark.parametrize("k", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("shape", ["normal", "sorted", "equal", "spikes"])
def test_topk_of_a_large_array_is_exact(k: float, shape: str) -> None:
    change = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    if shape == "sorted":
        change.sort()
    elif shape == "equal":
        change[:] = 1
    elif shape == "spikes":
        change[:] = 0
        change[97::97] = 5  # all of them, and nothing else, in the sample's stride but one off its start
    compressor = TopK(k)
    compressor.reference({"w": np.zeros(100_000, np.float32)})
    back = roundtrip(compressor, {"w": change})["w"]
    count = round(k * change.size)
    largest = np.sort(np.abs(change))[-count:]
    assert np.array_equal(np.sort(np.abs(back))[-count:], largest)
    assert np.count_nonzero(back) <= count


@pytest.mark.parametrize(("sort", "kwargs"), [("topk", {"k": 0.1}), ("int8", {"rounding": "stochastic", "seed": 4})])
def test_who_takes_up_what_was_remembered_sends_the_same(sort, kwargs):
    first, second = compression.make(sort, kwargs), compression.make(sort, kwargs)
    given = {"weights": {"w": np.zeros(500, np.float32)}}
    version = {"sort": sort, "answers": None, "version": 1, "metadata": {"types": {}, "block": 1024}}

    def answer(side, number):
        side.restore(Message({**given, "compression": version}))
        update = {"weights": {"w": np.random.default_rng(number).normal(size=500).astype(np.float32)}}
        prepared = side.compress(update)
        assert side.compress(prepared) is prepared, "what is prepared is not done twice"
        return {name: array.tobytes() for name, array in prepared["weights"].items()}

    answer(first, 1)
    remembered = {name: np.array(v) if hasattr(v, "dtype") else v for name, v in first.state().items()}
    sent = answer(first, 2)
    assert answer(second, 2) != sent, "it does matter"
    second.load_state(remembered)
    assert answer(second, 2) == sent
    first.load_state(remembered)
    assert answer(first, 2) == sent, "a round that is done again"
