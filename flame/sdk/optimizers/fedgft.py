"""FedGFT: federated learning with global group fairness.

The bias of a model towards group 0 against group 1 is F = A / B - C / D, with, over the samples of all trainers and
p the probability that the model gives to class 1,

    kind   A                    B               C                    D
    SP     sum p [g=0]          sum [g=0]       sum p [g=1]          sum [g=1]              statistical parity
    EOP    sum p [g=0, y=1]     sum [g=0, y=1]  sum p [g=1, y=1]     sum [g=1, y=1]         equal opportunity
    CAL    sum p [g=0, y=1]     sum p [g=0]     sum p [g=1, y=1]     sum p [g=1]            well-calibration

Trainers minimise their loss plus gamma J(F), with J(F) = F^2 / 2 (``l2``) or |F| (``id``). Its gradient needs the
sums of all trainers only in the constants: J'(F) ((dA - A/B dB) / B - (dC - C/D dD) / D), so four numbers from each
trainer are enough. They travel beside the updates: a round uses those that were measured in the round before, and
the first one trains without the term.

Wang, Payani, Lee, Kompella: Mitigating Group Bias in Federated Learning: Beyond Local Fairness. 2023, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flame.errors import SpecError, WorkerError
from flame.sdk.optimizers.base import Regularizer, Update, Weights
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.optimizers.layout import Array, Run
from flame.sdk.plugins import number

#: The name under which the four sums, each divided by the number of samples, travel.
SUMS = "fedgft.sums"
_KINDS = ("SP", "EOP", "CAL")


class FedGFT(FedAvg):
    """Federated averaging of trainers that are held to a small global bias.

    :param fair: which bias: ``SP``, ``EOP`` or ``CAL``.
    :param gamma: strength of the penalty, at least 0; ``auto``: 2 |F|.
    :param reg: ``l2`` or ``id``.
    """

    sort = "fedgft"

    def __init__(self, fair: str, gamma: float | str, reg: str = "l2") -> None:
        super().__init__()
        if fair not in _KINDS:
            raise SpecError(f"fair must be one of {', '.join(_KINDS)}, not {fair!r}.", "kwargs")
        if reg not in {"l2", "id"}:
            raise SpecError(f"reg must be 'l2' or 'id', not {reg!r}.", "kwargs")
        self.fair = fair
        self.gamma = gamma if gamma == "auto" else number("gamma", gamma, low=0)
        self.reg = reg
        self.sums: Array | None = None
        self._next = np.zeros(4)
        self._samples = 0.0

    @property
    def bias(self) -> float:
        """F, of the model with which the last round began; 0 before it is known."""
        return 0.0 if self.sums is None else bias(self.sums)

    def begin(self, weights: Weights, round: int) -> None:
        """See :meth:`Optimizer.begin`."""
        super().begin(weights, round)
        self._next, self._samples = np.zeros(4), 0.0

    def accept(self, update: Update, runs: list[Run]) -> None:
        """See :meth:`FedAvg.accept`."""
        sums = update.extra.get(SUMS)
        if sums is None or sums.shape != (4,) or not np.isfinite(sums).all():
            raise WorkerError(
                f"The update of {update.end} brings no sums for its bias; FedGFT's trainers must use its regularizer."
            )
        self._next += update.count * sums
        self._samples += update.count

    def finish(self) -> Weights:
        """See :meth:`Optimizer.finish`."""
        if self._samples:
            self.sums = self._next / self._samples
        return super().finish()

    def extra(self) -> Weights:
        """See :meth:`Optimizer.extra`."""
        return {} if self.sums is None else {SUMS: self.sums}

    def regularizer(self) -> Regularizer:
        """See :meth:`Optimizer.regularizer`."""
        return FedGFTTerm(self.fair, self.gamma, self.reg)

    def state(self) -> dict[str, Array]:
        """See :meth:`Optimizer.state`."""
        return {} if self.sums is None else {SUMS: self.sums}

    def load_state(self, state: Mapping[str, Array]) -> None:
        """See :meth:`Optimizer.load_state`."""
        self.sums = None if SUMS not in state else np.array(state[SUMS])


class FedGFTTerm(Regularizer):
    """The trainer's side. Parameters are those of :class:`FedGFT`."""

    def __init__(self, fair: str, gamma: float | str, reg: str) -> None:
        self.fair = fair
        self.gamma = gamma
        self.reg = reg
        self.everybody: Array | None = None
        self._sums = np.zeros(4)
        self._samples = 0
        self._measured = False

    def begin(self, weights: Weights, extra: Weights) -> None:
        """See :meth:`Regularizer.begin`."""
        self.everybody = (
            np.array(extra[SUMS]) if SUMS in extra else None
        )  # a copy: a view would hold all of the message
        self._sums, self._samples, self._measured = np.zeros(4), 0, False

    def update_local_bias_params(self, model: Any, train_loader: Iterable[Any]) -> None:
        """Measure the four sums of the global model on the trainer's data. To be called before training.

        Without it they are those of the batches that :meth:`get_term` sees while the model trains, an estimate.

        :param model: a PyTorch module that gives log-probabilities.
        :param train_loader: batches of (data, target, group).
        """
        import torch

        self._sums, self._samples, self._measured = np.zeros(4), 0, True
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            for data, target, group in train_loader:
                self._note(model(data.to(device)), target.to(device), group.to(device))
        model.train(was_training)

    def get_term(self, **kwargs: Any) -> Any:
        """The term for one batch, as a PyTorch scalar.

        :param output: the model's log-probabilities, batch x 2.
        :param target: the labels, 0 or 1.
        :param group: the groups, 0 or 1.
        """
        output, target, group = kwargs["output"], kwargs["target"], kwargs["group"]
        if not self._measured:
            self._note(output.detach(), target, group)
        if self.everybody is None:
            return 0.0
        a, b, c, d = self._batch_sums(output, target, group)
        first, second, third, fourth = (float(each) for each in self.everybody)
        second, fourth = max(second, 1e-8), max(fourth, 1e-8)
        change = (a - first / second * b) / second - (c - third / fourth * d) / fourth
        value = bias(self.everybody)
        gamma = 2 * abs(value) if self.gamma == "auto" else float(self.gamma)
        slope = value if self.reg == "l2" else float(np.sign(value))
        return gamma * slope * change / len(target)

    def finish(self, weights: Weights, steps: int, learning_rate: float) -> Weights:
        """See :meth:`Regularizer.finish`.

        :raises flame.errors.WorkerError: the trainer used neither :meth:`get_term` nor :meth:`update_local_bias_params`.
        """
        if not self._samples:
            raise WorkerError(
                "FedGFT's trainers must add regularizer.get_term(output=..., target=..., group=...) to their loss."
            )
        return {SUMS: self._sums / self._samples}

    def _note(self, output: Any, target: Any, group: Any) -> None:
        self._sums += [float(each) for each in self._batch_sums(output, target, group)]
        self._samples += len(target)

    def _batch_sums(self, output: Any, target: Any, group: Any) -> tuple[Any, Any, Any, Any]:
        chance = output[:, 1].exp()
        first, second = group == 0, group == 1
        if self.fair == "SP":
            return (chance * first).sum(), first.sum(), (chance * second).sum(), second.sum()
        first_hit, second_hit = first & (target == 1), second & (target == 1)
        if self.fair == "EOP":
            return (chance * first_hit).sum(), first_hit.sum(), (chance * second_hit).sum(), second_hit.sum()
        return (chance * first_hit).sum(), (chance * first).sum(), (chance * second_hit).sum(), (chance * second).sum()


def bias(sums: Array) -> float:
    """F = A / B - C / D."""
    a, b, c, d = (float(each) for each in sums)
    return a / max(b, 1e-8) - c / max(d, 1e-8)
