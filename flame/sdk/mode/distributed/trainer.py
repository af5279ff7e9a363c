"""The trainer of distributed learning: no server; the members average their models by a ring all-reduce.

    members come to the table -> train -> all-reduce -> evaluate -> ... -> the model is kept by one of them

How they agree who takes part is in :mod:`.table` and :mod:`.agreement`, the all-reduce in :mod:`.ring`. Members may join and leave between
rounds, and be killed in the middle of one: the ring is formed anew of those who are left, from the updates that they
have trained already. All begin from one model, that of the first in order, or of the registry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import RoundFailed
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.distributed.agreement import NEWCOMER, Plan
from flame.sdk.mode.distributed.average import RingMean
from flame.sdk.mode.distributed.peer import Peer, only_averages
from flame.sdk.mode.distributed.table import Table, Torn
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.optimizers.base import Optimizer
from flame.sdk.weights import as_arrays, get_weights, set_weights

log = logging.getLogger(__name__)

TAG_RING_ALLREDUCE = "ring_allreduce"


class Trainer(Peer):
    """Trains on its own data, and averages with the others. See :class:`flame.sdk.mode.training.Training` for what the user writes."""

    _table: Table
    _mean: RingMean
    _done: int = NEWCOMER
    _update: tuple[Mapping[str, Any], float] | None = None

    def internal_init(self) -> None:
        """See :class:`Role`; also takes a place at the table."""
        super().internal_init()
        channel = self.channel(TAG_RING_ALLREDUCE)
        expected = self.config.peers.get(channel.name(), 0) + 1
        self._table = Table(channel, self.config.policy, self.link, expected=expected)
        self._mean = RingMean(self._table, self.link.warning)
        self._done = NEWCOMER

    def _use(self, optimizer: Optimizer) -> None:
        """See :class:`Training`."""
        only_averages(optimizer, "Distributed")

    def member_check(self) -> None:
        """Before the first round: get the model that all begin from, or the one that they have come to by now."""
        while self._done == NEWCOMER and not self._work_done:
            self._turn(trained=False)
        if self._round <= self._done:
            self._round = self._done + 1
            self._work_done = self._round > self._rounds
        self._started = self._table.began = time.monotonic()
        if not self._work_done:
            self._begin_round(self._common)

    def _ring_allreduce(self, tag: str) -> None:
        """Average the trained models; done when this member has the model of the round, if need be from another one."""
        if tag == TAG_RING_ALLREDUCE:
            self._update = self._trained_weights(), self._count()
            self.is_committer = False
            while self._done < self._round:
                self._turn(trained=True)
            self._update = None
            self._round = self._done
            self._spend()

    def _turn(self, *, trained: bool) -> None:
        """Agree on what to do next, and do it. Where it cannot be done, nothing has changed."""
        plan = self._table.agree(self._done, trained)
        me = self._table.me.end
        if me not in plan.members and plan.giver != me:
            self._work_done = self._work_done or plan.id == "farewell"
            return
        try:
            if plan.round == 0 and plan.giver == me:
                self._begin()
            if me in plan.ring:
                self._reduce(plan)
            if me in plan.to:
                self._take_up(as_arrays(self._table.take_model()[MessageType.WEIGHTS]))
            elif plan.giver == me:
                self._table.give({MessageType.WEIGHTS: self._common, MessageType.ROUND: plan.round})
            self._done = plan.round
        except Torn:
            log.info("Round %d is begun anew: one of its members has left.", plan.round)
            self._table.tear(plan)

    def _begin(self) -> None:
        """The model that all begin from is this member's, or the registry's."""
        if self.config.base_model:
            self._keep()
            self.load_base_model()
        self._take_up(get_weights(self.model))

    def _take_up(self, weights: Mapping[str, Any]) -> None:
        """Another member's model becomes this one's."""
        self._common = {name: np.array(array) for name, array in weights.items()}
        set_weights(self.model, self._common)

    def _reduce(self, plan: Plan) -> None:
        assert self._update is not None
        mean, total = self._mean(plan, *self._update)
        if total <= 0:
            raise RoundFailed(
                f"Round {plan.round} has no samples: every member's dataset_size is 0, or its training diverged."
            )
        self._common = mean
        set_weights(self.model, self._common)
        self.is_committer = plan.ring[0] == self._table.me.end

    def inform_end_of_training(self) -> None:
        """Come to the table for the last time, so that nobody is left behind."""
        while self._done != NEWCOMER:
            self._turn(trained=False)
            if self._table.plan is None or self._table.plan.over:
                return

    def save_model(self) -> None:
        """One of the members keeps the model; the others wait until that is done."""
        if self._done != NEWCOMER:
            self._table.farewell(super().save_model)

    def compose(self) -> None:
        """Put the workflow together: in each round train, ring_allreduce, evaluate, save_metrics; at the end the model is kept."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            member_check = Tasklet("member_check", self.member_check)
            train = Tasklet("train", self.train)
            ring_allreduce = Tasklet("ring_allreduce", self._ring_allreduce, TAG_RING_ALLREDUCE)
            evaluate = Tasklet("evaluate", self.evaluate)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            inc_round = Tasklet("inc_round", self.increment_round)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            save_model = Tasklet("save_model", self.save_model)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> loop(member_check >> train >> ring_allreduce >> evaluate >> save_metrics >> inc_round)
            >> inform
            >> save_model
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_RING_ALLREDUCE]
