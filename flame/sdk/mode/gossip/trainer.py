"""The trainer of gossip learning: in each round it trains, and mixes its model with those of its neighbours.

    x_i' = sum_j W_ij (x_j after local training)

with the doubly stochastic weights of :mod:`flame.sdk.mode.gossip.graph`. No model is the model of all: they stay near each other, and their mean
goes the way that the mean of all trainings goes. Every member counts the same, whatever the number of its samples. The
hyperparameter ``graph`` says who is whose neighbour (``ring`` where it is not set); ``seed`` chooses the random one.

Who takes part in a round the members agree on as those of a ring do (:mod:`flame.sdk.mode.distributed.member`), by small messages;
models go to neighbours alone. In a deterministic job who is lost is waited for; those who have closed the round give their updates of it once more. In
others, what a neighbour would have counted that has left in the middle of a round counts for the member's own
model: so W stays doubly stochastic among those who are left.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu: Can decentralized algorithms outperform centralized algorithms? A case study for
decentralized parallel stochastic gradient descent. NeurIPS 2017, algorithm 1 (with the mix after the local steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flame.errors import WorkerError
from flame.sdk.checkpoints import State
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.carrier import Torn
from flame.sdk.mode.distributed.member import Member
from flame.sdk.mode.distributed.peer import Peer, only_averages
from flame.sdk.mode.gossip.graph import graph_of, metropolis_weights
from flame.sdk.mode.message import MessageType
from flame.sdk.optimizers.base import Optimizer
from flame.sdk.optimizers.layout import Layout
from flame.sdk.optimizers.sums import WeightedSum, check_finite
from flame.sdk.weights import as_arrays

TAG_GOSSIP = "gossip"


class Trainer(Member):
    """Trains on its own data, and mixes with its neighbours. See :class:`flame.sdk.mode.training.Training` for what the user writes.

    :ivar neighbours: the ends that it mixed with in the current round.
    """

    TAG = TAG_GOSSIP
    STEP = "gossip"
    OWN = True
    neighbours: list[str]
    _sent: Mapping[str, Any] = {}  # this member's update of the last round that it has closed, for those who have not
    _leader: str = ""  # whose model is the job's

    def internal_init(self) -> None:
        """See :class:`Role`; also looks at the graph."""
        super().internal_init()
        hyper = self.config.hyperparameters
        self._graph = hyper.get("graph", "ring")
        self._seed = int(hyper.get("seed", 0))
        graph_of(self._graph, [], 0, self._seed)
        self.neighbours = []

    def _use(self, optimizer: Optimizer) -> None:
        only_averages(optimizer, "Gossip")

    def _combine(self, plan: Plan) -> None:
        again = plan.round == self._done
        if again:
            weights = self._sent
        else:
            assert self._update is not None
            weights, _ = self._update
        me = self._table.me.end
        graph = graph_of(self._graph, plan.ring, plan.round, self._seed)
        own, others = metropolis_weights(graph, me)
        layout = Layout(weights)
        mine = layout.runs(weights, me)
        check_finite(mine, me)
        mix = WeightedSum(layout.empty())
        in_order = self.config.policy.deterministic  # which costs the memory of all neighbours' models
        kept, refused = {}, set[str]()
        self._table.channel.set_property("round", plan.round)
        for message in self._table.exchange(graph[me], {MessageType.WEIGHTS: weights}):
            try:
                theirs = layout.runs(as_arrays(message[MessageType.WEIGHTS]), message.sender)
                check_finite(theirs, message.sender)
            except WorkerError as error:
                self.link.warning(f"Round {plan.round}: {error.message}")
                refused.add(message.sender)
                continue
            if in_order:
                kept[message.sender] = message, theirs
            else:
                mix.add(theirs, others.pop(message.sender))
            del message, theirs  # their memory is free before the next one is received
        if self._strict and self._table.limit is None and set(graph[me]) - kept.keys() - refused:
            raise Torn
        if again:
            return
        for end in (each for each in graph[me] if each in kept):
            mix.add(kept[end][1], others.pop(end))
        self.neighbours = [end for end in graph[me] if end not in others]
        mix.add(mine, own + sum(others.values()))
        if self._strict:
            self._sent = {name: np.array(array) for name, array in as_arrays(weights).items()}
        self._leader = plan.ring[0]
        self._take_up(layout.weights(mix.divide()))
        self.is_committer = plan.ring[0] == me

    def _state(self) -> State:
        """See :class:`Role`: also what the others may want of the last round."""
        state = super()._state()
        state.arrays.update({f"sent/{name}": array for name, array in self._sent.items()})
        state.values["leader"] = self._leader
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._sent = {name: np.array(array) for name, array in state.part("sent").items()}
        self._leader = state.values.get("leader", "")

    def save_model(self) -> None:
        """See :class:`Member`. Whose model is the job's must not depend on who is lost in the end, so a deterministic job waits for that one."""
        if not self._strict or not self._leader:
            super().save_model()
            return
        while self._leader != self._table.me.end:
            done = self._table.await_farewell(self._leader, self.config.policy.join_deadline)
            if done:
                return
            if done is None:
                super().save_model()
                return
            self.inform_end_of_training()
        Peer.save_model(self)
        self._table.say_farewell()

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_GOSSIP]
