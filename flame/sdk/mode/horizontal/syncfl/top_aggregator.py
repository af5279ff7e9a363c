"""The top aggregator of synchronous federated learning: it begins and ends the rounds, and keeps the model.

How a round is given out and folded is in :mod:`flame.sdk.mode.horizontal.syncfl.rounds`; here is what only the top does.

**Who takes part.** The first round waits for all trainers that the job has, at the longest ``joinDeadline``. Later rounds
go to those that the selector chooses among those that are there and do not still work on an older round. A trainer that
leaves during a round is not waited for, and one that is not ready at ``roundDeadline`` is left behind: its update is
known by its round and dropped when it comes, and it takes part again from then on. With fewer than ``minTrainers``
updates, others may still come in; when nobody does, the job fails with a :class:`flame.errors.RoundFailed`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from flame.errors import RoundFailed, SpecError
from flame.sdk import privacy
from flame.sdk.channel import Channel
from flame.sdk.checkpoints import State
from flame.sdk.mode.composer import Composer
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE, RoundAggregator, Tally, data_at
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import SHORT_WAIT
from flame.sdk.mode.roundkeeper import RoundKeeper
from flame.sdk.mode.tasklet import Loop, Tasklet
from flame.sdk.privacy.base import Privacy
from flame.sdk.weights import get_weights, set_weights

__all__ = ["TAG_AGGREGATE", "TAG_DISTRIBUTE", "TopAggregator"]

log = logging.getLogger(__name__)


class TopAggregator(RoundKeeper, RoundAggregator):
    """Aggregates the trainers' models and ends the job.

    The user writes ``load_data`` (data to evaluate on, if any), ``initialize`` (which sets ``self.model``, the first global
    model) and ``evaluate``; ``train`` may change the aggregated model, and does nothing where it is not written.
    """

    dataset: Any = None
    _privacy: Privacy
    _until: float = 0.0  # by time.monotonic(), when it is too late to begin this round anew
    _present: int | None = None  # how many there were, where some of the job's trainers did not come or are given up

    def internal_init(self) -> None:
        """See :class:`Role`; also makes the optimizer and opens the registry."""
        self._privacy = privacy.make(self.config.privacy.sort, self.config.privacy.kwargs)
        if not self._privacy.affords():
            raise SpecError("The privacy's budget is less than one round costs: raise it, or the noise.", "privacy")
        super().internal_init()

    def train(self) -> None:
        """For the user: train the aggregated model. Does nothing where it is not written."""

    def _state(self) -> State:
        """See :class:`Role`: also what the privacy has cost, and how many trainers there are."""
        state = super()._state()
        state.values["present"] = self._present
        state.values["privacy"] = self._privacy.state()
        return state

    def _load(self, state: State) -> None:
        super()._load(state)
        self._present = state.values.get("present")
        self._privacy.load_state(state.values["privacy"])

    # A round.

    def _distribute_weights(self, tag: str) -> None:
        channel = self.channel(tag)
        self._again = 0.0
        self._await_trainers(channel)
        self._open_round(channel, get_weights(self.model), self.config.policy.round_deadline)
        extra = self._optimizer.extra()
        if extra:
            assert self._outgoing is not None
            self._outgoing[MessageType.EXTRA] = extra
        if self._strict:
            # Whoever has lost its connection since must not be missed in the choice; those who lose it afterwards are called back.
            with channel.still():
                self._await_trainers(channel)
                chosen = self._choose(channel)
        else:
            chosen = self._choose(channel)
        self._give_to(channel, chosen)

    def _await_trainers(self, channel: Channel) -> None:
        """Wait until there are enough trainers that have nothing to do."""
        policy = self.config.policy
        peers = self.config.peers.get(channel.name())

        def least() -> int:
            # Who trains is counted; of aggregators below nobody knows yet for how many trainers each one speaks.
            counted = peers is None or channel.empty() or data_at(channel)
            return policy.min_trainers if counted else 1

        def expected() -> int:
            if self._met and not self._may_return(channel):
                return least()
            return max(least(), peers or 0) if self._present is None else max(least(), self._present)

        enough = self.wait_for(
            channel,
            lambda: len(self._idle(channel)) >= expected(),
            lambda: (
                f"{expected() - len(self._idle(channel))} more of {expected()} workers of role {channel.other_role()}"
            ),
            policy.join_deadline,
        )
        there = len(self._idle(channel))
        if there < least():
            raise RoundFailed(
                f"Round {self._round} cannot begin: {there} of at least {least()} workers of role {channel.other_role()} "
                f"(policy.minTrainers) were ready within {policy.join_deadline:g} s (policy.joinDeadline)."
            )
        if not enough:
            self.link.warning(
                f"Round {self._round} begins with {there} of {expected()} workers of role {channel.other_role()}: "
                f"the others did not come within {policy.join_deadline:g} s (policy.joinDeadline)."
            )
            self._present = there
        self._met = True

    def _aggregate_weights(self, tag: str) -> None:
        least = self.config.policy.min_trainers
        if not self._gather(self.channel(tag), least, self.config.policy.join_deadline):
            raise self._too_few(least)
        self._outgoing = None
        self._kept.settle()
        set_weights(self.model, self._optimizer.finish())
        self._privacy.step()
        self.update_metrics(self._privacy.metrics())

    def _begin_again(self, channel: Channel, patience: float) -> bool:
        """See :class:`RoundAggregator`.

        A group whose trainer or aggregator was lost has answered with less, or with a part, which nobody can take out of the sum again. So all
        begin anew, and each group waits for all that it has.
        """
        tally = self._tally
        expected = self._present or self.config.peers.get(channel.name()) or 1
        if data_at(channel) or tally.left() is not None or tally.refused:
            return False
        if self._again == 0.0:
            self._until = time.monotonic() + patience
        left = self._until - time.monotonic()
        if left <= 0 or not self.wait_for_ends(channel, expected, left):
            return False
        chosen = self._choose_anew(channel, max(SHORT_WAIT, self._until - time.monotonic()))
        if not chosen:
            return False
        assert self._outgoing is not None
        log.info("Round %d is begun anew: it has %d updates.", self._round, tally.trainers)
        self._tries += 1
        self._again = max(SHORT_WAIT, self._until - time.monotonic())
        self._tally = Tally(None)
        self._optimizer.begin(self._outgoing[MessageType.WEIGHTS], self._round)
        self._give_to(channel, chosen)
        return True

    def _choose_anew(self, channel: Channel, patience: float) -> list[str]:
        """Who is given a round that is begun anew.

        :param patience: how long there may be waited for somebody, in seconds.
        """
        return channel.all_ends()

    def _too_few(self, least: int) -> RoundFailed:
        """What a round that cannot be completed ends in."""
        tally = self._tally
        limit = self.config.policy.round_deadline
        details = [f"{end}: {reason}" for end, reason in {**tally.lost, **tally.refused}.items()]
        details += [f"{end}: no update in time" for end in sorted(tally.pending)]
        details += [f"{end}: it has nobody to train" for end in tally.empty]
        return RoundFailed(
            f"Round {self._round} has {tally.trainers} of at least {least} updates (policy.minTrainers)"
            + (f" after {limit:g} s (policy.roundDeadline)" if limit is not None else "")
            + (f". {'; '.join(details[:3])}." if details else ".")
        )

    # After a round, and at the end.

    def increment_round(self) -> None:
        """See :class:`RoundKeeper`; the work is also done when a further round would exceed the privacy's budget."""
        super().increment_round()
        if not self._work_done and not self._privacy.affords():
            self._work_done = True
            self.link.warning(f"The work ends before round {self._round}, which would exceed the privacy's budget.")

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
            resume = Tasklet("resume", self.resume)
            distribute = Tasklet("distribute", self.put, TAG_DISTRIBUTE)
            aggregate = Tasklet("aggregate", self.get, TAG_AGGREGATE)
            train = Tasklet("train", self.train)
            evaluate = Tasklet("evaluate", self.evaluate)
            save_metrics = Tasklet("save_metrics", self.save_metrics)
            checkpoint = Tasklet("checkpoint", self.keep_round)
            inc_round = Tasklet("inc_round", self.increment_round)
            commit = Tasklet("commit", self.commit)
            inform = Tasklet("inform_end_of_training", self.inform_end_of_training)
            save_model = Tasklet("save_model", self.save_model)
            loop = Loop(loop_check_fn=lambda: self._work_done, skip_fn=lambda: self._work_done)
        (
            internal_init
            >> load_data
            >> initialize
            >> base_model
            >> resume
            >> loop(distribute >> aggregate >> train >> evaluate >> save_metrics >> checkpoint >> inc_round)
            >> commit
            >> inform
            >> save_model
        )

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [TAG_DISTRIBUTE, TAG_AGGREGATE]
