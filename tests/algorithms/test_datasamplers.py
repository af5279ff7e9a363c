"""Which samples a round uses, and what trainers and aggregator tell each other about them."""

import json

import numpy as np
import pytest

from flame.errors import WorkerError
from flame.sdk import datasamplers

DATA = [(float(i), i % 3) for i in range(100)]


class Durations:
    """A channel on which every end took as long as it says."""

    def __init__(self, **seconds):
        self.seconds = seconds

    def get_end_property(self, end, key):
        return self.seconds[end] if key == "round_duration" else None


def balancer(**kwargs):
    both = datasamplers.make("fedbalancer", {"seed": 1, "epochs": 2, "batchSize": 10, **kwargs})
    return both.trainer_data_sampler, both.aggregator_data_sampler


def told(threshold, deadline):
    return {"loss_threshold": threshold, "deadline": deadline}


def test_by_default_all_samples_are_used():
    sampler = datasamplers.make("default").trainer_data_sampler
    assert sampler.sample(sampler.load_dataset(DATA)) is DATA
    assert sampler.get_metadata() == {}


def test_samples_tell_their_index():
    trainer, _ = balancer()
    dataset = trainer.load_dataset(DATA)
    assert len(dataset) == 100
    assert dataset[7] == (7.0, 1, 7)


def test_the_first_round_and_a_fast_trainer_use_everything():
    trainer, _ = balancer()
    dataset = trainer.load_dataset(DATA)
    assert len(trainer.sample(dataset, losses=np.arange(100.0))) == 100
    trainer.update_train_duration_per_batch_list(0.1)
    trainer.handle_metadata_from_aggregator(told(50.0, 100.0))
    assert [item[-1] for item in trainer.sample(dataset)] == list(range(100))


def test_a_slow_trainer_uses_the_samples_that_it_can_learn_from():
    trainer, _ = balancer(p=0.75)
    dataset = trainer.load_dataset(DATA)
    trainer.sample(dataset, losses=np.arange(100.0))
    trainer.update_train_duration_per_batch_list(1.0)
    trainer.handle_metadata_from_aggregator(told(80.0, 8.0))  # 8 batches, in two epochs: 40 samples
    chosen = [item[-1] for item in trainer.sample(dataset)]
    assert len(chosen) == len(set(chosen)) == 40  # 30 of them should be above the threshold, where there are only 20
    assert sum(index >= 80 for index in chosen) == 20
    trainer.handle_metadata_from_aggregator(told(20.0, 2.0))  # 10 samples fit, 80 are above the threshold
    chosen = [item[-1] for item in trainer.sample(dataset)]
    assert (len(chosen), sum(index >= 20 for index in chosen)) == (80, 60)


def test_losses_are_noted_in_training_and_make_the_utility_of_the_first_epoch():
    trainer, _ = balancer()
    dataset = trainer.load_dataset(DATA)
    trainer.sample(dataset, losses=np.ones(100))
    trainer.handle_metadata_from_aggregator(told(2.0, None))
    trainer.reset_stat_utility()
    trainer.record([3, 4, 5], [1.0, 3.0, 4.0], 1)
    trainer.record([6], [9.0], 2)
    trainer.normalize_stat_utility(1)
    assert trainer.losses[[3, 4, 5, 6]].tolist() == [1.0, 3.0, 4.0, 9.0]
    assert trainer.stat_utility == pytest.approx(2 * np.sqrt((9 + 16) / 2))


def test_a_pytorch_trainer_measures_its_losses_itself():
    torch = pytest.importorskip("torch")
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LogSoftmax(dim=1))
    trainer, _ = balancer()
    dataset = trainer.load_dataset(torch.utils.data.TensorDataset(x, y))
    loss_fn = torch.nn.functional.nll_loss
    with pytest.raises(WorkerError, match="needs the samples' losses"):
        trainer.sample(dataset)
    part = trainer.sample(dataset, loss_fn=loss_fn, model=model, device="cpu")
    single = loss_fn(model(x), y, reduction="none").detach().numpy()
    np.testing.assert_allclose(trainer.losses, single, atol=1e-6)
    for data, target, indices in torch.utils.data.DataLoader(part, batch_size=16):
        loss = trainer.fb_loss(loss_fn, model(data), target, 1, indices)
        assert loss.requires_grad
        assert loss.item() == pytest.approx(single[indices].mean(), rel=1e-5)
    assert trainer.fb_loss(loss_fn, model(x), y, 2, None).item() == pytest.approx(single.mean(), rel=1e-5)


def test_a_trainer_tells_its_losses_only_in_summary_and_blurred():
    trainer, _ = balancer(noise_factor=0.5)
    trainer.sample(trainer.load_dataset(DATA), losses=np.arange(100.0))
    trainer.update_train_duration_per_batch_list(0.2)
    first, second = trainer.get_metadata(), trainer.get_metadata()
    assert first["loss_low"] != second["loss_low"]
    assert first["loss_low"] == pytest.approx(0, abs=3)
    assert first["loss_high"] == pytest.approx(79.2, abs=3)
    assert (first["selected_len"], first["selected_loss_sum"]) == (100, 4950)
    assert first["epoch_train_duration"] == pytest.approx(10 * 0.2)


def report(low, high, epoch, total=100.0, length=10):
    return {
        "loss_low": low,
        "loss_high": high,
        "selected_loss_sum": total,
        "selected_len": length,
        "epoch_train_duration": epoch,
    }


def test_the_deadline_lets_most_trainers_a_second_finish():
    _, aggregator = balancer(epochs=4)
    assert aggregator.get_metadata(1, ["a", "b", "c"]) == told(0.0, None)
    channel = Durations(a=9.0, b=10.0, c=100.0)
    for end, epoch in (("a", 2.0), ("b", 2.0), ("c", 20.0)):
        aggregator.handle_metadata_from_trainer(report(0, 1, epoch), end, channel)
    # With one epoch they are done after 3, 4 and 40 s: 2 / 4 is the best rate. With all four, after 9, 10, 100 s.
    assert aggregator.peak(["a", "b", "c"], 1) == pytest.approx(4.0)
    assert aggregator.get_metadata(2, ["a", "b", "c"])["deadline"] == pytest.approx(10.0)
    aggregator.deadline_ratio = 0.5
    assert aggregator.get_metadata(3, ["a", "b", "c"])["deadline"] == pytest.approx(7.0)
    assert aggregator.get_metadata(4, ["a", "stranger"])["deadline"] == pytest.approx(6.0)


def test_a_window_that_brings_less_raises_the_threshold_and_shortens_the_rounds():
    _, aggregator = balancer(w=2, lss=0.25, dss=0.1)
    aggregator.deadline = 10.0
    for total in (100.0, 100.0, 50.0, 50.0):
        aggregator.told = [report(1.0, 5.0, 1.0, total), report(2.0, 7.0, 1.0, total)]
        said = aggregator.get_metadata(2, [])
    assert (aggregator.threshold_ratio, aggregator.deadline_ratio) == (0.25, 0.9)
    assert said["loss_threshold"] == pytest.approx(1 + (6 - 1) * 0.25)
    for total in (90.0, 90.0):
        aggregator.told = [report(1.0, 5.0, 1.0, total)]
        aggregator.get_metadata(2, [])
    assert (aggregator.threshold_ratio, aggregator.deadline_ratio) == (0.0, 1.0)


def test_both_sides_come_back_after_a_restart():
    trainer, aggregator = balancer()
    dataset = trainer.load_dataset(DATA)
    trainer.sample(dataset, losses=np.arange(100.0))
    trainer.update_train_duration_per_batch_list(1.0)
    aggregator.handle_metadata_from_trainer(report(0, 1, 2.0), "a", Durations(a=9.0))
    aggregator.get_metadata(2, ["a"])
    again, other = balancer(seed=2)
    again.load_state(json.loads(json.dumps(trainer.state())))
    other.load_state(json.loads(json.dumps(aggregator.state())))
    for each in (trainer, again):
        each.handle_metadata_from_aggregator(told(80.0, 4.0))
    assert [x[-1] for x in trainer.sample(dataset)] == [x[-1] for x in again.sample(dataset)]
    assert aggregator.get_metadata(3, ["a"]) == other.get_metadata(3, ["a"])
