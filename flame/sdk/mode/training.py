"""What every role that trains has in common, whatever the topology: the user's methods, and the trainer's side of the algorithms.

So moving a trainer to another topology is a change of its base class, and of nothing else.
"""

from __future__ import annotations

from abc import abstractmethod

from flame.errors import WorkerError
from flame.sdk import datasamplers, optimizers, privacy
from flame.sdk.checkpoints import State
from flame.sdk.datasamplers.base import TrainerSampler
from flame.sdk.mode.role import Role
from flame.sdk.optimizers.base import Optimizer, Regularizer
from flame.sdk.privacy.base import Privacy


class Training(Role):
    """Mixed into the roles that train.

    The user writes ``load_data``, ``initialize`` (which sets ``self.model``), ``train`` (which sets ``self.dataset_size``)
    and ``evaluate``; ``self.regularizer.get_term(...)`` is the optimizer's term for the local loss.

    :ivar dataset_size: how many samples were trained on; the weight of this update in the mean. With 0 it counts nothing.
    :ivar datasampler: chooses the samples of a round: ``self.datasampler.sample(...)``.
    :ivar local_steps: how many steps of local SGD a round makes, for the algorithms that need to know (scaffold ...).
    """

    dataset_size: int
    local_steps: int = 1
    regularizer: Regularizer
    datasampler: TrainerSampler
    privacy: Privacy

    def internal_init(self) -> None:
        """See :class:`Role`; also makes the trainer's side of the algorithms."""
        super().internal_init()
        optimizer = optimizers.make(self.config.optimizer.sort, self.config.optimizer.kwargs)
        self.regularizer = optimizer.regularizer()
        self._use(optimizer)
        chosen = self.config.datasampler
        self.datasampler = datasamplers.make(chosen.sort, chosen.kwargs).trainer_data_sampler
        self.privacy = privacy.make(self.config.privacy.sort, self.config.privacy.kwargs)

    def _state(self) -> State:
        """See :class:`Role`: also what the optimizer's trainer side and the privacy remember.

        What the datasampler knows of single samples is nobody else's business: it is found out anew.
        """
        state = super()._state()
        state.arrays.update({f"regularizer/{name}": array for name, array in self.regularizer.state().items()})
        spent = self.privacy.state()
        if spent:
            state.values["privacy"] = spent
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self.regularizer.load_state(state.part("regularizer"))
        if "privacy" in state.values:
            self.privacy.load_state(state.values["privacy"])

    def _use(self, optimizer: Optimizer) -> None:
        """For topologies that want to know more of the job's optimizer."""

    @abstractmethod
    def train(self) -> None:
        """For the user: train ``self.model`` and set ``self.dataset_size``."""

    def _training(self) -> tuple[int, float]:
        """Local steps and learning rate of this round, for algorithms that need them."""
        return self.local_steps, self.config.hyperparameters.learning_rate or 1.0

    def _count(self) -> float:
        """This update's weight in the mean.

        :raises flame.errors.WorkerError: the user's code has not said it.
        """
        count = getattr(self, "dataset_size", None)
        if count is None:
            raise WorkerError(
                f"{type(self).__name__} has no dataset_size: set self.dataset_size to the number of samples "
                "that it trains on, which is its weight in the mean."
            )
        return float(count)

    def save_metrics(self) -> None:
        """Report what :meth:`update_metrics` was told in this round."""
        metrics = self.take_metrics()
        if metrics:
            self.link.metrics(self._round, metrics)
