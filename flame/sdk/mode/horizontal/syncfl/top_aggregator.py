"""The aggregator of synchronous federated learning: give out the model, fold in what comes back, round by round.

**Memory.** The weights are encoded once a round, for all receivers, as views of the model. An update is folded into
the optimizer's accumulator when it arrives and forgotten. So the aggregator holds the model, the accumulator and one
update, however many trainers there are; what has not been received yet waits in its sender.

**Who takes part.** The first round waits for all trainers that the job has, at the longest ``joinDeadline``. Later rounds
go to those that the selector chooses among those that are there and do not still work on an older round. A trainer that
leaves during a round is not waited for, and one that is not ready at ``roundDeadline`` is left behind: its update is
known by its round and dropped when it comes, and it takes part again from then on. With fewer than ``minTrainers``
updates, others may still come in; when nobody does, the job fails with a :class:`flame.errors.RoundFailed`.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, NamedTuple

from flame.errors import DeadlineExceeded, RoundFailed, SpecError, WorkerError
from flame.sdk import datasamplers, modelfile, optimizers, privacy, registries
from flame.sdk.channel import VAL_CH_STATE_SEND, Channel
from flame.sdk.codec import Message
from flame.sdk.datasamplers.base import AggregatorSampler
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import Role
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.optimizers.base import Optimizer, Update
from flame.sdk.privacy.base import Privacy
from flame.sdk.registries.base import Registry
from flame.sdk.selectors.base import PROP_ROUND_DURATION, PROP_STAT_UTILITY
from flame.sdk.weights import as_arrays, get_weights, set_weights

log = logging.getLogger(__name__)

TAG_DISTRIBUTE = "distribute"
TAG_AGGREGATE = "aggregate"

#: The end's property under which its unanswered round is noted, with the attempt of the worker that owes it.
PROP_BUSY = "busy"
#: How long an end may take the word that the work is done, in seconds.
FAREWELL_SECONDS = 10.0
#: How long the end of a job may wait for its registry, and for the server to take the model, in seconds.
REGISTRY_SECONDS = 60.0
ARTIFACT_SECONDS = 600.0
#: What is left of a deadline that is over, to take what has arrived by then.
LAST_LOOK_SECONDS = 1.0


class _Tally:
    """Who takes part in a round and what has become of them."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.pending: set[str] = set()
        self.folded: list[str] = []
        self.refused: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.target = 0

    def left(self) -> float | None:
        """Seconds to the deadline; None: there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def answered(self) -> int:
        """How many have given their update, good or not."""
        return len(self.folded) + len(self.refused)


class _Busy(NamedTuple):
    round: int
    attempt: int


def _order(channel: Channel, end: str) -> tuple[str, str]:
    """Where an end stands among the others, the same in every run of a job: ids of tasks differ from run to run."""
    member = channel.member(end)
    return (member.order if member else "", end)


class TopAggregator(Role):
    """Aggregates the trainers' models and ends the job.

    The user writes ``load_data`` (data to evaluate on, if any), ``initialize`` (which sets ``self.model``, the first global
    model) and ``evaluate``; ``train`` may change the aggregated model, and does nothing where it is not written.
    """

    dataset: Any = None
    registry_client: Registry
    _rounds: int = 1
    _optimizer: Optimizer
    _datasampler: AggregatorSampler
    _privacy: Privacy
    _outgoing: dict[Any, Any] | None = None
    _tally: _Tally
    _started: float = 0.0
    _met: bool = False

    def internal_init(self) -> None:
        """See :class:`Role`; also makes the optimizer and opens the registry."""
        self._over_select()
        super().internal_init()
        self._rounds = int(self.config.hyperparameters.rounds)
        self._optimizer = optimizers.make(self.config.optimizer.sort, self.config.optimizer.kwargs)
        chosen = self.config.datasampler
        self._datasampler = datasamplers.make(chosen.sort, chosen.kwargs).aggregator_data_sampler
        self._privacy = privacy.make(self.config.privacy.sort, self.config.privacy.kwargs)
        if not self._privacy.affords():
            raise SpecError("The privacy's budget is less than one round costs: raise it, or the noise.", "privacy")
        self._met = False
        self.registry_client = registries.open_registry(self.config, self.link)
        self.registry_client.save_params(self.config.hyperparameters.dict())

    def _over_select(self) -> None:
        """Let selectors that choose a number of trainers choose ``overSelection`` times as many."""
        factor = self.config.policy.over_selection
        chosen = [self.config.selector, *(channel.selector for channel in self.config.channels.values())]
        for selector in chosen:
            if factor > 1 and selector is not None and isinstance(selector.kwargs.get("k"), int):
                selector.kwargs["k"] = math.ceil(selector.kwargs["k"] * factor)

    def train(self) -> None:
        """For the user: train the aggregated model. Does nothing where it is not written."""

    def get(self, tag: str) -> None:
        """What the tasklet ``aggregate`` does."""
        if tag == TAG_AGGREGATE:
            self._aggregate_weights(tag)

    def put(self, tag: str) -> None:
        """What the tasklet ``distribute`` does."""
        if tag == TAG_DISTRIBUTE:
            self._distribute_weights(tag)

    def load_base_model(self) -> None:
        """Begin from the registered model that the job names, whatever ``initialize`` has made.

        :raises flame.errors.WorkerError: there is no such model, or it does not fit ``self.model``.
        """
        base = self.config.base_model
        if base:
            weights = self.registry_client.load_model(base.name, base.version)
            if self.model is None:
                self.model = weights
            else:
                set_weights(self.model, weights)

    # A round's beginning.

    def _distribute_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        channel.set_property("round", self._round)
        self._await_trainers(channel)
        self._started = time.monotonic()
        deadline = self.config.policy.round_deadline
        self._tally = _Tally(None if deadline is None else self._started + deadline)
        weights = get_weights(self.model)
        self._optimizer.begin(weights, self._round)
        self._outgoing = {MessageType.WEIGHTS: weights, MessageType.ROUND: self._round}
        extra = self._optimizer.extra()
        if extra:
            self._outgoing[MessageType.EXTRA] = extra
        chosen = self._choose(channel)
        told = self._datasampler.get_metadata(self._round, chosen)
        if told:
            self._outgoing[MessageType.DATASAMPLER_METADATA] = told
        over = 1.0 if self.config.policy.deterministic else self.config.policy.over_selection
        self._tally.target = max(math.ceil(len(chosen) / over), min(self.config.policy.min_trainers, len(chosen)))
        self._give(channel, chosen)

    def _await_trainers(self, channel: Channel) -> None:
        """Wait until there are enough trainers that have nothing to do."""
        policy = self.config.policy
        least = policy.min_trainers
        expected = least if self._met else max(least, self.config.peers.get(channel.name(), least))
        enough = self.wait_for(
            channel,
            lambda: len(self._idle(channel)) >= expected,
            lambda: f"{expected - len(self._idle(channel))} more of {expected} workers of role {channel.other_role()}",
            policy.join_deadline,
        )
        self._met = True
        there = len(self._idle(channel))
        if there < least:
            raise RoundFailed(
                f"Round {self._round} cannot begin: {there} of at least {least} workers of role {channel.other_role()} "
                f"(policy.minTrainers) were ready within {policy.join_deadline:g} s (policy.joinDeadline)."
            )
        if not enough:
            self.link.warning(
                f"Round {self._round} begins with {there} of {expected} workers of role {channel.other_role()}: "
                f"the others did not come within {policy.join_deadline:g} s (policy.joinDeadline)."
            )

    def _idle(self, channel: Channel) -> list[str]:
        """Who is there and owes no update. One that has arrived too late is thrown away here."""
        idle = []
        for end in channel.all_ends():
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

    def _give(self, channel: Channel, ends: list[str]) -> None:
        """Send the round's model to some ends, which then owe an update."""
        assert self._outgoing is not None
        for end in ends:
            member = channel.member(end)
            channel.set_end_property(end, PROP_BUSY, _Busy(self._round, member.attempt if member else 1))
        failed = channel.broadcast(self._outgoing, ends, self._tally.left(), kind="weights")
        self._tally.lost.update(failed)
        self._tally.pending.update(end for end in ends if end not in failed)

    # A round's end.

    def _aggregate_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        tally = self._tally
        least = self.config.policy.min_trainers
        while True:
            if self.config.policy.deterministic:
                self._collect_in_order(channel, tally)
            else:
                self._collect(channel, tally)
            if len(tally.folded) >= least:
                break
            self._recruit(channel, tally, least)
        for end in tally.pending:
            log.info("Round %d goes on without %s.", self._round, end)
        self._outgoing = None
        set_weights(self.model, self._optimizer.finish())
        self._privacy.step()
        self.update_metrics(self._privacy.metrics())

    def _collect(self, channel: Channel, tally: _Tally) -> None:
        """Fold updates in as they arrive, until enough are here, or nobody is waited for, or the time is over."""
        while tally.pending and tally.answered < tally.target:
            # Those who are late from an earlier round are listened to as well: they are free once they have answered.
            late = [end for end in channel.all_ends() if channel.get_end_property(end, PROP_BUSY) is not None]
            try:
                for message, (end, _) in channel.recv_fifo([*tally.pending, *late], timeout=tally.left()):
                    self._take(channel, tally, end, message)
                    del message  # its memory is free before the next one is received
                    if not tally.pending or tally.answered >= tally.target:
                        break
            except DeadlineExceeded:
                return

    def _collect_in_order(self, channel: Channel, tally: _Tally) -> None:
        """Fold updates in the order of the ends' ids, whenever they arrive; the others wait in their senders."""
        last_look = LAST_LOOK_SECONDS
        for end in sorted(tally.pending, key=lambda end: _order(channel, end)):
            while end in tally.pending:
                left = tally.left()
                begun = time.monotonic()
                try:
                    message, _ = channel.recv(end, last_look if left == 0 else left)
                except DeadlineExceeded:
                    if left == 0:
                        last_look = max(0.0, last_look - (time.monotonic() - begun))
                    break
                self._take(channel, tally, end, message)
                del message

    def _take(self, channel: Channel, tally: _Tally, end: str, message: Message | None) -> None:
        """One end has answered, or has left (no message)."""
        if message is None:
            if end in tally.pending:
                tally.pending.discard(end)
                tally.lost[end] = "left"
            return
        current = self._is_current(message)
        if end not in tally.pending or current:
            channel.set_end_property(end, PROP_BUSY, None)
        if not current:
            log.info("An update of round %s from %s came in round %d and is dropped.", message.round, end, self._round)
            return
        tally.pending.discard(end)
        try:
            self._note(channel, end, message)
            update = self._update(end, message)
            if update.count > 0:
                self._optimizer.fold(update)
            tally.folded.append(end)
        except WorkerError as error:
            tally.refused[end] = error.message
            self.link.warning(f"Round {self._round}: {error.message}")

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
        mine: bool = message.metadata.get("of", self.attempt) == self.attempt
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

    def _recruit(self, channel: Channel, tally: _Tally, least: int) -> None:
        """Too few updates: give the round to trainers that come in while there is time.

        :raises flame.errors.RoundFailed: nobody comes, or nobody is missing who could.
        """
        asked = {*tally.folded, *tally.refused, *tally.pending}

        def newcomers() -> list[str]:
            return [end for end in self._idle(channel) if end not in asked]

        left = tally.left()
        patience = self.config.policy.join_deadline if left is None else left
        hopeless = left == 0 or (bool(tally.refused) and not tally.lost and not tally.pending)
        missing = least - len(tally.folded)
        if not hopeless and self.wait_for(
            channel,
            lambda: bool(newcomers()),
            lambda: f"{missing} more of at least {least} workers of role {channel.other_role()} in round {self._round}",
            patience,
        ):
            tally.target = max(tally.target, least)
            self._give(channel, newcomers())
            return
        details = [f"{end}: {reason}" for end, reason in {**tally.lost, **tally.refused}.items()]
        details += [f"{end}: no update in time" for end in sorted(tally.pending)]
        raise RoundFailed(
            f"Round {self._round} has {len(tally.folded)} of at least {least} updates (policy.minTrainers)"
            + (f" after {self.config.policy.round_deadline:g} s (policy.roundDeadline)" if left is not None else "")
            + (f". {'; '.join(details[:3])}." if details else ".")
        )

    # After a round, and at the end.

    def save_metrics(self) -> None:
        """Report the round with what :meth:`update_metrics` was told in it."""
        metrics = self.take_metrics()
        self.link.round(self._round, metrics, time.monotonic() - self._started)
        self.registry_client.save_metrics(self._round, metrics)

    def increment_round(self) -> None:
        """Go on to the next round; the work is done after the last one."""
        self._round += 1
        self._work_done = self._round > self._rounds
        if not self._work_done and not self._privacy.affords():
            self._work_done = True
            self.link.warning(f"The work ends before round {self._round}, which would exceed the privacy's budget.")

    def inform_end_of_training(self) -> None:
        """Tell all trainers that the work is done."""
        channel = self.channel(TAG_DISTRIBUTE)
        failed = channel.broadcast({MessageType.EOT: True}, timeout=FAREWELL_SECONDS, kind="eot")
        for end, reason in failed.items():
            log.info("%s was not told that the work is done: it %s.", end, reason)

    def save_model(self) -> None:
        """Hand the model to the registry and, as ``model.safetensors``, to the server."""
        config = self.config
        weights = get_weights(self.model)
        path = self.link.folder / "model.safetensors"
        about = {
            "job": config.job.job_id,
            "name": config.job.name,
            "rounds": str(self._round - 1),
            "schema": config.schema,
        }
        modelfile.save(path, weights, about)
        self.registry_client.save_model(config.job.name, self.model, path)
        kept = self.link.artifact(path.name, path, ARTIFACT_SECONDS)
        version = self.registry_client.finish(REGISTRY_SECONDS)
        self.link.model(
            {
                "name": config.job.name,
                "path": kept,
                "uri": version.uri if version else None,
                "version": version.version if version else None,
                "registry": self.registry_client.sort,
            }
        )

    def close(self) -> None:
        """See :class:`Role`."""
        if "registry_client" in self.__dict__:
            self.registry_client.close()
        super().close()

    def compose(self) -> None:
        """Put the workflow together: load_data, initialize, then in each round distribute, aggregate, train, evaluate,
        save_metrics; at the end inform the trainers and save the model.
        """
        with Composer() as composer:
            self.composer = composer
            internal_init = Tasklet("internal_init", self.internal_init)
            load_data = Tasklet("load_data", self.load_data)
            initialize = Tasklet("initialize", self.initialize)
            base_model = Tasklet("load_base_model", self.load_base_model)
            distribute = Tasklet("distribute", self.put, TAG_DISTRIBUTE)
            aggregate = Tasklet("aggregate", self.get, TAG_AGGREGATE)
            train = Tasklet("train", self.train)
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
            >> base_model
            >> loop(distribute >> aggregate >> train >> evaluate >> save_metrics >> inc_round)
            >> inform
            >> save_model
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_DISTRIBUTE, TAG_AGGREGATE]
