"""The trainer of synchronous federated learning: fetch the model, train it, send it back, until the work is done.

How it finds its aggregator, and what happens when that one is gone, is in :mod:`flame.sdk.mode.horizontal.syncfl.follower`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from flame.errors import WorkerError
from flame.sdk import datasamplers, optimizers, privacy
from flame.sdk.datasamplers.base import TrainerSampler
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD, Follower
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.optimizers.base import Regularizer, difference
from flame.sdk.privacy.base import Privacy
from flame.sdk.weights import as_arrays, get_weights, set_weights

__all__ = ["TAG_FETCH", "TAG_UPLOAD", "Trainer"]


class Trainer(Follower):
    """Trains the global model on its own data.

    The user writes ``load_data``, ``initialize`` (which sets ``self.model``), ``train`` (which sets ``self.dataset_size``)
    and ``evaluate``; ``self.regularizer.get_term(...)`` is the optimizer's term for the local loss.

    :ivar dataset_size: how many samples were trained on; the weight of this update in the mean. With 0 it counts nothing.
    :ivar datasampler: chooses the samples of a round: ``self.datasampler.sample(...)``.
    :ivar stat_utility: how useful this trainer's data are, for the selector oort; None: the datasampler may know.
    :ivar local_steps: how many steps of local SGD a round makes, for the algorithms that need to know (scaffold ...).
    """

    dataset_size: int
    local_steps: int = 1
    regularizer: Regularizer
    datasampler: TrainerSampler
    privacy: Privacy
    stat_utility: float | None = None
    _sends_differences: bool = False
    _start: Mapping[str, Any] | None = None

    def internal_init(self) -> None:
        """See :class:`Role`; also makes the optimizer's part for trainers."""
        super().internal_init()
        optimizer = optimizers.make(self.config.optimizer.sort, self.config.optimizer.kwargs)
        self.regularizer = optimizer.regularizer()
        self._sends_differences = optimizer.differences
        chosen = self.config.datasampler
        self.datasampler = datasamplers.make(chosen.sort, chosen.kwargs).trainer_data_sampler
        self.privacy = privacy.make(self.config.privacy.sort, self.config.privacy.kwargs)

    @abstractmethod
    def train(self) -> None:
        """For the user: train ``self.model`` and set ``self.dataset_size``."""

    def get(self, tag: str) -> None:
        """What the tasklet ``fetch`` does."""
        if tag == TAG_FETCH:
            self._fetch_weights(tag)

    def put(self, tag: str) -> None:
        """What the tasklet ``upload`` does."""
        if tag == TAG_UPLOAD:
            self._send_weights(tag)

    def _fetch_weights(self, tag: str) -> None:
        message = self._newest(self.channel(tag))
        if message.get(MessageType.EOT):
            self._work_done = True
            return
        self._round = message[MessageType.ROUND]
        weights = as_arrays(message[MessageType.WEIGHTS])
        set_weights(self.model, weights)
        self._start = weights if self._sends_differences or self.privacy.sort != "default" else None
        told = message.get(MessageType.DATASAMPLER_METADATA)
        if told:
            self.datasampler.handle_metadata_from_aggregator(told)
        self.regularizer.begin(weights, as_arrays(message.get(MessageType.EXTRA, {})))

    def _send_weights(self, tag: str) -> None:
        weights: Mapping[str, Any] = get_weights(self.model)
        extra = self.regularizer.finish(weights, *self._training())
        if self._start is not None:
            weights = self._disguised(weights, self._start, extra)
            self._start = None  # the received model's memory is wanted again
        message: dict[Any, Any] = {
            MessageType.WEIGHTS: weights,
            MessageType.DATASET_SIZE: self._count(),
            MessageType.MODEL_VERSION: self._round,
            MessageType.ROUND: self._round,
        }
        utility = getattr(self.datasampler, "stat_utility", None) if self.stat_utility is None else self.stat_utility
        further = {
            MessageType.EXTRA: extra,
            MessageType.STAT_UTILITY: utility,
            MessageType.DATASAMPLER_METADATA: self.datasampler.get_metadata(),
        }
        message |= {key: value for key, value in further.items() if value}
        self._answer(self.channel(tag), message)

    def _disguised(
        self, weights: Mapping[str, Any], start: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The update as it leaves: private if the job says so, and as a difference if the optimizer wants one."""
        if extra and self.privacy.sort != "default":
            raise WorkerError(
                f"The privacy {self.privacy.sort!r} does not cover the further arrays that the optimizer "
                f"{self.config.optimizer.sort!r} sends ({min(extra)} ...): choose another optimizer."
            )
        weights = self.privacy.apply(weights, start)
        return difference(weights, start) if self._sends_differences else weights

    def _training(self) -> tuple[int, float]:
        """Local steps and learning rate of this round, for algorithms that need them."""
        return self.local_steps, self.config.hyperparameters.learning_rate or 1.0

    def _count(self) -> float:
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

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, then until the work is done fetch, train, evaluate, upload."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            fetch = Tasklet("fetch", self.get, TAG_FETCH)
            train = Tasklet("train", self.train)
            evaluate = Tasklet("evaluate", self.evaluate)
            upload = Tasklet("upload", self.put, TAG_UPLOAD)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        internal_init >> load_data >> initialize >> loop(fetch >> train >> evaluate >> upload >> save_metrics)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_FETCH, TAG_UPLOAD]
