"""The interface of an optimizer: how updates become the next global model.

An update is folded in when it arrives and can be forgotten afterwards, so that an aggregator's memory does
not grow with the number of trainers. Robust rules (median, trimmed mean, krum) need all updates of a
round at once; they say so with :attr:`Optimizer.streaming` = False and keep copies.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt

#: A model: name -> array, C-contiguous, in a fixed order of names. Floating arrays are trained; integer and
#: boolean ones (BatchNorm's counters) are averaged in float64 and rounded back.
Weights = Mapping[str, npt.NDArray[Any]]


#: The entry of an update's metadata that says how many trainers it stands for; without it, it is a trainer's own.
TOLD_TRAINERS = "trainers"

#: The entry that says how many trainers an aggregator has seen so far and how many samples they have: ``(number, samples)``.
TOLD_POPULATION = "population"


class Update(msgspec.Struct, kw_only=True):
    """What one trainer (or a middle aggregator for its trainers) sends for a round.

    :ivar end: who sends it.
    :ivar weights: its model after local training (not the difference), read-only views of the received buffer.
    :ivar count: how many samples it stands for (> 0).
    :ivar version: the global model's round that it started from.
    :ivar extra: further named arrays of an algorithm (control variates ...).
    :ivar metadata: further small values (loss, number of local steps ...).
    """

    end: str
    weights: Weights
    count: float
    version: int
    extra: Weights = msgspec.field(default_factory=dict)
    metadata: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Regularizer:
    """The trainer's side of an algorithm; this one adds nothing (FedAvg).

    For PyTorch, ``get_term(curr_model_params=..., prev_model_params=...)`` gives a scalar to add to the loss.
    """

    def get_term(self, **kwargs: Any) -> Any:
        """The term to add to the local loss."""
        return 0.0

    def begin(self, weights: Weights, extra: Weights) -> None:
        """A round begins at the trainer: the global model and the algorithm's further arrays have arrived."""

    def finish(self, weights: Weights, steps: int, learning_rate: float) -> Weights:
        """Local training is done; gives the arrays to send beside the update (may be empty).

        :param weights: the trainer's model.
        :param steps: how many local steps were made.
        :param learning_rate: of the local SGD.
        """
        return {}

    def gradient(self, weights: Weights) -> Weights:
        """The term's gradient at ``weights`` by tensor, for trainers without autograd; empty: there is no term."""
        return {}

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What the trainer must keep from round to round, and over a restart."""
        return {}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take up the state of an earlier process."""


class Optimizer(abc.ABC):
    """One algorithm. Constructed with its keyword arguments from the job; registered by name in :mod:`flame.sdk.optimizers`.

    The calls of a round: :meth:`begin`, :meth:`fold` for each update, :meth:`finish`. An update may be folded
    only between them; ``deterministic`` rounds are folded in the order of ends' ids by the caller.
    """

    sort: ClassVar[str]
    #: False for rules that must keep all updates of a round.
    streaming: ClassVar[bool] = True
    #: True for rules whose updates may start from different models (asynchronous ones): a trainer then sends, as
    #: ``weights``, what :func:`difference` makes of its model and the one that it started from.
    differences: ClassVar[bool] = False

    @abc.abstractmethod
    def begin(self, weights: Weights, round: int) -> None:
        """A round begins from the global ``weights`` (kept by reference, not changed until :meth:`finish`)."""

    @abc.abstractmethod
    def fold(self, update: Update) -> None:
        """Take in one update. Its arrays are not kept beyond the call (unless not :attr:`streaming`: then copied).

        :raises flame.errors.WorkerError: names, shapes or dtypes differ from the model's, or values are not finite.
        """

    @abc.abstractmethod
    def finish(self) -> Weights:
        """The next global model, in the dtypes of the current one. With no update folded: the current one."""

    def extra(self) -> Weights:
        """Arrays to send to the trainers beside the model (control variates ...)."""
        return {}

    def regularizer(self) -> Regularizer:
        """The trainer's side of this algorithm."""
        return Regularizer()

    def middle(self) -> Optimizer:
        """What an aggregator below the top applies to its group's updates, so that the top can go on with this algorithm.

        The group's mean for rules that begin with a mean; a rule that does not (a robust one) is applied at each tier.
        What it finishes with goes up as an update, and :meth:`extra` gives the arrays to send along with it.
        """
        from flame.sdk.optimizers.groupmean import GroupMean

        return GroupMean() if self.streaming else self

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All that a restart needs, as arrays (for the checkpoint)."""
        return {}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take up the state of an earlier process."""


def difference(weights: Weights, start: Weights) -> dict[str, Any]:
    """What local training changed: floating tensors minus those it started from, others as they are.

    Counters are not subtracted, because unsigned integers and booleans know no negative difference.
    """
    return {name: array - start[name] if is_floating(array) else array for name, array in weights.items()}


def is_floating(tensor: Any) -> bool:
    """True for a tensor (numpy's or PyTorch's) of a floating type."""
    return "float" in str(tensor.dtype)


def check_update(weights: Weights, update: Weights, end: str) -> None:
    """Refuse an update that does not fit the model.

    :raises flame.errors.WorkerError: names, shapes or dtypes differ; the text names the first difference.
    """
    from flame.errors import WorkerError

    if weights.keys() != update.keys():
        names = sorted(weights.keys() ^ update.keys())
        raise WorkerError(f"The update of {end} does not fit the model: {names[0]!r} is in only one of them.")
    for name, array in weights.items():
        other = update[name]
        if array.shape != other.shape or np.dtype(array.dtype) != np.dtype(other.dtype):
            raise WorkerError(
                f"The update of {end} does not fit the model: {name!r} is {other.dtype}{list(other.shape)}, "
                f"the model's is {array.dtype}{list(array.shape)}."
            )


def trainers_of(update: Update) -> int:
    """How many trainers an update stands for.

    :raises flame.errors.WorkerError: it says so wrongly.
    """
    from flame.errors import WorkerError

    told = update.metadata.get(TOLD_TRAINERS, 1)
    if isinstance(told, bool) or not isinstance(told, int) or told < 0:
        raise WorkerError(f"The update of {update.end} stands for {told!r} trainers, which is no number of trainers.")
    return told


def population_of(update: Update) -> tuple[int, float]:
    """How many trainers an update's sender has seen so far, and how many samples they have.

    :raises flame.errors.WorkerError: it says so wrongly.
    """
    from flame.errors import WorkerError

    told = update.metadata.get(TOLD_POPULATION)
    if told is None:
        return 1, update.count
    match told:
        case [int(members), int() | float() as samples] if members >= 0 and 0 <= samples < float("inf"):
            return max(members, 1), float(samples)
    raise WorkerError(
        f"The update of {update.end} says that it has seen {told!r}, which is no number of trainers and samples."
    )
