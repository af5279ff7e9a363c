"""The trainer of swarm learning: in each round another one of the members aggregates for all.

The members agree on each round as those of a ring do (:mod:`flame.sdk.mode.distributed.member`). Whose turn it is to aggregate follows from the
number of the round and the order of those who take part; nothing needs to be voted on. That member asks the others for their updates,
folds them in as they come, and hands the model over, with all that the next one needs to go on with the job's
optimizer. So any of the server's rules works (momentum, adaptive steps, robust means), and any member may die: the next one in
order aggregates then, from the updates that have been trained already.

Warnat-Herresthal et al.: Swarm Learning for decentralized and confidential clinical machine learning. Nature 594 (2021). There a
blockchain elects the leader of each merge; here the members of a job know each other by the job's key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from flame.errors import RoundFailed, SpecError, WorkerError
from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.carrier import Torn
from flame.sdk.mode.distributed.member import Member
from flame.sdk.mode.message import MessageType
from flame.sdk.optimizers.base import Optimizer, Update, Weights
from flame.sdk.weights import as_arrays

log = logging.getLogger(__name__)

TAG_ELECT = "elect"
TAG_HANDOVER = "handover"

#: The entry of a handover that holds the optimizer's state.
STATE = "state"


class Trainer(Member):
    """Trains on its own data, and aggregates for all when it is its turn. See :class:`flame.sdk.mode.training.Training` for what the
    user writes.

    :ivar is_aggregating: whether it was this member's turn in the current round.
    """

    TAG = TAG_ELECT
    STEP = "handover"
    is_aggregating: bool = False
    _optimizer: Optimizer
    _extra: Weights = {}  # the optimizer's further arrays that the trainers are given, and those that they send
    _own_extra: Weights = {}

    def _use(self, optimizer: Optimizer) -> None:
        if optimizer.differences:
            raise SpecError(
                f"Swarm learning goes by rounds, and the optimizer {optimizer.sort!r} is for updates of different ones: "
                "choose another.",
                "optimizer",
            )
        self._optimizer = optimizer

    def _further(self) -> Weights:
        return self._extra

    def _with_extra(self, extra: Weights) -> None:
        self._own_extra = extra

    def _combine(self, plan: Plan) -> None:
        me = self._table.me.end
        turn = plan.ring[plan.round % len(plan.ring)]
        self.is_aggregating = turn == me
        self._table.channel.set_property("round", plan.round)
        if self.is_aggregating:
            self._aggregate(plan)
            self._table.give(self._gift(), [end for end in plan.ring if end != me])
        else:
            assert self._update is not None
            weights, count = self._update
            update = {MessageType.WEIGHTS: weights, MessageType.DATASET_SIZE: count, MessageType.EXTRA: self._own_extra}
            self._table.answer(turn, update)
            self._receive(self._table.take_model(turn))
        # Rounds are reported by one and the same member while it is there, so that they come in order.
        self.is_committer = plan.ring[0] == me

    def _aggregate(self, plan: Plan) -> None:
        """Fold in this member's update and the others'."""
        assert self._update is not None
        others = [end for end in plan.ring if end != self._table.me.end]
        self._optimizer.begin(self._common, plan.round)
        asked = self._table.invite(others)
        weights, count = self._update
        own = Update(end=self._table.me.end, weights=weights, count=count, version=plan.round, extra=self._own_extra)
        folded, refused = 0, 0
        for update in self._updates(plan, own, asked):
            try:
                if update.count > 0:
                    self._optimizer.fold(update)
                folded += 1
            except WorkerError as error:
                refused += 1
                self.link.warning(f"Round {plan.round}: {error.message}")
            del update  # its memory is free before the next one is received
        least = self.config.policy.min_trainers
        missing = len(plan.ring) - folded - refused
        if folded < least and not refused:
            raise Torn
        if self._strict and missing and self._table.limit is None:  # who has left comes again
            raise Torn
        if folded < least:
            raise RoundFailed(f"Round {plan.round} has {folded} of at least {least} updates (policy.minTrainers).")
        mean = self._optimizer.finish()
        self._extra = {name: np.array(array) for name, array in self._optimizer.extra().items()}
        self._take_up(mean)

    def _updates(self, plan: Plan, own: Update, asked: list[str]) -> Iterator[Update]:
        yield own
        for message in self._table.updates(asked, in_order=self.config.policy.deterministic):
            yield Update(
                end=message.sender,
                weights=as_arrays(message[MessageType.WEIGHTS]),
                count=float(message[MessageType.DATASET_SIZE]),
                version=plan.round,
                extra=as_arrays(message.get(MessageType.EXTRA) or {}),
            )
            del message

    def _state(self) -> State:
        """See :class:`Role`: also what the job's optimizer remembers."""
        state = super()._state()
        for part, arrays in (("optimizer", self._optimizer.state()), ("extra", self._extra)):
            state.arrays.update({f"{part}/{name}": array for name, array in arrays.items()})
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._extra = state.part("extra")
        optimizer = state.part("optimizer")
        if optimizer:
            self._optimizer.load_state(optimizer)

    def _gift(self) -> dict[Any, Any]:
        begun = self._table.plan is not None and self._table.plan.round > 0
        state = self._optimizer.state() if begun else {}
        return {**super()._gift(), MessageType.EXTRA: self._extra, STATE: state}

    def _receive(self, message: Message) -> None:
        super()._receive(message)
        self._extra = {name: np.array(array) for name, array in as_arrays(message[MessageType.EXTRA]).items()}
        state = message[STATE]
        if state:
            self._optimizer.load_state({name: np.array(array) for name, array in state.items()})

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_ELECT, TAG_HANDOVER]
