"""Synchronous federated learning computes the weighted mean, whatever the model's library, and keeps its round policy."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from syncjob import InThread, Job

from flame.errors import RoundFailed, WorkerError
from flame.sdk import Aggregator, MessageType, Tasklet, Trainer
from flame.sdk.weights import get_weights


class NumpyTrainer(InThread, Trainer):
    """Adds its number to every weight; stands for number + 1 samples."""

    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id.split("-")[1])
        self.seen = []

    def initialize(self):
        self.model = {"w": np.full(3, -1.0, np.float32), "b": np.zeros((), np.float32)}

    def train(self):
        self.seen.append((self._round, float(self.model["b"])))
        self.model["w"] += self.number
        self.model["b"] = self.model["b"] + np.float32(1)
        self.dataset_size = self.number + 1

    def evaluate(self):
        self.update_metrics({"loss": np.float32(0.5)})


class NumpyAggregator(InThread, Aggregator):
    def __init__(self, config):
        self.config = config
        self.after = []

    def initialize(self):
        self.model = {"w": np.zeros(3, np.float32), "b": np.zeros((), np.float32)}

    def evaluate(self):
        self.after.append(float(self.model["w"][0]))
        self.update_metrics({"accuracy": self._round / 10})


def closed_form(numbers, rounds):
    counts = [n + 1 for n in numbers]
    step = sum(n * c for n, c in zip(numbers, counts, strict=True)) / sum(counts)
    return [step * (r + 1) for r in range(rounds)]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("trainers", [1, 2, 7])
def test_every_round_gives_the_mean_weighted_by_dataset_size(job, trainers, deterministic):
    policy = {"deterministic": deterministic}
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=5, trainers=trainers, policy=policy)
    others = [job.add(NumpyTrainer, "trainer", number, policy=policy) for number in range(trainers)]
    job.run()
    assert aggregator.after == pytest.approx(closed_form(range(trainers), 5), rel=1e-6)
    assert all([number for number, _ in trainer.seen] == [1, 2, 3, 4, 5] for trainer in others)
    # Every round begins from the aggregate of the one before.
    assert others[0].seen[4][1] == pytest.approx(4)
    said = aggregator.link_for_test
    assert said.of("round") == [(r, {"accuracy": r / 10}) for r in range(1, 6)]
    assert others[0].link_for_test.of("metrics") == [(r, {"loss": 0.5}) for r in range(1, 6)]
    assert said.of("warning") == []


def test_the_model_is_handed_in_at_the_end(job):
    from safetensors.numpy import load_file

    aggregator = job.add(NumpyAggregator, "aggregator", rounds=2, trainers=1)
    job.add(NumpyTrainer, "trainer", 0)
    job.run()
    (model,) = aggregator.link_for_test.of("model")
    assert model["name"] == "test"
    assert model["registry"] == "dummy"
    assert load_file(model["path"])["b"] == pytest.approx(2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)
        self.bn = torch.nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.fc(x))


class TorchTrainer(InThread, Trainer):
    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id.split("-")[1])
        self.sent = []

    def initialize(self):
        self.model = Net()

    def train(self):
        torch.manual_seed(self.number)
        for _ in range(self.number + 1):
            self.model(torch.randn(8, 4)).square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        self.dataset_size = 10 * (self.number + 1)
        self.sent.append({k: v.clone() for k, v in self.model.state_dict().items()})


class TorchAggregator(InThread, Aggregator):
    def __init__(self, config):
        self.config = config
        self.after = []

    def initialize(self):
        torch.manual_seed(9)
        self.model = Net()

    def evaluate(self):
        self.after.append({k: v.clone() for k, v in self.model.state_dict().items()})


def test_torch_models_are_averaged_with_batchnorms_buffers(job):
    aggregator = job.add(TorchAggregator, "aggregator", rounds=3, trainers=3)
    trainers = [job.add(TorchTrainer, "trainer", number) for number in range(3)]
    job.run()
    for index, after in enumerate(aggregator.after):
        for name, tensor in after.items():
            mean = sum((t.number + 1) / 6 * t.sent[index][name].double() for t in trainers)
            if not tensor.is_floating_point():
                mean = mean.round()
            assert torch.allclose(tensor.double(), mean.double(), atol=1e-6), (index, name)
    assert aggregator.after[-1]["bn.num_batches_tracked"].dtype == torch.int64
    assert aggregator.after[-1]["bn.num_batches_tracked"] > 0


class KerasLike:
    def __init__(self):
        self.weights = [np.zeros((2, 2), np.float32), np.zeros(2, np.float32)]

    def get_weights(self):
        return [w.copy() for w in self.weights]

    def set_weights(self, weights):
        self.weights = [np.array(w) for w in weights]


class KerasTrainer(NumpyTrainer):
    def initialize(self):
        self.model = KerasLike()

    def train(self):
        self.model.weights = [w + self.number for w in self.model.weights]
        self.dataset_size = self.number + 1


class KerasAggregator(NumpyAggregator):
    def initialize(self):
        self.model = KerasLike()

    def evaluate(self):
        self.after.append(float(self.model.weights[1][0]))


def test_models_with_get_weights_and_set_weights_are_averaged(job):
    aggregator = job.add(KerasAggregator, "aggregator", rounds=3, trainers=2)
    for number in range(2):
        job.add(KerasTrainer, "trainer", number)
    job.run()
    assert aggregator.after == pytest.approx(closed_form(range(2), 3), rel=1e-6)


def test_deterministic_jobs_are_equal_bit_by_bit(tmp_path):
    class Odd(NumpyTrainer):
        def train(self):
            rng = np.random.default_rng(self.number * 100 + self._round)
            self.model["w"] += rng.standard_normal(3).astype(np.float32) * 10.0 ** rng.integers(-4, 4)
            self.dataset_size = self.number + 3

    models = []
    for run in range(2):
        job = Job(tmp_path / str(run))
        policy = {"deterministic": True}
        aggregator = job.add(NumpyAggregator, "aggregator", rounds=4, trainers=6, policy=policy)
        # Started in another order, with other ids.
        for number in range(6) if run == 0 else reversed(range(6)):
            job.add(Odd, "trainer", number, policy=policy, taskid=f"t-{number}-{(7 * number + 3 * run) % 6}")
        job.run()
        models.append(get_weights(aggregator.model))
    assert models[0]["w"].tobytes() == models[1]["w"].tobytes()


def test_a_trainer_without_data_counts_nothing(job):
    class Empty(NumpyTrainer):
        def train(self):
            super().train()
            if self.number == 1:
                self.dataset_size = 0

    aggregator = job.add(NumpyAggregator, "aggregator", rounds=2, trainers=3)
    for number in range(3):
        job.add(Empty, "trainer", number)
    job.run()
    assert aggregator.after == pytest.approx(closed_form([0, 2], 2))


def test_the_workflow_can_be_changed_by_a_subclass(job):
    class Changed(NumpyTrainer):
        def compose(self):
            super().compose()
            self.steps = []
            self.composer.get_tasklet("fetch").insert_before(Tasklet("ready", self.steps.append, "ready"))
            self.composer.get_tasklet("evaluate").replace_with(Tasklet("look", self.steps.append, "look"))
            self.composer.get_tasklet("save_metrics").remove()

    job.add(NumpyAggregator, "aggregator", rounds=2, trainers=1)
    trainer = job.add(Changed, "trainer", 0)
    job.run()
    assert trainer.steps == ["ready", "look", "ready", "look", "ready"]
    assert trainer.composer.aliases == [
        "internal_init", "load_data", "initialize", "ready", "fetch", "train", "look", "upload",
    ]  # fmt: skip


def test_the_chains_are_those_of_flames_library():
    aggregator = NumpyAggregator(None)
    aggregator.compose()
    assert aggregator.composer.aliases == [
        "internal_init", "load_data", "initialize", "load_base_model", "resume",
        "distribute", "aggregate", "train", "evaluate", "save_metrics", "checkpoint", "inc_round",
        "commit", "inform_end_of_training", "save_model",
    ]  # fmt: skip


class Diverging(NumpyTrainer):
    def train(self):
        super().train()
        if self.number == 1:
            self.model["w"][0] = np.nan


def test_an_update_that_is_not_finite_is_left_out_with_a_warning(job):
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=2, trainers=3)
    for number in range(3):
        job.add(Diverging, "trainer", number)
    job.run()
    assert aggregator.after == pytest.approx(closed_form([0, 2], 2))
    warnings = aggregator.link_for_test.of("warning")
    assert len(warnings) == 2
    assert "not finite" in warnings[0]


def test_a_round_without_enough_good_updates_fails_at_once_and_says_why(job):
    class Wrong(NumpyTrainer):
        def initialize(self):
            super().initialize()
            self.model["w"] = np.zeros(4, np.float32)

        def _fetch_weights(self, tag):
            message = self._newest(self.channel(tag))
            self._work_done = MessageType.EOT in message
            self._round = message.get(MessageType.ROUND)

    aggregator = job.add(NumpyAggregator, "aggregator", rounds=2, trainers=1)
    job.add(Wrong, "trainer", 1, policy={"joinDeadline": 0.3})
    for role in job.roles:
        job.start(role)
    job.threads[0].join(30)
    error = job.errors[aggregator]
    assert isinstance(error, RoundFailed)
    assert "Round 1 has 0 of at least 1 updates (policy.minTrainers)" in error.message
    assert "'w' is float32[4], the model's is float32[3]" in error.message


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (
            type("NoSize", (NumpyTrainer,), {"train": lambda self: None}),
            "set self.dataset_size to the number of samples",
        ),
        (type("NoModel", (NumpyTrainer,), {"initialize": lambda self: None}), r"Set it in initialize\(\)"),
    ],
)
def test_what_a_trainer_forgot_is_said_in_words(job, cls, sentence):
    job.add(NumpyAggregator, "aggregator", rounds=1, trainers=1, policy={"joinDeadline": 0.3})
    trainer = job.add(cls, "trainer", 0)
    for role in job.roles:
        job.start(role)
    job.threads[1].join(30)
    with pytest.raises(WorkerError, match=sentence):
        raise job.errors[trainer]


# Round policy.


class Gate(NumpyTrainer):
    """A trainer that waits in ``train`` for the test, in the rounds that it is told."""

    def __init__(self, config):
        super().__init__(config)
        self.hold = {}
        self.reached = {}

    def held(self, *rounds):
        self.hold = {number: threading.Event() for number in rounds}
        self.reached = {number: threading.Event() for number in rounds}
        return self

    def train(self):
        if self._round in self.hold:
            self.reached[self._round].set()
            assert self.hold[self._round].wait(30)
        super().train()


def test_a_trainer_that_misses_the_deadline_is_left_behind_and_comes_back(job):
    policy = {"roundDeadline": 0.3, "minTrainers": 1}

    class Patient(NumpyAggregator):
        def evaluate(self):
            super().evaluate()
            if self._round == 1:
                slow.hold[1].set()  # its update of round 1 comes in round 2 or later
            if self._round == 2:  # ... but has come before round 3 begins
                channel = self.channel("aggregate")
                assert channel.wait_until(lambda: slow.config.task_id in self._idle(channel), 30)

    aggregator = job.add(Patient, "aggregator", rounds=4, trainers=2, policy=policy)
    job.add(NumpyTrainer, "trainer", 2)
    slow = job.add(Gate, "trainer", 5).held(1)
    job.run()
    rounds = [number for number, _ in slow.seen]
    assert rounds[0] == 1
    assert 2 not in rounds  # it still owed an update
    assert rounds[-2:] == [3, 4]
    # Round 1 and 2 without it, then with it; its late update changed nothing.
    both = closed_form([2, 5], 1)[0]
    assert aggregator.after == pytest.approx([2, 4, 4 + both, 4 + 2 * both])


def test_too_few_updates_at_the_deadline_fail_the_job_in_words(job):
    policy = {"roundDeadline": 0.3, "minTrainers": 2}
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=2, trainers=2, policy=policy)
    job.add(NumpyTrainer, "trainer", 0, policy={"joinDeadline": 0.3})
    slow = job.add(Gate, "trainer", 1, policy={"joinDeadline": 0.3}).held(1)
    for role in job.roles:
        job.start(role)
    job.threads[0].join(30)
    slow.hold[1].set()
    error = job.errors[aggregator]
    assert isinstance(error, RoundFailed)
    assert (
        "Round 1 has 1 of at least 2 updates (policy.minTrainers) after 0.3 s (policy.roundDeadline)" in error.message
    )
    assert "no update in time" in error.message


def test_over_selection_takes_the_first_and_leaves_the_rest(job):
    policy = {"overSelection": 1.5}
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=1, trainers=3, policy=policy)
    for number in range(2):
        job.add(NumpyTrainer, "trainer", number)
    slow = job.add(Gate, "trainer", 9).held(1)
    for role in job.roles:
        job.start(role)
    job.threads[0].join(30)
    slow.hold[1].set()
    job.join()
    assert aggregator.after == pytest.approx(closed_form([0, 1], 1))


class Leaving(Gate):
    """Dies (leaves its channels) in ``train`` of round 1."""

    def train(self):
        if self._round == 1:
            self.reached[1].set()
            assert self.hold[1].wait(30)
            raise RuntimeError("killed")
        super().train()


def test_a_trainer_that_leaves_is_not_waited_for_and_its_successor_takes_part(job):
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=3, trainers=2)
    first = job.add(Gate, "trainer", 1).held(2)
    lost = job.add(Leaving, "trainer", 4).held(1)
    for role in job.roles:
        job.start(role)
    assert lost.reached[1].wait(30)
    lost.hold[1].set()
    assert first.reached[2].wait(30)  # round 1 ended without it
    again = job.add(NumpyTrainer, "trainer", 4)
    job.start(again)
    assert aggregator.channel("aggregate").wait_until(
        lambda: again.config.task_id in aggregator.channel("aggregate").all_ends(), 30
    )
    first.hold[2].set()
    for thread in job.threads:
        thread.join(30)
    assert [type(error) for error in job.errors.values()] == [RuntimeError]
    assert [number for number, _ in again.seen] == [3]
    assert aggregator.after == pytest.approx([1, 2, 2 + closed_form([1, 4], 1)[0]])


def test_a_round_that_needs_more_waits_for_a_successor_and_says_so(job):
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=1, trainers=2, policy={"minTrainers": 2})
    job.add(NumpyTrainer, "trainer", 1)
    lost = job.add(Leaving, "trainer", 4).held(1)
    for role in job.roles:
        job.start(role)
    assert lost.reached[1].wait(30)
    lost.hold[1].set()
    job.threads[2].join(30)
    job.start(job.add(NumpyTrainer, "trainer", 4))
    for thread in job.threads:
        thread.join(30)
    assert aggregator.after == pytest.approx(closed_form([1, 4], 1))


def test_trainers_wait_for_an_aggregator_and_say_so_and_give_up_at_the_deadline(job):
    trainer = job.add(NumpyTrainer, "trainer", 0, policy={"joinDeadline": 1.2})
    with pytest.raises(WorkerError, match=r"No worker of role aggregator was on channel param-channel .* within 1.2 s"):
        job.run()
    assert trainer.link_for_test.of("waiting")[0] == "Waiting for a worker of role aggregator on channel param-channel."


def test_the_first_round_waits_for_all_and_begins_without_those_that_never_come(job):
    policy = {"joinDeadline": 1.2}
    aggregator = job.add(NumpyAggregator, "aggregator", rounds=1, trainers=3, policy=policy)
    for number in range(2):
        job.add(NumpyTrainer, "trainer", number)
    job.run()
    link = aggregator.link_for_test
    assert link.of("waiting")[0] == "Waiting for 1 more of 3 workers of role trainer on channel param-channel."
    assert "Round 1 begins with 2 of 3 workers of role trainer" in link.of("warning")[0]


def test_a_job_without_enough_trainers_does_not_begin(job):
    aggregator = job.add(
        NumpyAggregator, "aggregator", rounds=1, trainers=1, policy={"joinDeadline": 0.2, "minTrainers": 2}
    )
    job.add(NumpyTrainer, "trainer", 0, policy={"joinDeadline": 0.2})
    for role in job.roles:
        job.start(role)
    job.threads[0].join(30)
    assert "Round 1 cannot begin: 1 of at least 2 workers" in str(job.errors[aggregator])


def test_a_trainer_goes_on_with_a_successor_of_its_aggregator(job):
    class Dying(NumpyAggregator):
        def evaluate(self):
            if self._round == 2:
                raise RuntimeError("killed")
            super().evaluate()

    job.add(Dying, "aggregator", rounds=3, trainers=1)
    trainer = job.add(NumpyTrainer, "trainer", 2)
    for role in job.roles:
        job.start(role)
    job.threads[0].join(30)
    successor = job.add(NumpyAggregator, "aggregator", rounds=3, trainers=1)
    job.start(successor)
    for thread in job.threads:
        thread.join(30)
    assert [number for number, _ in trainer.seen] == [1, 2, 1, 2, 3]
    assert successor.after == pytest.approx(closed_form([2], 3))


def test_metrics_must_be_numbers_and_those_that_are_not_finite_are_told(job):
    aggregator = job.add(NumpyAggregator, "aggregator")
    aggregator.link, aggregator.metrics = aggregator.link_for_test, {}
    aggregator.update_metrics({"a": torch.tensor(2.0), "b": np.float32("nan"), "c": True})
    assert aggregator.take_metrics() == {"a": 2.0, "c": 1.0}
    assert aggregator.link.of("warning") == ["The metric 'b' of aggregator is nan in round 1."]
    with pytest.raises(WorkerError, match="'d' is 'x', which is no number"):
        aggregator.update_metrics({"d": "x"})
