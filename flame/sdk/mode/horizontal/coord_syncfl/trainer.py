"""The trainer of coordinated rounds: it works for whichever aggregator gives it the model.

The coordinator tells trainer and aggregator alike who works with whom, and the aggregator acts on it. So a trainer need not wait to be
told, and is not stuck with an aggregator that has died: it takes the models that those who are still there give it.
"""

from __future__ import annotations

from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.mode.horizontal.syncfl.trainer import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.trainer import Trainer as SyncTrainer
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Tasklet

__all__ = ["TAG_FETCH", "TAG_GET_AGGREGATOR", "TAG_UPLOAD", "Trainer"]

TAG_GET_AGGREGATOR = "getAggregator"


class Trainer(SyncTrainer):
    """Trains for the aggregator that it is given to; see :class:`flame.sdk.mode.horizontal.syncfl.trainer.Trainer`.

    :ivar aggregator_id: the aggregator that the coordinator named last.
    """

    aggregator_id: str | None = None

    def get_aggregator(self) -> None:
        """Note what the coordinator has said since the last time."""
        channel = self.channel(TAG_GET_AGGREGATOR)
        for end in channel.heard():
            while not channel.is_rxq_empty(end):
                message, _ = channel.recv(end)
                if message is not None and MessageType.COORDINATED_ENDS in message:
                    self.aggregator_id = message[MessageType.COORDINATED_ENDS]

    def _newest(self, channel: Channel) -> Message:
        """The first model that was given by somebody who is still there, or the word that ends the work.

        Every one who is there gets an answer, in the order in which they asked: an aggregator that a trainer was taken from
        still counts on what it gave out before.
        """
        while True:
            self.await_peer(channel)
            channel.wait_until(lambda: bool(channel.heard()) or channel.empty())
            for end in channel.heard():
                if (message := channel.peek(end)[0]) is not None and MessageType.EOT in message:
                    return message
            for message, (end, _) in channel.recv_fifo(channel.heard(), 1):
                if message is None or not channel.has(end):
                    continue
                if (last := channel.peek(end)[0]) is not None and MessageType.EOT in last:
                    return last
                self._source, self._source_mark = end, message.metadata.get("as", message.attempt)
                return message

    def compose(self) -> None:
        """Put the workflow together: as the synchronous one, and before each model what the coordinator has said."""
        super().compose()
        with self.composer:
            ask = Tasklet("get_aggregator", self.get_aggregator)
        self.composer.get_tasklet("fetch").insert_before(ask)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_GET_AGGREGATOR]
