"""The aggregator between two tiers: it takes a model from above, has its group work on it, and answers with one update.

To its group it is an aggregator, to the tier above a trainer: which channel is which the function tags say (``fetch`` and
``upload`` on the upper one, ``distribute`` and ``aggregate`` on the lower one). So tiers can be put on one another to any
depth, by the schema alone.

It needs no model of its own: what it was given goes on as it lies in the received message, and what it makes of the
group's updates (:meth:`flame.sdk.optimizers.base.Optimizer.middle`) goes up and is forgotten. Whether a round has enough updates
is for the top to judge; see :mod:`flame.sdk.mode.horizontal.syncfl.rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.sdk import optimizers
from flame.sdk.channel import Channel
from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.config import Config
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.follower import TAG_FETCH, TAG_UPLOAD, Follower
from flame.sdk.mode.horizontal.syncfl.rounds import (
    TAG_AGGREGATE,
    TAG_DISTRIBUTE,
    TOLD_PATIENCE,
    TOLD_SECONDS,
    TOLD_WHOLE,
    RoundAggregator,
)
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.optimizers.base import TOLD_POPULATION, TOLD_TRAINERS, Update, population_of
from flame.sdk.weights import as_arrays, set_weights

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TAG_FETCH", "TAG_UPLOAD", "MiddleAggregator"]

#: The share of the time left for a round that a tier has for itself; with the rest its update goes up.
SHARE = 0.9


class MiddleAggregator(RoundAggregator, Follower):
    """Aggregates its group for the tier above. There is nothing that a user must write.

    Where ``initialize`` sets ``self.model``, it holds the group's model after each round, for ``evaluate`` to look at.
    """

    _given: Mapping[str, Any] = {}
    _extra: Mapping[str, Any] = {}
    _seconds: float | None = None
    _patience: float = 0.0
    _present: int | None = None  # how many the group has, where some did not come
    _seen: dict[str, tuple[int, float]]
    _sent: tuple[int, float] = (0, 0.0)  # trainers and samples of this round that the tier above has heard of

    def __init__(self, config: Config) -> None:
        self.config = config

    def internal_init(self) -> None:
        """See :class:`Role`."""
        super().internal_init()
        chosen = self.config.optimizer
        self._optimizer = optimizers.make(chosen.sort, chosen.kwargs).middle()
        self._seen = {}

    def _state(self) -> State:
        """See :class:`Role`: also who was seen."""
        state = super()._state()
        if self._seen:
            state.values["seen"] = self._seen
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._seen = {end: (number, samples) for end, (number, samples) in state.values.get("seen", {}).items()}

    def initialize(self) -> None:
        """For the user: make a model, if the group's is to be evaluated. Does nothing where it is not written."""

    def get(self, tag: str) -> None:
        """What the tasklets ``fetch`` and ``aggregate`` do."""
        if tag == TAG_FETCH:
            self._fetch_weights(tag)
        super().get(tag)

    def put(self, tag: str) -> None:
        """What the tasklets ``distribute`` and ``upload`` do."""
        if tag == TAG_UPLOAD:
            self._send_weights(tag)
        super().put(tag)

    @property
    def _mark(self) -> int | str:
        """See :class:`RoundAggregator`: also another one when what is above has been started anew."""
        return f"{self._source_mark}/{self.attempt}"

    def _fetch_weights(self, tag: str) -> None:
        message = self._newest(self.channel(tag))
        if message.get(MessageType.EOT):
            self._work_done = True
            return
        self._accept(message)

    def _accept(self, message: Message) -> None:
        """Take up a round."""
        self._round = message[MessageType.ROUND]
        self._recall(self._round)
        self._given = as_arrays(message[MessageType.WEIGHTS])
        self._extra = message.get(MessageType.EXTRA) or {}
        told = message.get(MessageType.METADATA) or {}
        self._seconds = told.get(TOLD_SECONDS)
        self._patience = float(told.get(TOLD_PATIENCE, 0.0))
        self._again = self._patience if told.get(TOLD_WHOLE) else 0.0
        self._sent = 0, 0.0

    def _distribute_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        self._open_round(channel, self._given, None if self._seconds is None else SHARE * self._seconds)
        assert self._outgoing is not None
        if self._extra:
            self._outgoing[MessageType.EXTRA] = self._extra
        self._await_group(channel)
        self._give_to(channel, self._choose(channel))

    def _await_group(self, channel: Channel) -> None:
        """Before the first round wait for the whole group; later only where the top cannot do without somebody."""
        policy = self.config.policy
        whole = not self._met or self._may_return(channel) or self._again > 0
        job = self.config.peers.get(channel.name(), 1)
        everybody = job if self._present is None or self._again else self._present
        expected = max(1, everybody) if whole else 1
        longest = self._again or (policy.join_deadline if whole else self._patience)
        left = self._tally.left()
        enough = self.wait_for(
            channel,
            lambda: len(self._idle(channel)) >= expected,
            lambda: f"{expected - len(self._idle(channel))} more of {expected} workers of role {channel.other_role()}",
            longest if left is None else min(longest, left),
        )
        if not enough and whole:
            self.link.warning(
                f"Round {self._round} begins with {len(self._idle(channel))} of {expected} workers of role "
                f"{channel.other_role()} in group {channel.groupby()}: the others did not come within "
                f"{longest:g} s (policy.joinDeadline)."
            )
            self._present = len(self._idle(channel))
        self._met = True

    def _aggregate_weights(self, tag: str) -> None:
        self._gather(self.channel(tag), 1, self._patience)
        self._outgoing = None

    def _send_weights(self, tag: str) -> None:
        whole = self._sent == (0, 0.0)
        message = self._part()
        self._given = {}
        self._hand_in(self.channel(tag), message)
        weights = message[MessageType.WEIGHTS]
        if whole and weights and self.model is not None and not self._optimizer.differences:
            set_weights(self.model, weights)  # for `evaluate` to see

    def _part(self) -> dict[Any, Any]:
        """The update that stands for what was folded and not yet sent; without arrays where that is nothing."""
        tally = self._tally
        trainers, samples = tally.trainers - self._sent[0], tally.samples - self._sent[1]
        self._sent = tally.trainers, tally.samples
        weights, extra = self._optimizer.finish(), self._optimizer.extra()
        message: dict[Any, Any] = {
            MessageType.WEIGHTS: weights if samples else {},
            MessageType.DATASET_SIZE: samples,
            MessageType.MODEL_VERSION: self._round,
            MessageType.ROUND: self._round,
            MessageType.METADATA: {TOLD_TRAINERS: trainers, TOLD_POPULATION: self._population()},
        }
        if extra and samples:
            message[MessageType.EXTRA] = extra
        return message

    def _population(self) -> tuple[int, float]:
        """How many trainers were seen so far and how many samples they have, for algorithms that ask who did not take part."""
        return sum(number for number, _ in self._seen.values()), sum(samples for _, samples in self._seen.values())

    def _update(self, end: str, message: Message) -> Update:
        """See :class:`RoundAggregator`; also notes who was seen."""
        update = super()._update(end, message)
        self._seen[end] = population_of(update)
        return update

    def save_metrics(self) -> None:
        """Report what :meth:`update_metrics` was told in this round."""
        metrics = self.take_metrics()
        if metrics:
            self.link.metrics(self._round, metrics)

    def compose(self) -> None:
        """Put the workflow together: until the work is done fetch, distribute, aggregate, upload; then tell the group."""
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            fetch = Tasklet("fetch", self.get, TAG_FETCH)
            distribute = Tasklet("distribute", self.put, TAG_DISTRIBUTE)
            aggregate = Tasklet("aggregate", self.get, TAG_AGGREGATE)
            upload = Tasklet("upload", self.put, TAG_UPLOAD)
            evaluate = Tasklet("evaluate", self.evaluate)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            loop = Loop(loop_check_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> loop(fetch >> distribute >> aggregate >> upload >> evaluate >> save_metrics)
            >> inform
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_DISTRIBUTE, TAG_AGGREGATE, TAG_FETCH, TAG_UPLOAD]
