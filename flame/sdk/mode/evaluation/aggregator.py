"""The aggregator of federated evaluation: it gives a model out and averages what the sites have measured.

Who takes part, and what becomes of sites that leave or are late, is as in training; see
:mod:`flame.sdk.mode.horizontal.syncfl.top_aggregator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import WorkerError
from flame.sdk.codec import Message
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TAG_AGGREGATE, TAG_DISTRIBUTE, TopAggregator
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.roundkeeper import REGISTRY_SECONDS
from flame.sdk.mode.tasklet import Tasklet
from flame.sdk.optimizers.base import Optimizer, Update, Weights

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "EvaluationAggregator"]


class EvaluationAggregator(TopAggregator):
    """Has the model. The user writes ``initialize``, which sets ``self.model``: with its weights, as from a file
    (:func:`flame.sdk.modelfile.load`), or without, where the job names a registered one as ``baseModel``.

    Each metric is reported as its mean over the sites, weighted by their samples, and as the least and greatest of them
    (``min NAME``, ``max NAME``), with the numbers of ``sites`` and ``samples``.
    """

    def internal_init(self) -> None:
        """See :class:`TopAggregator`."""
        super().internal_init()
        self._optimizer = MetricsMean()

    def _update(self, end: str, message: Message) -> Update:
        """What a site has measured, in the form of an update."""
        metrics, count = message.get(MessageType.METRICS), message.get(MessageType.DATASET_SIZE)
        if not isinstance(metrics, dict) or not isinstance(count, int | float) or not count >= 0:
            raise WorkerError(f"What {end} sent are no metrics: is its role an Evaluator?")
        return Update(end=end, weights=metrics, count=count, version=self._round)

    def _aggregate_weights(self, tag: str) -> None:
        least = self.config.policy.min_trainers
        if not self._gather(self.channel(tag), least, self.config.policy.join_deadline):
            raise self._too_few(least)
        self._outgoing = None
        self.update_metrics(self._optimizer.finish())
        self.update_metrics({"sites": len(self._tally.folded), "samples": self._tally.samples})

    def save_results(self) -> None:
        """Let the registry take the metrics. There is no new model."""
        self.registry_client.finish(REGISTRY_SECONDS)

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, then distribute, aggregate, evaluate, save_metrics, once a round
        (a job has one, if it does not say more); at the end inform the sites.
        """
        super().compose()
        for none in ("train", "resume", "checkpoint", "commit"):  # nothing is made that would have to be kept
            self.composer.get_tasklet(none).remove()
        self.composer.get_tasklet("save_model").replace_with(Tasklet("save_results", self.save_results))


class MetricsMean(Optimizer):
    """The mean of each metric over those that have measured it, weighted by their samples; and the least and the greatest."""

    sort = "metrics"

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, float, float]] = {}

    def begin(self, weights: Weights, round: int) -> None:
        """See :class:`Optimizer`."""
        self._sums = {}

    def fold(self, update: Update) -> None:
        """See :class:`Optimizer`."""
        measured: Mapping[str, Any] = update.weights
        values = {str(name): float(value) for name, value in measured.items() if np.ndim(value) == 0}
        for name, value in values.items():
            if not np.isfinite(value):
                raise WorkerError(f"The metric {name!r} of {update.end} is {value}.")
        for name, value in values.items():
            total, count, least, greatest = self._sums.get(name, (0.0, 0.0, value, value))
            self._sums[name] = (
                total + update.count * value,
                count + update.count,
                min(least, value),
                max(greatest, value),
            )

    def finish(self) -> Weights:
        """Each metric's mean under its name, then the least and the greatest."""
        found: dict[str, Any] = {name: total / count for name, (total, count, _, _) in self._sums.items()}
        for name, (_, _, least, greatest) in self._sums.items():
            found |= {f"min {name}": least, f"max {name}": greatest}
        return found
