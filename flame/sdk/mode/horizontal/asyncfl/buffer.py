"""What asynchronous aggregators of every tier do: keep some trainers at work, and fold what comes into a buffer.

A *version* of the model is what a round is elsewhere. Whoever is idle is given the newest version, as long as there is room
(``concurrency``: those first who have waited longest; or a selector such as fedbuff's ``c``). Updates come when they come; one that began from an older version counts
less, as the optimizer says. When the buffer holds ``aggGoal`` updates it becomes the next version. So a trainer may be at
work through several versions, and a fast one may give several updates to one.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: Federated Learning with Buffered Asynchronous Aggregation. AISTATS 2022,
algorithm 1.

What a job says: ``hyperparameters.aggGoal`` (or the optimizer's ``agg_goal``), or where tiers differ
``hyperparameters.aggGoals: {ROLE: K}``; ``hyperparameters.concurrency``, or a selector on the channel. The policy's
``roundDeadline`` bounds a version: what is in the buffer then is taken, if ``minTrainers`` allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from flame.errors import SpecError
from flame.sdk.channel import VAL_CH_STATE_SEND, Channel
from flame.sdk.codec import Message
from flame.sdk.end import KEY_END_STATE, VAL_END_STATE_RECVD
from flame.sdk.mode.horizontal.syncfl.rounds import PROP_BUSY, RoundAggregator
from flame.sdk.mode.message import MessageType


class BufferedAggregator(RoundAggregator):
    """Base of the asynchronous aggregators."""

    _goal: int = 1
    _concurrency: int | None = None
    _turns: Iterator[int]
    _last_turn: dict[str, int]
    _standing: tuple[frozenset[str], int] = (frozenset(), 0)

    def internal_init(self) -> None:
        """See :class:`Role`.

        :raises flame.errors.SpecError: the job's optimizer or its goal cannot be used here.
        """
        super().internal_init()
        chosen, hyper = self.config.optimizer, self.config.hyperparameters
        if not self._optimizer.differences:
            raise SpecError(
                f"asynchronous aggregation needs a rule for updates that begin from different models, such as fedbuff, "
                f"which {chosen.sort!r} is not.",
                "optimizer",
            )
        by_role = hyper.get("aggGoals", {})
        if not isinstance(by_role, dict) or (by_role and self.config.role not in by_role):
            raise SpecError(
                f"it must say a number for each aggregating role, also for {self.config.role!r}.",
                "hyperparameters.aggGoals",
            )
        goal = by_role.get(self.config.role) or chosen.kwargs.get("agg_goal") or hyper.aggregation_goal or 1
        if isinstance(goal, bool) or not isinstance(goal, int) or goal < 1:
            raise SpecError(f"the aggregation goal of {self.config.role} must be at least 1, not {goal!r}.", "aggGoals")
        self._goal = goal
        self._concurrency = hyper.concurrency
        self._turns, self._last_turn = itertools.count(1), {}
        if self.config.policy.deterministic:
            self.link.warning("An asynchronous job depends on who is faster: policy.deterministic means nothing here.")

    def _is_current(self, message: Message) -> bool:
        """Any update is, from whatever version, that answers this process."""
        return bool(message.metadata.get("of", self._mark) == self._mark)

    def _owes(self, channel: Channel, end: str) -> bool:
        busy, member = channel.get_end_property(end, PROP_BUSY), channel.member(end)
        return busy is not None and (member is None or busy.attempt == member.attempt)

    def _idle(self, channel: Channel) -> list[str]:
        """Who is there and owes no update; what has arrived is never thrown away."""
        return [end for end in channel.all_ends() if not self._owes(channel, end)]

    def _working(self, channel: Channel) -> int:
        """How many are at work."""
        return sum(self._owes(channel, end) for end in channel.all_ends())

    def _stand(self, channel: Channel) -> tuple[frozenset[str], int]:
        """Who is idle and how many are at work: what a decision to give the model depends on."""
        return frozenset(self._idle(channel)), self._working(channel)

    def _serve(self, channel: Channel) -> None:
        """Give the newest version to those who are idle, as far as there is room."""
        chosen = self._choose(channel)
        if chosen:
            assert self._outgoing is not None
            told = self._datasampler.get_metadata(self._round, chosen)
            if told:
                self._outgoing[MessageType.DATASAMPLER_METADATA] = told
            self._give(channel, chosen)
        self._standing = self._stand(channel)

    def _choose(self, channel: Channel) -> list[str]:
        """See :class:`RoundAggregator`: none where there is no room."""
        idle = self._idle(channel)
        for end in idle:
            # A selector that counts who is at work hears of those that have come back as somebody else, too.
            channel.set_end_property(end, KEY_END_STATE, VAL_END_STATE_RECVD)
        free, working = set(idle), self._working(channel)
        wanted = [end for end in channel.ends(VAL_CH_STATE_SEND) if end in free]
        if self._concurrency is not None and not self._selects(channel):
            # In turns: else the first to answer would be the first to be asked again, and some would never be.
            wanted.sort(key=lambda end: self._last_turn.get(end, 0))
            wanted = wanted[: max(0, self._concurrency - working)]
        chosen = wanted or (idle[:1] if not working else [])
        self._last_turn.update((end, next(self._turns)) for end in chosen)
        return chosen

    def _selects(self, channel: Channel) -> bool:
        chosen = self.config.channels[channel.name()].selector or self.config.selector
        return chosen.sort != "default"

    def _turned(self) -> bool:
        """For aggregators whose group changes: whether there is news of it."""
        return False

    def _called_away(self) -> bool:
        """For aggregators below the top: whether the one above wants something else by now."""
        return False

    def _fill(self, channel: Channel, patience: float) -> bool:
        """Fold updates until the goal is met, and give the model to who may have it meanwhile.

        :param patience: how long to wait for somebody when nobody is at work, in seconds.
        :returns: whether the goal is met; else no more will come in time.
        """
        tally = self._tally
        while len(tally.folded) < self._goal:
            if not self._await_news(channel, tally.left(), patience) or self._called_away():
                return False
            for end in channel.heard():
                message, _ = channel.recv(end)
                self._take(channel, tally, end, message)
                del message  # its memory is free before the next one is received
                if len(tally.folded) >= self._goal:
                    return True
            self._serve(channel)
        return True

    def _await_news(self, channel: Channel, left: float | None, patience: float) -> bool:
        """Wait until there is something to do; False when the time is over, or nobody came to work."""
        if self._working(channel) or channel.heard():
            return channel.wait_until(
                lambda: (
                    bool(channel.heard())
                    or self._stand(channel) != self._standing
                    or self._turned()
                    or self._called_away()
                ),
                left,
            )
        return self.wait_for(
            channel,
            lambda: bool(self._idle(channel)) or self._turned() or self._called_away(),
            lambda: f"a worker of role {channel.other_role()}",
            patience if left is None else min(patience, left),
        )
