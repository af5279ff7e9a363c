"""What trainers that work without a server have in common: each is able to do what an aggregator would, and one does.

That one is the *keeper* of a round: it reports the round and its metrics. Who it is may change from round to round; the model is
kept at the end by one of those who are still there.
"""

from __future__ import annotations

from typing import Any

from flame.errors import SpecError, WorkerError
from flame.sdk.mode.roundkeeper import RoundKeeper
from flame.sdk.mode.training import Training
from flame.sdk.optimizers.base import Optimizer, Weights
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.weights import get_weights


def only_averages(optimizer: Optimizer, where: str) -> None:
    """Refuse an optimizer that does more at the server than take the weighted mean: there is no server.

    :raises flame.errors.SpecError: it does.
    """
    kind: Any = type(optimizer)
    if not issubclass(kind, FedAvg) or kind.close is not FedAvg.close or kind.weigh is not FedAvg.weigh:
        raise SpecError(
            f"{where} learning averages the members' models and has no place for a server's rule such as "
            f"{optimizer.sort!r}: choose fedavg or fedprox.",
            "optimizer",
        )


class Peer(Training, RoundKeeper):
    """Base of the trainers without a server.

    :ivar is_committer: whether this member keeps the current round.
    """

    is_committer: bool = False
    _common: Weights = {}  # the model of the last round: training changes self.model, and others may want this one
    _start: Weights = {}
    _private: int = 0

    def internal_init(self) -> None:
        """See :class:`Role`."""
        super().internal_init()
        if not self.privacy.affords():
            raise SpecError("The privacy's budget is less than one round costs: raise it, or the noise.", "privacy")

    def _open_registry(self) -> None:
        """Not before it is needed: see :meth:`_keep`."""

    def _keep(self) -> None:
        """The keeping of rounds, or of the model, falls to this member."""
        if "registry_client" not in self.__dict__:
            super()._open_registry()

    def _begin_round(self, weights: Weights) -> None:
        """Training begins from ``weights``, which stay as they are meanwhile; for algorithms that want to know."""
        self._start = weights
        self.regularizer.begin(weights, self._further())

    def _further(self) -> Weights:
        """The optimizer's further arrays that go along with the model."""
        return {}

    def _with_extra(self, extra: Weights) -> None:
        """The optimizer's further arrays that go along with an update.

        :raises flame.errors.WorkerError: nobody is there to take them.
        """
        if extra:
            raise WorkerError(
                f"The optimizer {self.config.optimizer.sort!r} sends further arrays to a server, and there is none."
            )

    def _trained_weights(self) -> Weights:
        """The model after training as it leaves this member: private if the job says so. Call it once a round."""
        weights: Weights = get_weights(self.model)
        self._with_extra(self.regularizer.finish(weights, *self._training()))
        if self.privacy.sort != "default":
            weights = self.privacy.apply(weights, self._start)
        self._start = {}
        return weights

    def _spend(self) -> None:
        """A round was made of private updates; who came later counts the rounds before as well."""
        while self._private < self._round:
            self._private += 1
            self.privacy.step()
        self.update_metrics(self.privacy.metrics())

    def save_metrics(self) -> None:
        """Report what :meth:`update_metrics` was told in this round; the keeper reports the round."""
        if self.is_committer:
            self._keep()
            RoundKeeper.save_metrics(self)
        else:
            super().save_metrics()

    def increment_round(self) -> None:
        """Go on to the next round; the work is done after the last one, or when a further one would exceed the privacy's budget."""
        super().increment_round()
        self._work_done = self._work_done or not self.privacy.affords()

    def save_model(self) -> None:
        """See :class:`RoundKeeper`."""
        self._keep()
        super().save_model()
