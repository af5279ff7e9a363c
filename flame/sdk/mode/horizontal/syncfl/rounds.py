"""What aggregators of every tier do in a round: give out a model, fold in what comes back.

**Memory.** The weights are encoded once a round, for all receivers, as views of the model. An update is folded into
the optimizer's accumulator when it arrives and forgotten. So an aggregator holds the model, the accumulator and one
update, however many trainers there are; what has not been received yet waits in its sender.

**Trees.** Those who answer may be trainers, or aggregators that speak for trainers of their own. Such an answer says how
many trainers it stands for, and ``minTrainers`` counts trainers, wherever they are. A round's deadline goes down the tree as
the time that is left, a tenth less at each tier, so that what was collected below is in time above. Only the top judges
whether a round has enough: an aggregator below it that has nobody says so at once, and is asked again, with the time that
it may wait for somebody, when the round would fail without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

from flame.errors import DeadlineExceeded, WorkerError
from flame.sdk import datasamplers, optimizers
from flame.sdk.channel import VAL_CH_STATE_SEND, Channel
from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.datasamplers.base import AggregatorSampler
from flame.sdk.mode.farewell import say_done
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import Role
from flame.sdk.optimizers.base import Optimizer, Update, trainers_of
from flame.sdk.selectors import selectors
from flame.sdk.selectors.base import PROP_ROUND_DURATION, PROP_STAT_UTILITY
from flame.sdk.weights import as_arrays

log = logging.getLogger(__name__)

TAG_DISTRIBUTE = "distribute"
TAG_AGGREGATE = "aggregate"

#: The end's property under which its unanswered round is noted, with the attempt of the worker that owes it.
PROP_BUSY = "busy"
#: What is left of a deadline that is over, to take what has arrived by then.
LAST_LOOK_SECONDS = 1.0

#: Small values beside a model on its way down: seconds left for the round; seconds to wait for trainers if there are none; whether to wait
#: for all that the group has.
TOLD_SECONDS = "seconds"
TOLD_PATIENCE = "patience"
TOLD_WHOLE = "whole"
#: A small value beside an update on its way up: whether this end has more for the round.
TOLD_MORE = "more"


class Tally:
    """Who takes part in a round and what has become of them.

    :param deadline: by :func:`time.monotonic`; None: there is none.
    :ivar pending: who owes an update.
    :ivar visits: of those who were given the round, how often each had come by then: an update may be lost with a broken connection.
    :ivar folded: who has given theirs.
    :ivar partial: who has given a part of theirs.
    :ivar empty: aggregators that had nobody.
    :ivar asked_again: those of them that were told to wait for somebody.
    :ivar trainers: how many trainers the folded updates stand for.
    :ivar samples: how many samples they stand for.
    :ivar target: how many answers are enough.
    """

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.pending: set[str] = set()
        self.visits: dict[str, int] = {}
        self.folded: list[str] = []
        self.refused: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.partial: set[str] = set()
        self.empty: list[str] = []
        self.asked_again: set[str] = set()
        self.trainers = 0
        self.samples = 0.0
        self.target = 0

    def left(self) -> float | None:
        """Seconds to the deadline; None: there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def answered(self) -> int:
        """How many have given their update, good or not."""
        return len(self.folded) + len(self.refused) + len(self.empty)


class Busy(NamedTuple):
    """What an end owes: an update for a round; and which attempt of the worker owes it."""

    round: int
    attempt: int


class RoundAggregator(Role):
    """Base of the aggregators of all tiers."""

    _optimizer: Optimizer
    _datasampler: AggregatorSampler
    _outgoing: dict[Any, Any] | None = None
    _tally: Tally
    _started: float = 0.0
    _met: bool = False
    _tries: int = 0  # how many rounds were begun anew
    _again: float = 0.0  # this one was: how long to wait for all, in seconds
    _known_order: dict[str, tuple[str, str]]  # of all that were ever seen, as one that has left is not known any more

    def internal_init(self) -> None:
        """See :class:`Role`; also makes the optimizer."""
        self._over_select()
        super().internal_init()
        self._optimizer = optimizers.make(self.config.optimizer.sort, self.config.optimizer.kwargs)
        chosen = self.config.datasampler
        datasampler = datasamplers.make(chosen.sort, chosen.kwargs)
        self._datasampler = datasampler.aggregator_data_sampler
        if self.config.policy.deterministic:
            self._warn_of_clocks(datasampler.timed)
        self._met = False
        self._known_order = {}

    def _warn_of_clocks(self, datasampler: bool) -> None:
        """Say what makes a deterministic job depend on how long things take.

        :param datasampler: whether the datasampler does.
        """
        config = self.config
        chosen = {each.sort for each in (config.selector, *(one.selector for one in config.channels.values())) if each}
        timed = sorted(f"the selector {sort}" for sort in chosen if getattr(selectors.load(sort), "timed", False))
        timed += [f"the datasampler {config.datasampler.sort}"] if datasampler else []
        if timed:
            self.link.warning(
                f"{' and '.join(timed)} depends on how long things take: policy.deterministic cannot make two runs equal here."
            )

    def _state(self) -> State:
        """See :class:`Role`: what the optimizer, the datasampler and the selectors remember."""
        state = super()._state()
        state.arrays.update({f"optimizer/{name}": array for name, array in self._optimizer.state().items()})
        further = {"datasampler": self._datasampler.state(), "selectors": self.cm.selector_states()}
        state.values.update({name: value for name, value in further.items() if value})
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        optimizer = state.part("optimizer")
        if optimizer:
            self._optimizer.load_state(optimizer)
        if "datasampler" in state.values:
            self._datasampler.load_state(state.values["datasampler"])
        self.cm.load_selector_states(state.values.get("selectors", {}))

    def _over_select(self) -> None:
        """Let selectors that choose a number of trainers choose ``overSelection`` times as many."""
        factor = self.config.policy.over_selection
        chosen = [self.config.selector, *(channel.selector for channel in self.config.channels.values())]
        for selector in chosen:
            if factor > 1 and selector is not None and isinstance(selector.kwargs.get("k"), int):
                selector.kwargs["k"] = math.ceil(selector.kwargs["k"] * factor)

    def get(self, tag: str) -> None:
        """What the tasklet ``aggregate`` does."""
        if tag == TAG_AGGREGATE:
            self._aggregate_weights(tag)

    def put(self, tag: str) -> None:
        """What the tasklet ``distribute`` does."""
        if tag == TAG_DISTRIBUTE:
            self._distribute_weights(tag)

    def _aggregate_weights(self, tag: str) -> None:
        raise NotImplementedError

    def _distribute_weights(self, tag: str) -> None:
        raise NotImplementedError

    @property
    def _mark(self) -> int | str:
        """What this process's rounds are known by; an update brings it back. A successor has another one, and a round that is begun anew."""
        return f"{self.attempt}+{self._tries}" if self._tries else self.attempt

    # A round's beginning.

    def _open_round(self, channel: Channel, weights: Mapping[str, Any], seconds: float | None) -> None:
        """Begin a round from ``weights``; nobody has them yet.

        :param seconds: the longest that the round may take; None: as long as it takes.
        """
        channel.set_property("round", self._round)
        self._seed_round(self._round)
        self._started = time.monotonic()
        self._tally = Tally(None if seconds is None else self._started + seconds)
        self._optimizer.begin(weights, self._round)
        self._outgoing = {MessageType.WEIGHTS: weights, MessageType.ROUND: self._round}

    def _give_to(self, channel: Channel, chosen: list[str]) -> None:
        """Give the round to those who were chosen for it."""
        assert self._outgoing is not None
        told = self._datasampler.get_metadata(self._round, chosen)
        if told:
            self._outgoing[MessageType.DATASAMPLER_METADATA] = told
        plain = self.config.policy.deterministic or not data_at(channel, chosen)
        over = 1.0 if plain else self.config.policy.over_selection
        self._tally.target = max(math.ceil(len(chosen) / over), min(self.config.policy.min_trainers, len(chosen)))
        self._give(channel, chosen)

    def _idle(self, channel: Channel) -> list[str]:
        """Who is there and owes no update. One that has arrived too late is thrown away here."""
        idle = []
        for end in channel.all_ends():
            if (there := channel.member(end)) is not None:
                self._known_order[end] = (there.order, end)
            busy, member = channel.get_end_property(end, PROP_BUSY), channel.member(end)
            if busy is not None and (member is None or busy.attempt == member.attempt):
                if channel.is_rxq_empty(end):
                    continue
                channel.drain([end])
                channel.set_end_property(end, PROP_BUSY, None)
            idle.append(end)
        return idle

    def _choose(self, channel: Channel) -> list[str]:
        """Whom the selector wants, among those that have nothing to do."""
        idle = self._idle(channel)
        wanted = channel.ends(VAL_CH_STATE_SEND)
        free = set(idle)
        return [end for end in wanted if end in free] or idle[: max(len(wanted), 1)]

    def _give(self, channel: Channel, ends: list[str], patience: float = 0.0) -> None:
        """Send the round's model to some ends, which then owe an update.

        :param patience: how long one that is an aggregator and has nobody may wait for somebody, in seconds.
        """
        assert self._outgoing is not None
        for end in ends:
            member = channel.member(end)
            channel.set_end_property(end, PROP_BUSY, Busy(self._round, member.attempt if member else 1))
            if member is not None:
                self._known_order[end] = order_of(channel, end)
        left = self._tally.left()
        further = ((TOLD_SECONDS, left), (TOLD_PATIENCE, patience or self._again), (TOLD_WHOLE, self._again > 0))
        told = {key: value for key, value in further if value}
        outgoing = {**self._outgoing, MessageType.METADATA: told} if told else self._outgoing
        visits = channel.visits()
        self._tally.visits.update({end: visits.get(end, 0) for end in ends})
        failed = channel.broadcast(outgoing, ends, left, kind="weights", metadata={"as": self._mark})
        self._tally.lost.update(failed)
        self._tally.pending.update(end for end in ends if end not in failed)

    # A round's end.

    def _gather(self, channel: Channel, least: int, patience: float) -> bool:
        """Fold updates in until the round is complete.

        :param least: how many trainers' updates make a round.
        :param patience: how long to wait for others to come in when there are fewer, in seconds.
        :returns: whether there are enough.
        """
        tally = self._tally
        while True:
            if self.config.policy.deterministic:
                self._collect_in_order(channel, tally)
            else:
                self._collect(channel, tally)
            if self._make_up(channel, tally):
                continue
            if tally.trainers >= least:
                break
            if self._begin_again(channel, patience):
                tally = self._tally
            elif not self._recruit(channel, tally, least, 0.0 if self._again else patience):
                return False
        for end in tally.pending:
            log.info("Round %d goes on without %s.", self._round, end)
        return True

    def _begin_again(self, channel: Channel, patience: float) -> bool:
        """For the top: too few updates have come because somebody was lost further down; whether the round was given to all anew.

        :param patience: how long to wait for those who come in the place of the lost, in seconds.
        """
        return False

    def _make_up(self, channel: Channel, tally: Tally) -> bool:
        """For topologies that can give lost ends' work to others: whether it was done."""
        return False

    def _collect(self, channel: Channel, tally: Tally) -> None:
        """Fold updates in as they arrive, until enough are here, or nobody is waited for, or the time is over."""
        while tally.pending and tally.answered < tally.target:
            # Those who are late from an earlier round are listened to as well: they are free once they have answered.
            late = [end for end in channel.all_ends() if channel.get_end_property(end, PROP_BUSY) is not None]
            try:
                asked = [*tally.pending, *late]
                for message, (end, _) in channel.recv_fifo(asked, timeout=tally.left(), visits=tally.visits):
                    self._take(channel, tally, end, message)
                    del message  # its memory is free before the next one is received
                    if not tally.pending or tally.answered >= tally.target:
                        break
            except DeadlineExceeded:
                return

    def _collect_in_order(self, channel: Channel, tally: Tally) -> None:
        """Fold updates in the order of the ends' ids, whenever they arrive; the others wait in their senders."""
        last_look = LAST_LOOK_SECONDS
        order = self._known_order
        for end in sorted([*tally.pending, *self._missed(channel)], key=lambda end: order.get(end, ("", end))):
            if end not in tally.pending:
                self._call_back(channel, tally, end)
            while end in tally.pending:
                left = tally.left()
                begun = time.monotonic()
                try:
                    message, _ = channel.recv(end, last_look if left == 0 else left, tally.visits)
                except DeadlineExceeded:
                    if left == 0:
                        last_look = max(0.0, last_look - (time.monotonic() - begun))
                    break
                lost = message is None
                self._take(channel, tally, end, message)
                del message
                if lost:
                    self._call_back(channel, tally, end)

    def _missed(self, channel: Channel) -> list[str]:
        """Who was to take part in this round, could not be given it, and may be replaced."""
        return [end for end in self._tally.lost if self._may_return(channel)]

    def _may_return(self, channel: Channel) -> bool:
        return self._strict and self.config.restart.of(channel.other_role()).attempts > 0

    def _call_back(self, channel: Channel, tally: Tally, end: str) -> None:
        """An end has left that a deterministic round cannot do without: wait for who takes its place, and give it the round."""
        if not self._may_return(channel) or end in tally.partial:  # a part of its update cannot be taken back
            return
        deadline = time.monotonic() + self.config.policy.join_deadline
        seen: int | None = None  # a broken connection may look whole for a moment: then it has to come anew
        while end not in tally.pending and (left := deadline - time.monotonic()) > 0:
            limit = tally.left()
            if not self.wait_for(
                channel,
                partial(self._there_anew, channel, end, seen),
                lambda: f"the successor of {end} in round {self._round}",
                left if limit is None else min(left, limit),
            ):
                return
            lost = tally.lost.pop(end, None)
            seen = channel.visits().get(end)
            self._give_again(channel, end)
            if end not in tally.pending and end not in tally.lost:  # it was not tried
                tally.lost[end] = lost or "left"
                return

    @staticmethod
    def _there_anew(channel: Channel, end: str, seen: int | None) -> bool:
        return channel.has(end) and channel.visits().get(end) != seen

    def _give_again(self, channel: Channel, end: str) -> None:
        """Give the round to one that has come in the place of one that had it."""
        self._give(channel, [end])

    def _take(self, channel: Channel, tally: Tally, end: str, message: Message | None) -> None:
        """One end has answered, or has left (no message)."""
        if message is None:
            if end in tally.pending:
                tally.pending.discard(end)
                tally.lost[end] = "left"
            return
        current = self._is_current(message)
        told = message.get(MessageType.METADATA) or {}
        more = bool(told.get(TOLD_MORE))
        if not more and (end not in tally.pending or current):
            channel.set_end_property(end, PROP_BUSY, None)
        if not current:
            log.info("An update of round %s from %s came in round %d and is dropped.", message.round, end, self._round)
            return
        if not more:
            tally.pending.discard(end)
        try:
            self._note(channel, end, message)
            update = self._update(end, message)
            if update.count > 0:
                self._optimizer.fold(update)
                tally.samples += update.count
            trainers = trainers_of(update)
            tally.trainers += trainers
            if more:
                tally.partial.add(end)
            else:
                (tally.folded if trainers or end in tally.partial else tally.empty).append(end)
            self._folded(channel, tally)
        except WorkerError as error:
            tally.pending.discard(end)
            tally.refused[end] = error.message
            self.link.warning(f"Round {self._round}: {error.message}")

    def _folded(self, channel: Channel, tally: Tally) -> None:
        """For aggregators that do something after each update."""

    def _note(self, channel: Channel, end: str, message: Message) -> None:
        """Keep what selectors and the datasampler want to know of an end."""
        channel.set_end_property(end, PROP_ROUND_DURATION, time.monotonic() - self._started)
        utility = message.get(MessageType.STAT_UTILITY)
        if isinstance(utility, int | float):
            channel.set_end_property(end, PROP_STAT_UTILITY, float(utility))
        told = message.get(MessageType.DATASAMPLER_METADATA)
        if isinstance(told, dict):
            self._datasampler.handle_metadata_from_trainer(told, end, channel)

    def _is_current(self, message: Message) -> bool:
        """Whether a message answers what this process has given out in this round."""
        mine: bool = message.metadata.get("of", self._mark) == self._mark
        return mine and bool(message.get(MessageType.ROUND, self._round) == self._round)

    def _update(self, end: str, message: Message) -> Update:
        """The optimizer's view of a message.

        :raises flame.errors.WorkerError: the message is no update.
        """
        weights, count = message.get(MessageType.WEIGHTS), message.get(MessageType.DATASET_SIZE, 0)
        if not isinstance(weights, dict) or not isinstance(count, int | float):
            raise WorkerError(f"What {end} sent is no update: it has no weights, or its dataset_size is no number.")
        return Update(
            end=end,
            weights=as_arrays(weights),
            count=count,
            version=message.get(MessageType.MODEL_VERSION, self._round),
            extra=as_arrays(message.get(MessageType.EXTRA) or {}),
            metadata=message.get(MessageType.METADATA) or {},
        )

    def _recruit(self, channel: Channel, tally: Tally, least: int, patience: float) -> bool:
        """Too few updates: give the round to who comes in while there is time. Whether it was given to somebody."""
        asked = {*tally.folded, *tally.refused, *tally.pending, *tally.empty}

        def newcomers() -> list[str]:
            return [end for end in self._idle(channel) if end not in asked]

        left = tally.left()
        if left is not None:
            patience = left
        nobody = [end for end in tally.empty if channel.has(end) and end not in tally.asked_again]
        if nobody and patience > 0 and not newcomers():
            tally.empty = [end for end in tally.empty if end not in nobody]
            tally.asked_again.update(nobody)
            tally.target = tally.answered + len(nobody)
            self._give(channel, nobody, patience)
            return True
        hopeless = patience == 0 or bool(tally.asked_again)
        hopeless = hopeless or (bool(tally.refused) and not tally.lost and not tally.pending)
        missing = least - tally.trainers
        if not hopeless and self.wait_for(
            channel,
            lambda: bool(newcomers()),
            lambda: f"{missing} more of at least {least} workers of role {channel.other_role()} in round {self._round}",
            patience,
        ):
            tally.target = max(tally.target, tally.answered + missing)
            self._give(channel, newcomers())
            return True
        return False

    # At the end.

    def inform_end_of_training(self) -> None:
        """Tell all who wait for a model that the work is done."""
        channel = self.channel(TAG_DISTRIBUTE)
        # A successor: some may wait for it since its predecessor was lost; or all have heard it already.
        say_done(channel, self.config.peers.get(channel.name(), 0) if self.attempt > 1 else 0)


def order_of(channel: Channel, end: str) -> tuple[str, str]:
    """Where an end stands among the others, the same in every run of a job: ids of tasks differ from run to run."""
    member = channel.member(end)
    return (member.order if member else "", end)


def data_at(channel: Channel, ends: Collection[str] | None = None) -> bool:
    """Whether there is data at the other end of a channel (trainers) and not further down (aggregators).

    :param ends: look at these; None: at all that are there.
    """
    members = [channel.member(end) for end in (channel.all_ends() if ends is None else ends)]
    return any(member is not None and member.dials for member in members)
