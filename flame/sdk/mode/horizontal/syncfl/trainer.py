"""The trainer of synchronous federated learning: fetch the model, train it, send it back, until the work is done.

How it finds its aggregator, and what happens when that one is gone, is in :mod:`flame.sdk.mode.horizontal.syncfl.follower`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.errors import WorkerError
from flame.sdk.codec import Message
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD, Follower
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.mode.training import Training
from flame.sdk.optimizers.base import Optimizer, difference
from flame.sdk.weights import as_arrays, get_weights, set_weights

__all__ = ["TAG_FETCH", "TAG_UPLOAD", "Trainer"]


class Trainer(Training, Follower):
    """Trains the global model on its own data.

    See :class:`Training` for what the user writes.

    :ivar stat_utility: how useful this trainer's data are, for the selector oort; None: the datasampler may know.
    """

    stat_utility: float | None = None
    _sends_differences: bool = False
    _start: Mapping[str, Any] | None = None

    def _use(self, optimizer: Optimizer) -> None:
        """See :class:`Training`."""
        self._sends_differences = optimizer.differences

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
        self._accept(message)

    def _accept(self, message: Message) -> None:
        """Take up a round."""
        self._round = message[MessageType.ROUND]
        self._recall(self._round)
        weights = as_arrays(message[MessageType.WEIGHTS])
        set_weights(self.model, weights)
        self._start = weights if self._sends_differences or self.privacy.sort != "default" else None
        told = message.get(MessageType.DATASAMPLER_METADATA)
        if told:
            self.datasampler.handle_metadata_from_aggregator(told)
        self.regularizer.begin(weights, as_arrays(message.get(MessageType.EXTRA, {})))

    def _send_weights(self, tag: str) -> None:
        weights, extra = self._trained_weights()
        self._hand_in(self.channel(tag), self._message(weights, self._count(), extra))

    def _trained_weights(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The update as it leaves, and the further arrays of the optimizer. Call it once a round."""
        weights: Mapping[str, Any] = get_weights(self.model)
        extra = self.regularizer.finish(weights, *self._training())
        if self._start is not None:
            weights = self._disguised(weights, self._start, extra)
            self._start = None  # the received model's memory is wanted again
        return weights, extra

    def _message(self, weights: Mapping[str, Any], count: float, extra: Mapping[str, Any]) -> dict[Any, Any]:
        """The answer to an aggregator.

        :param count: how many samples the weights stand for.
        """
        message: dict[Any, Any] = {
            MessageType.WEIGHTS: weights,
            MessageType.DATASET_SIZE: count,
            MessageType.MODEL_VERSION: self._round,
            MessageType.ROUND: self._round,
        }
        utility = getattr(self.datasampler, "stat_utility", None) if self.stat_utility is None else self.stat_utility
        further = {
            MessageType.EXTRA: extra,
            MessageType.STAT_UTILITY: utility,
            MessageType.DATASAMPLER_METADATA: self.datasampler.get_metadata(),
        }
        return message | {key: value for key, value in further.items() if value}

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
