"""What trainers and the aggregators below the top have in common: they are given a model and answer it.

A follower works for whatever round it is given. When who gave it disappears, it waits for somebody to come back (as long as
the policy's ``joinDeadline`` allows) and goes on with the round that it is given then; what could not be sent is lost, as an
update of an old round is of no use.

**What a follower remembers.** Some algorithms leave something at a trainer from round to round, and so may the user's code. It is kept under
the round after which it was so, and whoever is given round n goes on from what was before it: a worker that takes another one's place
from what the server has, one whose aggregator has begun a round again from what it has itself. In a deterministic job an update
leaves only when what it leaves behind is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flame.errors import EndLeft
from flame.sdk.channel import Channel
from flame.sdk.checkpoints import State
from flame.sdk.codec import Message
from flame.sdk.mode.message import MessageType
from flame.sdk.mode.role import Role, WorkIsDone

log = logging.getLogger(__name__)

TAG_FETCH = "fetch"
TAG_UPLOAD = "upload"


class Follower(Role):
    """Base of the roles that answer an aggregator."""

    _source: str | None = None
    _source_mark: int | str = 1
    _reached: int | None = None  # the round after which the state is what it is; None: no round has begun
    _past: dict[int, State]

    def internal_init(self) -> None:
        """See :class:`Role`."""
        super().internal_init()
        self._source = None
        self._reached = None
        self._past = {}

    def _recall(self, round: int) -> None:
        """This round begins: be as before it."""
        self._kept.settle()
        if self._reached is None:
            found = self._kept.load(before=round)
            self._reached, state = found if found is not None else (0, self._state())
            if found is not None:
                self._load(state)
            if self._strict:
                self._past = {self._reached: state.copy()}
        elif round <= self._reached and (before := [number for number in self._past if number < round]):
            self._load(self._past[max(before)].copy())
        self._seed_round(round)

    def _remember(self) -> None:
        """The round is done, and its answer has not left yet."""
        self._reached = self._round
        if self._strict:
            state = self._state()
            if state.arrays or state.values:
                self._past[self._round] = state.copy()
                self._past = dict(sorted(self._past.items())[-2:])
                self._kept.commit(self._round, lambda: state)
        elif self._kept.due(self._round):
            state = self._state()
            if state.arrays or state.values:
                self._kept.offer(self._round, lambda: state)

    def _newest(self, channel: Channel) -> Message:
        """The next message; of several that have gathered the last one, or the one that ends the work."""
        while True:
            if self._source is None or (channel.is_rxq_empty(self._source) and not channel.has(self._source)):
                try:
                    self.await_peer(channel)
                except WorkIsDone:  # it was said, and lost on its way
                    return Message({"eot": True}, kind="eot")
                # Who has left may have said something last, such as that the work is done. No selector is asked: the job's
                # chooses trainers.
                self._source = next(iter([*channel.heard(), *channel.all_ends()]), None)
                if self._source is None:
                    continue  # it left at this moment
            message, _ = channel.recv(self._source)
            while message is not None and MessageType.EOT not in message and not channel.is_rxq_empty(self._source):
                del message  # frees its memory before the next one is looked at
                message, _ = channel.recv(self._source)
            if message is not None:
                self._source_mark = message.metadata.get("as", message.attempt)
                return message
            log.info("The aggregator %s left before it sent round %d; waiting for it.", self._source, self._round + 1)
            self._source = None

    def _hand_in(self, channel: Channel, message: Mapping[Any, Any]) -> None:
        """Send the update that ends the round, once what it leaves behind here is remembered."""
        message = channel.prepare(message)
        self._remember()
        self._answer(channel, message)

    def _answer(self, channel: Channel, message: Mapping[Any, Any]) -> None:
        """Send an update to who gave the model; it is lost where that one is gone."""
        channel.set_property("round", self._round)
        assert self._source is not None  # upload follows fetch
        try:
            # `of`: an aggregator that was started anew must not take an update of its predecessor's round.
            channel.send(self._source, message, kind="update", metadata={"of": self._source_mark})
        except EndLeft as error:
            log.info("The update of round %d is lost: %s", self._round, error)
