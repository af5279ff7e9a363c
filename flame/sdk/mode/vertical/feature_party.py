"""A feature party of vertical federated learning: it runs its bottom model on its own features, and trains it.

It answers what it is asked: outputs for some samples, and gradients to step along. The gradients of a batch come with the
request for the next one, so a batch costs one message in each direction.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from flame.errors import EndLeft, WorkerError
from flame.sdk import modelfile
from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import WorkIsDone
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.mode.vertical.alignment import hashed
from flame.sdk.mode.vertical.rewind import PartyLost, Rewinding
from flame.sdk.mode.vertical.split import (
    ANEW,
    BACK_TO,
    HAS,
    KEEP,
    KEPT,
    LAST,
    PURPOSE,
    TAG_ALIGN,
    TAG_BACKWARD,
    TAG_FORWARD,
    as_tensor,
    ids_of,
    make_optimizer,
    pytorch,
)
from flame.sdk.weights import get_weights

__all__ = ["TAG_ALIGN", "TAG_BACKWARD", "TAG_FORWARD", "FeatureParty"]

log = logging.getLogger(__name__)

#: How long the server may take to take the bottom model, in seconds.
ARTIFACT_SECONDS = 600.0


class FeatureParty(Rewinding):
    """Has features of the samples, and no labels.

    The user writes ``load_data``, which sets :attr:`ids` and :attr:`x`, and ``initialize``, which sets ``self.model`` to a
    PyTorch module (and :attr:`optimizer`, if it shall not be SGD at the job's learning rate).

    :ivar ids: which sample each row is of.
    :ivar x: the features, a tensor ``[samples, ...]`` in the order of the ids; only :meth:`forward` looks at it.
    :ivar name: what the party is called; the outputs stand in the order of the names. The dataset's name, if it is not set.
    """

    ids: Sequence[Any]
    x: Any
    name: str = ""
    _source: str = ""
    _rows: Any = None
    _request: Message | None = None
    _outputs: Any = None  # of the last request, with the graph behind them
    _step: int = 0
    _seeded: int = 0

    def internal_init(self) -> None:
        """See :class:`Role`; nobody else has this party's bottom model."""
        super().internal_init()
        self.link.owes()

    def forward(self, rows: Any) -> Any:
        """The bottom model's outputs for some samples; for the user to replace where the model takes more than :attr:`x`.

        :param rows: which, a tensor ``[samples]`` of int64.
        :returns: a tensor ``[samples, outputs]``.
        """
        return self.model(self.x[rows])

    def align(self, tag: str = TAG_ALIGN) -> None:
        """What the tasklet ``align`` does: agree with the others on the samples that all have."""
        channel = self.channel(tag)
        if self.optimizer is None or not hasattr(self, "_states"):
            self.optimizer = make_optimizer(self)
            self._remember_beginning()
        self._request = self._outputs = None
        hashes = hashed(ids_of(self), self.cm.secret(PURPOSE))
        try:
            self.await_peer(channel)
        except WorkIsDone:
            return self._end_alone()
        self._source = next(iter(channel.heard()), None) or channel.one_end()
        told = {
            MessageType.IDS: hashes,
            MessageType.NAME: self.name or self._called(),
            MessageType.METADATA: {HAS: self._available()},
        }
        try:
            channel.send(self._source, told, kind="ids")
            message = self._receive(channel)
            while ANEW in (message.get(MessageType.METADATA) or {}):  # said before it had heard of this party
                message = self._receive(channel)
        except (EndLeft, PartyLost) as error:
            self._orphaned(channel, error)
            return self.align(tag)
        if self._work_done:
            return self._end_alone()
        back = (message.get(MessageType.METADATA) or {}).get(BACK_TO, 0)
        if (back or self._round > 1 or self._step) and not self._go_back(back):
            raise WorkerError(f"The others go back to round {back}, and what this party had kept of it cannot be read.")
        self._step = self._seeded = 0
        rows = np.asarray(message.get(MessageType.ROWS))
        if rows.dtype != np.int64 or rows.ndim != 1 or ((rows < 0) | (rows >= len(hashes))).any():
            raise WorkerError("What the active party sent as the common samples are no rows of this party's.")
        self._rows = pytorch().from_numpy(np.array(rows))
        log.info("%d of %d samples are common to all parties.", len(rows), len(hashes))
        return None

    def _end_alone(self) -> None:
        """The others are done: what this party has kept of the last round is its part of the result.

        :raises flame.errors.WorkerError: it has kept none.
        """
        last = int(self.config.hyperparameters.rounds)
        if last not in self._available() or not self._go_back(last):
            raise WorkerError(
                f"The others have done the work, and this party has kept nothing of the last round ({last}): its bottom model is lost."
            )
        self._round, self._work_done = last, True

    def get(self, tag: str) -> None:
        """What the tasklets ``fetch`` and ``backward`` do: take a request, and step along the gradients that came with it."""
        if self._work_done:
            return
        if tag == TAG_FORWARD:
            channel = self.channel(tag)
            try:
                self._request = self._receive(channel)
            except PartyLost as error:
                self._orphaned(channel, error)
                self.align()
            else:
                if ANEW in (self._request.get(MessageType.METADATA) or {}):
                    self.align()
        elif tag == TAG_BACKWARD:
            self._backward()

    def put(self, tag: str) -> None:
        """What the tasklet ``forward`` does: run the bottom model and send what it gives."""
        request = self._request
        if tag != TAG_FORWARD or request is None:
            return
        told = request.get(MessageType.METADATA) or {}
        if KEEP in told:
            self._keep_state(request[MessageType.ROUND])
        if LAST in told:
            self._send(self.channel(tag), {MessageType.METADATA: {KEPT: request[MessageType.ROUND]}}, "kept")
        if MessageType.ROWS not in request:
            return
        torch = pytorch()
        at = np.asarray(request[MessageType.ROWS])
        if at.dtype != np.int64 or at.ndim != 1 or ((at < 0) | (at >= len(self._rows))).any():
            raise WorkerError("The active party asks for samples that are not among the common ones.")
        rows = self._rows[torch.from_numpy(np.array(at))]
        training = bool(request.get(MessageType.TRAINING))
        self._step = request[MessageType.STEP]
        self._round = request.get(MessageType.ROUND, self._round)
        if training and self._seeded != self._round:
            self._seeded = self._round
            self._seed_round(self._round)
        self.model.train(training)
        with torch.set_grad_enabled(training):
            outputs = self.forward(rows)
        self._outputs = outputs if training else None
        channel = self.channel(tag)
        channel.set_property("round", self._round)
        answer = {MessageType.ACTIVATIONS: outputs.detach(), MessageType.STEP: self._step}
        self._send(channel, answer, "activations")

    def _send(self, channel: Channel, message: dict[Any, Any], kind: str) -> None:
        try:
            channel.send(self._source, message, kind=kind)
        except EndLeft as error:
            log.info("The %s of step %d are lost: %s", kind, self._step, error)  # the next fetch sees that it is gone

    def _backward(self) -> None:
        outputs, self._outputs = self._outputs, None
        gradients = self._request.get(MessageType.GRADIENTS) if self._request is not None else None
        # Gradients of an earlier step than the last are of no use: what they belong to is forgotten.
        if gradients is None or outputs is None or self.optimizer is None:
            return
        gradients = as_tensor(gradients, outputs, "The active party")
        if gradients.shape != outputs.shape:
            raise WorkerError(f"The gradients are {list(gradients.shape)}, the outputs {list(outputs.shape)}.")
        self.optimizer.zero_grad()
        outputs.backward(gradients.to(outputs.dtype))
        self.optimizer.step()

    def _receive(self, channel: Channel) -> Message:
        message, _ = channel.recv(self._source)
        if message is None:
            raise PartyLost(self._source)
        self._work_done = bool(message.get(MessageType.EOT))
        return message

    def _orphaned(self, channel: Channel, error: Exception) -> None:
        """The active party is gone.

        :raises flame.errors.WorkerError: nobody will take its place.
        """
        if self.config.restart.of(channel.other_role()).attempts == 0:
            raise WorkerError(
                f"The active party left channel {channel.name()} before the work was done. It has the labels and the top model: "
                "nobody can take its place."
            ) from error
        log.info("The active party has left; waiting for the one that takes its place.")

    def _called(self) -> str:
        return PurePosixPath(urlsplit(self.config.dataset).path).stem or self.config.task_id

    def save_metrics(self) -> None:
        """Report what :meth:`update_metrics` was told, if anything."""
        metrics = self.take_metrics()
        if metrics:
            self.link.metrics(self._round, metrics)

    def save_model(self) -> None:
        """Hand the bottom model to the server, as ``bottom-NAME.safetensors``; for the user to replace if it shall stay here."""
        name = "".join(each if each.isalnum() and each.isascii() else "-" for each in self.name or self._called())
        path = self.link.folder / f"bottom-{name}.safetensors"
        modelfile.save(path, get_weights(self.model), {"job": self.config.job.job_id, "party": self.name})
        self.link.artifact(path.name, path, ARTIFACT_SECONDS)

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, align, then until the work is done fetch, backward, forward."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            align = Tasklet("align", self.align, TAG_ALIGN)
            fetch = Tasklet("fetch", self.get, TAG_FORWARD)
            backward = Tasklet("backward", self.get, TAG_BACKWARD)
            forward = Tasklet("forward", self.put, TAG_FORWARD)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            save_model = Tasklet("save_model", self.save_model)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> align
            >> loop(fetch >> backward >> forward >> save_metrics)
            >> save_model
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_ALIGN, TAG_FORWARD, TAG_BACKWARD]
