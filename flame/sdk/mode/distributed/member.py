"""A trainer that goes from round to round by agreement with the others: what the topologies without a server share.

    members come to the table -> train -> combine their models -> evaluate -> ... -> the model is kept by one of them

How they agree who takes part is in :mod:`.table` and :mod:`.agreement`; how the models are combined is the topology's. Members may join and leave
between rounds, and be killed in the middle of one: it is begun anew by those who are left, from the updates that they have
trained already. All begin from one model, that of the first in order, or of the registry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.distributed.agreement import NEWCOMER, Plan
from flame.sdk.mode.distributed.carrier import Torn
from flame.sdk.mode.distributed.peer import Peer
from flame.sdk.mode.distributed.table import Table
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.weights import as_arrays, get_weights, set_weights

log = logging.getLogger(__name__)


class Member(Peer):
    """Base of the trainers that agree on each round.

    :cvar TAG: the function tag of the channel that links the members.
    :cvar STEP: what the tasklet is called in which they combine their models.
    :cvar OWN: whether each member has a model of its own after a round.
    """

    TAG: ClassVar[str]
    STEP: ClassVar[str]
    OWN: ClassVar[bool] = False
    _table: Table
    _done: int = NEWCOMER
    _back: bool = False  # it was here before, and has not asked yet where the others are
    _update: tuple[Mapping[str, Any], float] | None = None

    def internal_init(self) -> None:
        """See :class:`Role`; also takes a place at the table."""
        super().internal_init()
        channel = self.channel(self.TAG)
        expected = self.config.peers.get(channel.name(), 0) + 1
        whole = self._strict and self.config.restart.of(self.config.role).attempts > 0
        self._table = Table(channel, self.config.policy, self.link, expected=expected, whole=whole, own=self.OWN)
        self._done = NEWCOMER
        self._back = False

    def member_check(self) -> None:
        """Before the first round: get the model that all begin from, or the one that they have come to by now."""
        if self._back:
            self._back = False
            if not self._strict:  # else it trains first: what training leaves behind here nobody can give it
                self._turn(trained=False)
        while self._done == NEWCOMER and not self._work_done:
            self._turn(trained=False)
        if self._round <= self._done:
            self._round = self._done + 1
            self._work_done = self._round > self._rounds
        self._started = self._table.began = time.monotonic()
        if not self._work_done:
            if self._strict and self._done == 0:
                self._kept.commit(0, self._state)
            self._seed_round(self._round)
            self._begin_round(self._common)

    def keep_round(self) -> None:
        """See :class:`RoundKeeper`. In a deterministic job nobody may be behind by more than the round that the others can do again."""
        if self._strict:
            self._kept.commit(self._round, self._state)
        else:
            super().keep_round()

    def _state(self) -> State:
        """See :class:`Role`: the model that this member has, and what the others would give it with it."""
        state = super()._state()
        for name in [name for name in state.arrays if name.startswith("model/")]:
            del state.arrays[name]  # training has changed it since
        state.arrays.update({f"model/{name}": array for name, array in self._common.items()})
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._common = {name: np.array(array) for name, array in state.part("model").items()}

    def resume(self) -> None:
        """See :class:`RoundKeeper`: begin where this member was; where the others are by now, the table says."""
        found = self._kept.load()
        if found is not None:
            self._done, state = found
            self._private = self._done
            self._load(state)
            self._back = True
            if self._done >= self._rounds:  # the others may have left: nobody need be waited for
                self._round, self._work_done = self._done + 1, True
                self._table.expect(1)

    def _close_round(self, tag: str) -> None:
        """Combine the trained models; done when this member has the model of the round, if need be from another one."""
        if tag == self.TAG:
            self._kept.settle()
            self._update = self._trained_weights(), self._count()
            self.is_committer = False
            while self._done < self._round:
                self._turn(trained=True)
            self._update = None
            self._round = self._done
            self._spend()

    def _combine(self, plan: Plan) -> None:
        """Make the model of a round of :attr:`_update` and the others', and take it up. For the topology.

        :raises Torn: it cannot be done with those who are in the plan.
        """
        raise NotImplementedError

    def _turn(self, *, trained: bool) -> None:
        """Agree on what to do next, and do it. Where it cannot be done, nothing has changed."""
        plan = self._table.agree(self._done, trained)
        me = self._table.me.end
        if me not in plan.members and plan.giver != me:
            return
        try:
            if plan.round == 0 and plan.giver == me:
                self._begin()
            if me in plan.ring:
                self._combine(plan)
            if me in plan.to:
                self._receive(self._table.take_model(plan.giver))
                # It may be that it had closed this round before, and was to report it.
                self.is_committer = self._strict and next(iter(plan.tickets), "") == me
            elif plan.giver == me:
                self._table.give(self._gift(), plan.to)
            self._done = plan.round
        except Torn:
            log.info("Round %d is begun anew: one of its members has left.", plan.round)
            self._table.tear(plan)

    def _begin(self) -> None:
        """The model that all begin from is this member's, or the registry's."""
        if self.config.base_model:
            self._keep()
            self.load_base_model()
        self._take_up({name: array.copy() for name, array in get_weights(self.model).items()})

    def _gift(self) -> dict[Any, Any]:
        """What another member needs to be where this one is."""
        return {MessageType.WEIGHTS: self._common}

    def _receive(self, message: Message) -> None:
        """Be where another member is."""
        self._take_up({name: np.array(array) for name, array in as_arrays(message[MessageType.WEIGHTS]).items()})

    def _take_up(self, weights: Mapping[str, Any]) -> None:
        """The model of a round is there; ``weights`` are not changed any more."""
        self._common = weights
        set_weights(self.model, weights)

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
        """Put the workflow together: in each round train, combine, evaluate, save_metrics; at the end the model is kept."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            resume = Tasklet("resume", self.resume)
            member_check = Tasklet("member_check", self.member_check)
            train = Tasklet("train", self.train)
            combine = Tasklet(self.STEP, self._close_round, self.TAG)
            evaluate = Tasklet("evaluate", self.evaluate)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            checkpoint = Tasklet("checkpoint", self.keep_round)
            inc_round = Tasklet("inc_round", self.increment_round)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            save_model = Tasklet("save_model", self.save_model)
            loop = Loop(loop_check_fn=lambda: self._work_done, skip_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> resume
            >> loop(member_check >> train >> combine >> evaluate >> save_metrics >> checkpoint >> inc_round)
            >> inform
            >> save_model
        )
