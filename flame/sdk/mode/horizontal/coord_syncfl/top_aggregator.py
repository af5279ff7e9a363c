"""The top aggregator of coordinated rounds: in each it asks the coordinator whom to give the model."""

from __future__ import annotations

from typing import Any

from flame.errors import RoundFailed, WorkerError
from flame.sdk.channel import Channel
from flame.sdk.mode.farewell import FAREWELL_SECONDS, say_done
from flame.sdk.mode.horizontal.coord_syncfl.coordinator import ASK_IDLE, ASK_LOST, ASK_PATIENCE
from flame.sdk.mode.horizontal.syncfl.rounds import TAG_AGGREGATE, TAG_DISTRIBUTE, Tally
from flame.sdk.mode.horizontal.syncfl.top_aggregator import TopAggregator as SyncTopAggregator
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.tasklet import Tasklet

__all__ = ["TAG_AGGREGATE", "TAG_COORDINATE", "TAG_DISTRIBUTE", "TopAggregator"]

TAG_COORDINATE = "coordinate"


class TopAggregator(SyncTopAggregator):
    """Aggregates what the middle aggregators send that the coordinator has given trainers to."""

    _coordinated: list[str]
    _made_up: set[str]

    def get_coordinated_ends(self) -> None:
        """Ask who takes part in this round.

        :raises flame.errors.RoundFailed: nobody does.
        """
        channel = self.channel(TAG_DISTRIBUTE)
        self._await_trainers(channel)
        self._made_up = set()
        self._coordinated = self._ask(channel, [])
        if not self._coordinated:
            raise RoundFailed(
                f"Round {self._round} cannot begin: the coordinator found no trainers, or no workers of role "
                f"{channel.other_role()} to give them to."
            )

    def _ask(
        self, channel: Channel, lost: list[str], free: list[str] | None = None, patience: float = 0.0
    ) -> list[str]:
        """Ask the coordinator for this round's aggregators, or for who takes over from lost ones. One that is replaced is asked anew.

        :param free: who may be given something; None: everyone who has nothing to do.
        :param patience: how long to wait for as many trainers as a round needs, in seconds.
        """
        coordinator = self.channel(TAG_COORDINATE)
        patient = self.config.restart.of(coordinator.other_role()).attempts > 0
        while True:
            self.await_peer(coordinator)
            answer = self._ask_once(
                coordinator,
                {
                    ASK_IDLE: self._idle(channel) if free is None else free,
                    ASK_LOST: lost,
                    ASK_PATIENCE: patience,
                },
            )
            if answer is not None:
                return answer
            if not patient:
                raise WorkerError(f"The coordinator left in round {self._round}: nobody says who works with whom.")

    def _ask_once(self, coordinator: Channel, question: dict[str, Any]) -> list[str] | None:
        """What the coordinator says; None when it has left."""
        end = next(iter(coordinator.all_ends()), None)
        if end is not None:
            coordinator.broadcast(
                {MessageType.ROUND: self._round, MessageType.META_INFO_REQ: True, MessageType.METADATA: question},
                [end],
                FAREWELL_SECONDS,
                kind="question",
            )
            # It may wait for two roles to appear before it answers.
            message, _ = coordinator.recv(end, 2 * self.config.policy.join_deadline + FAREWELL_SECONDS)
            if message is not None:
                return list(message[MessageType.COORDINATED_ENDS])
        return None

    def _give_again(self, channel: Channel, end: str) -> None:
        """See :class:`RoundAggregator`: it gets the trainers back that it had."""
        if self._ask(channel, [end], [end]):
            self._give(channel, [end])

    def _choose(self, channel: Channel) -> list[str]:
        """See :class:`RoundAggregator`."""
        return [end for end in self._coordinated if channel.has(end)]

    def _choose_anew(self, channel: Channel, patience: float) -> list[str]:
        """See the base class: the coordinator waits for the trainers that are missing, and spreads all of them anew."""
        self._made_up = set()
        return [end for end in self._ask(channel, [], patience=patience) if channel.has(end)]

    def _make_up(self, channel: Channel, tally: Tally) -> bool:
        """See :class:`RoundAggregator`: others take over the trainers of an aggregator that has left."""
        lost = [end for end in tally.lost if end not in self._made_up]
        if not lost or tally.left() == 0:
            return False
        self._made_up.update(lost)
        others = self._ask(channel, lost)
        if others:
            self.link.warning(
                f"Round {self._round}: {len(lost)} of role {channel.other_role()} left; the trainers go to others."
            )
            tally.target = tally.answered + len(tally.pending) + len(others)
            self._give(channel, others)
        return bool(others)

    def inform_end_of_training(self) -> None:
        """See the base class; the coordinator is told, too."""
        say_done(self.channel(TAG_COORDINATE))
        super().inform_end_of_training()

    def compose(self) -> None:
        """Put the workflow together: as the synchronous one, with the question before each round."""
        super().compose()
        with self.composer:
            ask = Tasklet("get_coordinated_ends", self.get_coordinated_ends)
        self.composer.get_tasklet("distribute").insert_before(ask)

    @classmethod
    def get_func_tags(cls) -> list[str]:
        """See :class:`Role`."""
        return [*super().get_func_tags(), TAG_COORDINATE]
