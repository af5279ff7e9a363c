"""The trainer of hybrid learning: it takes the model from the aggregator, trains, and averages with its group round a ring.

The two channels are told apart by their function tags: ``ring_allreduce`` on the one within the group, ``fetch`` and ``upload`` on the
one to the aggregator. So each may have the backend that suits it: p2p within a group, whose members are near each other,
and mqtt to an aggregator far away, to which only one model a group travels.

The first of a ring is the group's delegate in that round. When it dies, another one is the first of the next ring.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from flame.sdk.codec import Message
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.distributed.average import RingMean
from flame.sdk.mode.distributed.carrier import Torn
from flame.sdk.mode.distributed.table import Table
from flame.sdk.mode.distributed.trainer import TAG_RING_ALLREDUCE
from flame.sdk.mode.horizontal.syncfl.rounds import TOLD_SECONDS
from flame.sdk.mode.horizontal.syncfl.trainer import TAG_FETCH, TAG_UPLOAD
from flame.sdk.mode.horizontal.syncfl.trainer import Trainer as SyncTrainer
from flame.sdk.mode.hybrid.top_aggregator import TOLD_DELEGATE
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.optimizers.base import TOLD_TRAINERS
from flame.sdk.weights import set_weights

__all__ = ["TAG_FETCH", "TAG_RING_ALLREDUCE", "TAG_UPLOAD", "Trainer"]

log = logging.getLogger(__name__)

#: The share of the time left for a round that a group has for itself; with the rest its update goes up.
SHARE = 0.9
#: How long a trainer that was started anew looks for the others of its group, in seconds.
ACQUAINTANCE_SECONDS = 3.0
#: What an optimizer's further arrays are called on their way round the ring, beside the model's own.
EXTRA = "extra:"


class Trainer(SyncTrainer):
    """Trains on its own data, and averages with its group. See :class:`flame.sdk.mode.training.Training` for what the user writes.

    :ivar is_committer: whether this member is the group's delegate in the current round.
    """

    is_committer: bool = False
    _delegate: str = ""
    _table: Table
    _mean: RingMean
    _group: tuple[Mapping[str, Any], Mapping[str, Any], float, int] = ({}, {}, 0.0, 0)

    def internal_init(self) -> None:
        """See :class:`Role`; also takes a place at the group's table."""
        super().internal_init()
        # Whether a round has enough is for the aggregator to judge.
        self._table = Table(self.channel(TAG_RING_ALLREDUCE), self.config.policy, self.link, least=1)
        self._mean = RingMean(self._table, self.link.warning)

    def _join_channels(self) -> None:
        """Join the group's channel alone; the other one is joined in :meth:`join_group`."""
        name = self.config.func_tag_map.get(TAG_RING_ALLREDUCE)
        if name is not None:
            self.cm.join(name)

    def join_group(self) -> None:
        """Wait until the group is there, then go to the aggregator: who is given a model must be known to its group."""
        channel = self._table.channel
        others = self.config.peers.get(channel.name(), 0)
        # Who comes in again waits only for those who are there, whom it hears of at once.
        longest = self.config.policy.join_deadline if self.attempt == 1 else ACQUAINTANCE_SECONDS
        if not self.wait_for_ends(channel, others, longest):
            self.link.warning(
                f"The group {channel.groupby()} begins with {len(channel.all_ends()) + 1} of {others + 1} trainers: the "
                f"others did not come within {longest:g} s."
            )
        self.cm.join_all()

    def _accept(self, message: Message) -> None:
        super()._accept(message)
        told = message.get(MessageType.METADATA) or {}
        seconds = told.get(TOLD_SECONDS)
        self._table.limit = None if seconds is None else SHARE * float(seconds)
        self._table.only = message.get(MessageType.COORDINATED_ENDS)
        self._table.began = time.monotonic()

    def _ring_allreduce(self, tag: str) -> None:
        """Average the group's models."""
        if tag != TAG_RING_ALLREDUCE:
            return
        weights, extra = self._trained_weights()
        self._remember()
        mine = {**weights, **{EXTRA + name: array for name, array in extra.items()}}
        me = self._table.me.end
        while True:
            plan = self._table.agree(self._round - 1, True)
            try:
                # One that is at another round than the others takes no part in theirs.
                ring = plan.ring if me in plan.ring and plan.round == self._round else [me]
                mean, total = (mine, self._count()) if ring == [me] else self._mean(plan, mine, self._count())
                break
            except Torn:
                log.info("The ring of round %d is formed anew: a member has left.", self._round)
                self._table.tear(plan)
        self._delegate = ring[0]
        self.is_committer = self._delegate == me
        averaged = {name: array for name, array in mean.items() if not name.startswith(EXTRA)}
        further = {name.removeprefix(EXTRA): array for name, array in mean.items() if name.startswith(EXTRA)}
        self._group = averaged, further, total, len(ring)
        if total > 0 and not self._sends_differences:
            set_weights(self.model, averaged)

    def _send_weights(self, tag: str) -> None:
        weights, extra, total, members = self._group
        self._group = {}, {}, 0.0, 0
        if not self.is_committer:
            weights, extra, total, members = {}, {}, 0.0, 0
        message = self._message(weights if total > 0 else {}, total, extra if total > 0 else {})
        message[MessageType.METADATA] = {TOLD_TRAINERS: members, TOLD_DELEGATE: self._delegate}
        self._answer(self.channel(tag), message)

    def compose(self) -> None:
        """Put the workflow together: until the work is done fetch, train, ring_allreduce, evaluate, upload, save_metrics."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            join_group = Tasklet("join_group", self.join_group)
            fetch = Tasklet("fetch", self.get, TAG_FETCH)
            train = Tasklet("train", self.train)
            ring_allreduce = Tasklet("ring_allreduce", self._ring_allreduce, TAG_RING_ALLREDUCE)
            evaluate = Tasklet("evaluate", self.evaluate)
            upload = Tasklet("upload", self.put, TAG_UPLOAD)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> join_group
            >> loop(fetch >> train >> ring_allreduce >> evaluate >> upload >> save_metrics)
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_FETCH, TAG_UPLOAD, TAG_RING_ALLREDUCE]
