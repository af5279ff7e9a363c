"""FedBalancer: each round the samples that a trainer can still learn from, as many as the deadline lets it train.

Trainer, with the losses it knows of its samples, threshold lt and deadline ddl:

    if all samples can be trained by ddl: all of them
    else: max(trainable by ddl, |OT|) samples, a share p of them from OT = {loss >= lt}, the others from UT = {loss < lt}

Aggregator, with ll = min of the trainers' low losses, lh = mean of their high ones (80th percentile), both blurred:

    lt  = ll + (lh - ll) ltr
    ddl = dl + (dh - dl) ddlr       dl, dh: the deadlines at which most trainers a second are done with 1, all epochs
    every w rounds: if the last w brought less (mean selected loss / ddl) than the w before,
    ltr += lss and ddlr -= dss, else the reverse

Shin, Li, Liu, Lee: FedBalancer: Data and Pace Control for Efficient Federated Learning on Heterogeneous Clients.
MobiSys 2022, sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk.datasamplers.base import AggregatorSampler, ChannelLike, DataSampler, TrainerSampler
from flame.sdk.datasamplers.indexed import Indexed, Subset
from flame.sdk.plugins import integer, number
from flame.sdk.selectors.base import PROP_ROUND_DURATION, seconds

#: So many of an end's last rounds tell how long it takes.
HISTORY = 5
#: What a trainer tells.
TOLD = ("loss_low", "loss_high", "selected_loss_sum", "selected_len", "epoch_train_duration")
#: Losses are first measured in batches of this size.
BATCH = 256


class FedBalancer(DataSampler):
    """Parameters as in Flame's library, which recommends the defaults.

    :param w: rounds in a window.
    :param lss: step of the loss threshold's ratio.
    :param dss: step of the deadline's ratio.
    :param p: share of samples from above the threshold, in [0, 1].
    :param noise_factor: standard deviation of the noise on the losses that leave a trainer.
    :param epochs: local epochs a round.
    :param batchSize: samples in a local batch.
    :param seed: makes the choices repeatable.
    """

    sort = "fedbalancer"
    timed = True

    def __init__(
        self,
        *,
        w: int = 20,
        lss: float = 0.05,
        dss: float = 0.05,
        p: float = 1.0,
        noise_factor: float = 0.0,
        epochs: int = 1,
        batchSize: int = 32,
        seed: int | None = None,
    ) -> None:
        epochs = integer("epochs", epochs, low=1)
        self.trainer_data_sampler = FedBalancerTrainer(
            min(number("p", p, low=0), 1.0),
            number("noise_factor", noise_factor, low=0),
            epochs,
            integer("batchSize", batchSize, low=1),
            seed,
        )
        self.aggregator_data_sampler = FedBalancerAggregator(
            integer("w", w, low=1), number("lss", lss, low=0), number("dss", dss, low=0), epochs
        )


class FedBalancerTrainer(TrainerSampler):
    """The trainer's side. Losses are of single samples; durations in seconds."""

    def __init__(self, p: float, noise_factor: float, epochs: int, batch_size: int, seed: int | None) -> None:
        self.p = p
        self.noise_factor = noise_factor
        self.epochs = epochs
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)
        self.losses: npt.NDArray[np.float64] | None = None
        self.threshold = 0.0
        self.deadline: float | None = None
        self._selected: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._durations: list[float] = []
        self._utility = 0.0
        self._useful = 0

    def load_dataset(self, dataset: Any) -> Any:
        """See :meth:`TrainerSampler.load_dataset`: samples end with their index, which :meth:`fb_loss` wants back."""
        return Indexed(dataset)

    def sample(self, dataset: Any, **kwargs: Any) -> Any:
        """See :meth:`TrainerSampler.sample`.

        :param dataset: what :meth:`load_dataset` has given.
        :param losses: of all samples under the current model; wanted the first time. In its place, for PyTorch:
        :param loss_fn: a function of (output, target, reduction) such as ``torch.nn.functional.nll_loss``,
        :param model: the model,
        :param device: the device it is on.
        :raises flame.errors.WorkerError: the losses are needed and neither is given.
        """
        if self.losses is None or len(self.losses) != len(dataset):
            given = kwargs.get("losses")
            measured = given if given is not None else self._measure(dataset, **kwargs)
            self.losses = np.array(measured, np.float64)
            fits: float = 0
        else:
            fits = self._trainable()
        self._selected = self.select(fits)
        return Subset(dataset, self._selected.tolist())

    def select(self, fits: float) -> npt.NDArray[np.int64]:
        """The indices of this round's samples.

        :param fits: how many samples can be trained by the deadline.
        """
        assert self.losses is not None
        everything = np.arange(len(self.losses))
        if fits >= len(everything):
            return everything
        above = everything[self.losses >= self.threshold]
        below = everything[self.losses < self.threshold]
        wanted = max(int(fits), len(above), 1)
        from_above = min(wanted - int(wanted * (1 - self.p)), len(above))
        from_below = min(wanted - from_above, len(below))
        return np.concatenate(
            [self.rng.choice(above, from_above, replace=False), self.rng.choice(below, from_below, replace=False)]
        )

    def record(self, indices: Any, losses: Any, epoch: int) -> None:
        """Note the losses of a batch of samples, as they are met in training.

        The first epoch's also make the trainer's statistical utility.

        :param indices: of the samples.
        :param losses: one a sample.
        :param epoch: of this round, from 1.
        """
        if self.losses is None:
            raise WorkerError("FedBalancer's sample() must be called before training begins.")
        values = np.asarray(losses, np.float64)
        self.losses[np.asarray(indices)] = values
        if epoch == 1:
            useful = values[values >= self.threshold]
            self._utility += float((useful**2).sum())
            self._useful += len(useful)

    def fb_loss(self, loss_fn: Any, output: Any, target: Any, epoch: int, indices: Any) -> Any:
        """The mean loss of a batch, as a PyTorch scalar; in the first epoch the single losses are noted.

        :param loss_fn: a function of (output, target, reduction).
        """
        if epoch != 1:
            return loss_fn(output, target)
        losses = loss_fn(output, target, reduction="none")
        self.record(indices, losses.detach().cpu().numpy(), epoch)
        return losses.mean()

    def reset_stat_utility(self) -> None:
        """Begin to count the statistical utility anew."""
        self._utility, self._useful = 0.0, 0

    def normalize_stat_utility(self, epoch: int) -> None:
        """The first epoch is over: |OT| sqrt(mean squared loss) is the utility."""
        if epoch == 1 and self._useful:
            self._utility = self._useful * math.sqrt(self._utility / self._useful)

    @property
    def stat_utility(self) -> float:
        """The statistical utility, for Oort."""
        return self._utility

    def update_train_duration_per_batch_list(self, time: float) -> None:
        """Note how long a batch took, in seconds."""
        self._durations.append(time)
        del self._durations[:-1000]

    def get_metadata(self) -> dict[str, Any]:
        """See :meth:`TrainerSampler.get_metadata`."""
        if self.losses is None:
            return {}
        chosen = self.losses[self._selected]
        batch = float(np.mean(self._durations)) if self._durations else 0.0
        return {
            "loss_low": float(self.losses.min() + self.rng.normal(0, self.noise_factor)),
            "loss_high": float(np.percentile(self.losses, 80) + self.rng.normal(0, self.noise_factor)),
            "selected_loss_sum": float(chosen.sum()),
            "selected_len": len(chosen),
            "epoch_train_duration": math.ceil(len(chosen) / self.batch_size) * batch,
        }

    def handle_metadata_from_aggregator(self, metadata: Mapping[str, Any]) -> None:
        """See :meth:`TrainerSampler.handle_metadata_from_aggregator`."""
        self.threshold = float(metadata["loss_threshold"])
        self.deadline = None if metadata["deadline"] is None else float(metadata["deadline"])

    def state(self) -> dict[str, Any]:
        """See :meth:`TrainerSampler.state`."""
        return {
            "losses": None if self.losses is None else self.losses.tolist(),
            "durations": self._durations,
            "random": self.rng.bit_generator.state,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`TrainerSampler.load_state`."""
        self.losses = None if state["losses"] is None else np.array(state["losses"])
        self._durations = list(state["durations"])
        self.rng.bit_generator.state = state["random"]

    def _trainable(self) -> float:
        """How many samples can be trained by the deadline in all epochs."""
        if self.deadline is None or not self._durations:
            return math.inf
        batches = self.deadline / (self.epochs * max(float(np.mean(self._durations)), 1e-9))
        return math.floor(batches) * self.batch_size

    def _measure(self, dataset: Any, **kwargs: Any) -> list[float]:
        if kwargs.get("model") is None or kwargs.get("loss_fn") is None:
            raise WorkerError(
                "FedBalancer needs the samples' losses first: give sample(dataset, loss_fn=, model=, device=)."
            )
        import torch

        losses: list[float] = []
        device = kwargs.get("device", "cpu")
        with torch.no_grad():
            for data, target, *_ in torch.utils.data.DataLoader(dataset, batch_size=BATCH):
                output = kwargs["model"](data.to(device))
                losses += kwargs["loss_fn"](output, target.to(device), reduction="none").cpu().tolist()
        return losses


class FedBalancerAggregator(AggregatorSampler):
    """The aggregator's side."""

    def __init__(self, w: int, lss: float, dss: float, epochs: int) -> None:
        self.w = w
        self.lss = lss
        self.dss = dss
        self.epochs = epochs
        self.threshold = 0.0
        self.threshold_ratio = 0.0
        self.deadline: float | None = None
        self.deadline_ratio = 1.0
        self.benefits: list[float] = []
        self.told: list[dict[str, float]] = []
        #: By end, of its last rounds: how long they took in all, and an epoch of them.
        self.durations: dict[str, list[tuple[float, float]]] = {}

    def get_metadata(self, round: int, selected_ends: Sequence[str]) -> dict[str, Any]:
        """See :meth:`AggregatorSampler.get_metadata`: steers by what the round before has brought."""
        if self.told:
            self._steer()
            low = min(each["loss_low"] for each in self.told)
            high = float(np.mean([each["loss_high"] for each in self.told]))
            if self.threshold_ratio or self.threshold:  # in the beginning there is no threshold at all
                self.threshold = low + (high - low) * self.threshold_ratio
            self.told = []
        early, late = self.peak(selected_ends, 1), self.peak(selected_ends, self.epochs)
        if early is not None and late is not None:
            self.deadline = early + (late - early) * self.deadline_ratio
        return {"loss_threshold": self.threshold, "deadline": self.deadline}

    def handle_metadata_from_trainer(self, metadata: Mapping[str, Any], end: str, channel: ChannelLike) -> None:
        """See :meth:`AggregatorSampler.handle_metadata_from_trainer`."""
        if not metadata:
            return
        try:
            told = {key: float(metadata[key]) for key in TOLD}
        except (KeyError, TypeError, ValueError) as error:
            raise WorkerError(f"What {end} tells of its samples is incomplete: {error}.") from error
        self.told.append(told)
        whole = seconds(channel.get_end_property(end, PROP_ROUND_DURATION))
        if whole is not None:
            history = self.durations.setdefault(end, [])
            history.append((whole, told["epoch_train_duration"]))
            del history[:-HISTORY]

    def peak(self, ends: Sequence[str], epochs: int) -> float | None:
        """The deadline by which most ends a second are done, if they train so many epochs; None where nothing is known.

        It is one of the times at which an end is done: between them only the seconds grow.
        """
        times = []
        for end in ends:
            history = self.durations.get(end)
            if history:
                epoch = float(np.mean([each for _, each in history]))
                travel = float(np.mean([max(whole - self.epochs * each, 0.0) for whole, each in history]))
                times.append(max(travel + epoch * epochs, 1e-6))
        times.sort()
        return max(times, key=lambda time: sum(each <= time for each in times) / time) if times else None

    def state(self) -> dict[str, Any]:
        """See :meth:`AggregatorSampler.state`."""
        return {
            "threshold": [self.threshold, self.threshold_ratio],
            "deadline": [self.deadline, self.deadline_ratio],
            "benefits": self.benefits,
            "told": self.told,
            "durations": {end: [list(each) for each in history] for end, history in self.durations.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`AggregatorSampler.load_state`."""
        self.threshold, self.threshold_ratio = state["threshold"]
        self.deadline, self.deadline_ratio = state["deadline"]
        self.benefits, self.told = list(state["benefits"]), list(state["told"])
        self.durations = {end: [(each[0], each[1]) for each in history] for end, history in state["durations"].items()}

    def _steer(self) -> None:
        """Once two windows are full, compare them and turn both ratios."""
        count = sum(each["selected_len"] for each in self.told)
        if self.deadline is None or not count:
            return
        self.benefits.append(sum(each["selected_loss_sum"] for each in self.told) / count / self.deadline)
        if len(self.benefits) < 2 * self.w or len(self.benefits) % self.w:
            return
        before, now = np.mean(self.benefits[-2 * self.w : -self.w]), np.mean(self.benefits[-self.w :])
        turn = 1 if before > now else -1
        self.threshold_ratio = min(max(self.threshold_ratio + turn * self.lss, 0.0), 1.0)
        self.deadline_ratio = min(max(self.deadline_ratio - turn * self.dss, 0.0), 1.0)
        del self.benefits[: -self.w]
