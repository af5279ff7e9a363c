"""The middle aggregator of coordinated rounds: it works with the trainers that the coordinator gives it, in each round others."""

from __future__ import annotations

import time
from collections.abc import Collection

from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.mode.farewell import FAREWELL_SECONDS
from flame.sdk.mode.horizontal.coord_syncfl.coordinator import LOAD_SECONDS, LOAD_UPDATES
from flame.sdk.mode.horizontal.coord_syncfl.top_aggregator import TAG_COORDINATE
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.middle_aggregator import MiddleAggregator as SyncMiddleAggregator
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE, Tally
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Tasklet

__all__ = ["TAG_AGGREGATE", "TAG_COORDINATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]

#: How long a trainer that the coordinator knows may take to appear here, too, in seconds.
APPEAR_SECONDS = 10.0


class MiddleAggregator(SyncMiddleAggregator):
    """Aggregates the updates of the trainers that it is given. There is nothing that a user must write."""

    _trainers: Collection[str] = ()
    _busy_seconds: float = 0.0

    def get_trainers(self) -> None:
        """Hear from the coordinator who works for this round; it has said so before the top gave the model."""
        channel = self.channel(TAG_COORDINATE)
        while True:
            self.await_peer(channel)
            end = next(iter([*channel.heard(), *channel.all_ends()]), None)
            message = channel.recv(end, self.config.policy.join_deadline)[0] if end is not None else None
            if message is None:
                continue
            if MessageType.EOT in message:
                self._work_done = True
                return
            if message.get(MessageType.ROUND) == self._round:
                self._trainers = list(message[MessageType.COORDINATED_ENDS])
                if channel.is_rxq_empty(message.sender):  # else it has said something newer
                    return

    def _await_group(self, channel: Channel) -> None:
        """Wait until the given trainers are here; one that does not come is done without."""
        left = self._tally.left()
        channel.wait_until(
            lambda: all(channel.has(end) for end in self._trainers),
            APPEAR_SECONDS if left is None else min(APPEAR_SECONDS, left),
        )

    def _choose(self, channel: Channel) -> list[str]:
        """See :class:`RoundAggregator`."""
        free = set(self._idle(channel))
        return [end for end in self._trainers if end in free]

    def _take(self, channel: Channel, tally: Tally, end: str, message: Message | None) -> None:
        """See :class:`RoundAggregator`; what it costs is measured."""
        begun = time.monotonic()
        super()._take(channel, tally, end, message)
        self._busy_seconds += time.monotonic() - begun

    def _send_weights(self, tag: str) -> None:
        super()._send_weights(tag)
        load = {LOAD_SECONDS: self._busy_seconds, LOAD_UPDATES: len(self._tally.folded)}
        self._busy_seconds = 0.0
        coordinator = self.channel(TAG_COORDINATE)
        coordinator.broadcast({MessageType.META_INFO_RES: load}, timeout=FAREWELL_SECONDS, kind="load")

    def compose(self) -> None:
        """Put the workflow together: as the synchronous one, and after each model who is to work on it."""
        super().compose()
        with self.composer:
            ask = Tasklet("get_trainers", self.get_trainers)
        self.composer.get_tasklet("fetch").insert_after(ask)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_COORDINATE]
