"""The coordinator of synchronous rounds: whenever the top asks, it spreads trainers over middle aggregators and tells everyone.

It balances the aggregators' load: each reports how long an update took it, and gets trainers in proportion; among equals the numbers
differ by one at most. Another rule is a matter of overriding :meth:`Coordinator.assign`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flame.errors import DeadlineExceeded
from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.config import Config
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.farewell import FAREWELL_SECONDS, say_done
from flame.sdk.mode.horizontal.coord_syncfl.balance import spread, steps
from flame.sdk.mode.horizontal.syncfl.rounds import order_of
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import Role
from flame.sdk.mode.tasklet import Loop, Tasklet

log = logging.getLogger(__name__)

TAG_COORDINATE_WITH_TOP_AGG = "coordinateWithTopAgg"
TAG_COORDINATE_WITH_MID_AGG = "coordinateWithMidAgg"
TAG_COORDINATE_WITH_TRAINER = "coordinateWithTrainer"

#: What the top says with its question: the aggregators that have nothing to do, those that died in this round, and for a round that is
#: begun anew, for want of trainers, how long to wait for them, in seconds.
ASK_IDLE = "idle"
ASK_LOST = "lost"
ASK_PATIENCE = "patience"
#: What an aggregator reports: how long it was busy with how many updates.
LOAD_SECONDS = "seconds"
LOAD_UPDATES = "updates"


class Coordinator(Role):
    """Says who works with whom. There is nothing that a user must write.

    :ivar agg_to_trainer: each aggregator's trainers in this round.
    """

    agg_to_trainer: dict[str, list[str]]
    _question: Message
    _seconds: dict[str, float]
    _met: bool = False
    _all_come: bool = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def internal_init(self) -> None:
        """See :class:`Role`."""
        super().internal_init()
        self.agg_to_trainer, self._seconds, self._met = {}, {}, False

    def initialize(self) -> None:
        """Nothing to initialize: a coordinator has no model."""

    def assign(self, trainers: Sequence[str], aggregators: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Which aggregator works with which trainers; for users with a rule of their own.

        :param trainers: who is to be given to somebody, in an order that is the same in every run.
        :param aggregators: who can take some, likewise.
        """
        known = {} if self.config.policy.deterministic else {end: self._seconds.get(end, 0.0) for end in aggregators}
        return spread(trainers, aggregators, steps(known))

    def await_request(self) -> None:
        """Wait for the top's question."""
        channel = self.channel(TAG_COORDINATE_WITH_TOP_AGG)
        while True:
            self.await_peer(channel)
            end = next(iter([*channel.heard(), *channel.all_ends()]), None)
            message = channel.recv(end)[0] if end is not None else None
            if message is not None:
                break
        if MessageType.EOT in message:
            self._work_done = True
            return
        self._question, self._round = message, message[MessageType.ROUND]

    def pair_mid_aggs_and_trainers(self) -> None:
        """Spread the round's trainers, or those of an aggregator that died in it, and tell everyone."""
        self._hear_loads()
        told = self._question.get(MessageType.METADATA) or {}
        middles, workers = self.channel(TAG_COORDINATE_WITH_MID_AGG), self.channel(TAG_COORDINATE_WITH_TRAINER)
        lost = [trainer for end in told.get(ASK_LOST, ()) for trainer in self.agg_to_trainer.pop(end, ())]
        if not told.get(ASK_LOST):
            self.agg_to_trainer = {}
            self._await_all(middles, workers)
            if patience := float(told.get(ASK_PATIENCE, 0.0)):
                self.wait_for_ends(workers, self.config.policy.min_trainers, patience)
            lost = workers.all_ends()
        trainers = sorted({end for end in lost if workers.has(end)}, key=lambda end: order_of(workers, end))
        wanted = list(told.get(ASK_IDLE, ()))
        if told.get(ASK_LOST):  # one that takes another one's place may have come to the top a moment earlier than here
            middles.wait_until(lambda: all(middles.has(end) for end in wanted), FAREWELL_SECONDS)
        free = [end for end in wanted if middles.has(end)]
        given: Mapping[str, Sequence[str]] = {}
        while free:
            free.sort(key=lambda end: order_of(middles, end))
            given = {end: each for end, each in self.assign(trainers, free).items() if each}
            gone = [end for end, each in given.items() if not self._tell(middles, end, list(each))]
            if not gone:
                break
            free, given = [end for end in free if end not in gone], {}
        for aggregator, each in given.items():
            self.agg_to_trainer.setdefault(aggregator, []).extend(each)
            workers.broadcast(self._news(aggregator), each, FAREWELL_SECONDS, kind="assignment")
        top = self.channel(TAG_COORDINATE_WITH_TOP_AGG)
        self._tell(top, self._question.sender, list(given))

    def _await_all(self, middles: Channel, workers: Channel) -> None:
        """Before the first round wait for all, as long as the policy's ``joinDeadline`` allows."""
        again = self._strict and self.config.restart.attempts > 0 and self._all_come
        for channel in () if self._met and not again else (middles, workers):
            expected = self.config.peers.get(channel.name(), 1)
            if not self.wait_for_ends(channel, expected, self.config.policy.join_deadline):
                if channel.empty():
                    raise DeadlineExceeded(
                        f"No worker of role {channel.other_role()} was on channel {channel.name()} within "
                        f"{self.config.policy.join_deadline:g} s (policy.joinDeadline)."
                    )
                self._all_come = False
                self.link.warning(
                    f"The work begins with {len(channel.all_ends())} of {expected} workers of role {channel.other_role()}."
                )
        self._met = True

    def _hear_loads(self) -> None:
        """Take in what aggregators have reported."""
        channel = self.channel(TAG_COORDINATE_WITH_MID_AGG)
        for end in channel.heard():
            while not channel.is_rxq_empty(end):
                message, _ = channel.recv(end)
                load = message.get(MessageType.META_INFO_RES) if message is not None else None
                if isinstance(load, dict) and load.get(LOAD_UPDATES):
                    self._seconds[end] = float(load.get(LOAD_SECONDS, 0.0)) / int(load[LOAD_UPDATES])

    def _news(self, ends: Any) -> dict[Any, Any]:
        return {MessageType.ROUND: self._round, MessageType.COORDINATED_ENDS: ends}

    def _tell(self, channel: Channel, end: str, ends: Any) -> bool:
        return not channel.broadcast(self._news(ends), [end], FAREWELL_SECONDS, kind="assignment")

    def inform_end_of_training(self) -> None:
        """Tell aggregators and trainers that the work is done."""
        for tag in (TAG_COORDINATE_WITH_MID_AGG, TAG_COORDINATE_WITH_TRAINER):
            say_done(self.channel(tag))

    def compose(self) -> None:
        """Put the workflow together: until the work is done wait for the top's question and answer it."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            initialize = Tasklet("initialize", self.initialize)
            request = Tasklet("await_request", self.await_request)
            pair = Tasklet("pair_mid_aggs_and_trainers", self.pair_mid_aggs_and_trainers)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        internal_init >> initialize >> loop(request >> pair) >> inform

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_COORDINATE_WITH_TOP_AGG, TAG_COORDINATE_WITH_MID_AGG, TAG_COORDINATE_WITH_TRAINER]
