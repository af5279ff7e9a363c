"""A site of federated evaluation: it tries the model that it is given on its own data, and tells what it has measured."""

from __future__ import annotations

from flame.errors import WorkerError
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD, Follower
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.weights import as_arrays, set_weights

__all__ = ["TAG_FETCH", "TAG_UPLOAD", "Evaluator"]


class Evaluator(Follower):
    """Evaluates the model on its own data. The user writes ``load_data``, ``initialize`` (which sets ``self.model``) and
    ``evaluate``, which tells :meth:`update_metrics` what it has measured. A trainer's script has these; its ``train`` is not called.

    :ivar dataset_size: how many samples ``evaluate`` measures on; the weight of its metrics.
    """

    dataset_size: int

    def get(self, tag: str) -> None:
        """What the tasklet ``fetch`` does: take the model."""
        message = self._newest(self.channel(tag))
        self._work_done = bool(message.get(MessageType.EOT))
        if not self._work_done:
            self._round = message[MessageType.ROUND]
            set_weights(self.model, as_arrays(message[MessageType.WEIGHTS]))

    def put(self, tag: str) -> None:
        """What the tasklet ``upload`` does: tell the metrics.

        :raises flame.errors.WorkerError: the user's code has measured nothing, or not said on how many samples.
        """
        metrics, count = self.take_metrics(), getattr(self, "dataset_size", None)
        name = type(self).__name__
        if not metrics:
            raise WorkerError(f"{name} has measured nothing: tell update_metrics in evaluate what comes out.")
        if count is None:
            raise WorkerError(
                f"{name} has no dataset_size: set self.dataset_size to how many samples evaluate measures on."
            )
        self.link.metrics(self._round, metrics)
        message = {
            MessageType.METRICS: metrics,
            MessageType.DATASET_SIZE: float(count),
            MessageType.ROUND: self._round,
        }
        self._answer(self.channel(tag), message)

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, then until the work is done fetch, evaluate, upload."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            fetch = Tasklet("fetch", self.get, TAG_FETCH)
            evaluate = Tasklet("evaluate", self.evaluate)
            upload = Tasklet("upload", self.put, TAG_UPLOAD)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        internal_init >> load_data >> initialize >> loop(fetch >> evaluate >> upload)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_FETCH, TAG_UPLOAD]
