"""The trainer of gossip learning: in each round it trains, and mixes its model with those of its neighbours.

    x_i' = sum_j W_ij (x_j after local training)

with the doubly stochastic weights of :mod:`flame.sdk.mode.gossip.graph`. No model is the model of all: they stay near each other, and their mean
goes the way that the mean of all trainings goes. Every member counts the same, whatever the number of its samples. The
hyperparameter ``graph`` says who is whose neighbour (``ring`` where it is not set); ``seed`` chooses the random one.

Who takes part in a round the members agree on as those of a ring do (:mod:`flame.sdk.mode.distributed.member`), by small messages;
models go to neighbours alone. What a neighbour would have counted that has left in the middle of a round counts for the member's own
model: so W stays doubly stochastic among those who are left.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu: Can decentralized algorithms outperform centralized algorithms? A case study for
decentralized parallel stochastic gradient descent. NeurIPS 2017, algorithm 1 (with the mix after the local steps).
"""

from __future__ import annotations

from flame.errors import WorkerError
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.member import Member
from flame.sdk.mode.distributed.peer import only_averages
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
    neighbours: list[str]

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
        assert self._update is not None
        me = self._table.me.end
        weights, _ = self._update
        graph = graph_of(self._graph, plan.ring, plan.round, self._seed)
        own, others = metropolis_weights(graph, me)
        layout = Layout(weights)
        mine = layout.runs(weights, me)
        check_finite(mine, me)
        mix = WeightedSum(layout.empty())
        in_order = self.config.policy.deterministic  # which costs the memory of all neighbours' models
        kept = {}
        self._table.channel.set_property("round", plan.round)
        for message in self._table.exchange(graph[me], {MessageType.WEIGHTS: weights}):
            try:
                theirs = layout.runs(as_arrays(message[MessageType.WEIGHTS]), message.sender)
                check_finite(theirs, message.sender)
            except WorkerError as error:
                self.link.warning(f"Round {plan.round}: {error.message}")
                continue
            if in_order:
                kept[message.sender] = message, theirs
            else:
                mix.add(theirs, others.pop(message.sender))
            del message, theirs  # their memory is free before the next one is received
        for end in (each for each in graph[me] if each in kept):
            mix.add(kept[end][1], others.pop(end))
        self.neighbours = [end for end in graph[me] if end not in others]
        mix.add(mine, own + sum(others.values()))
        self._take_up(layout.weights(mix.divide()))
        self.is_committer = plan.ring[0] == me

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_GOSSIP]
