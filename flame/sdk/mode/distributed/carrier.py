"""How members carry out a plan: pieces round a ring, models to those who are behind, updates to one or to neighbours.

Every wait ends when the one who is waited for leaves, or when somebody tears the plan: see :mod:`.table`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

from flame.errors import DeadlineExceeded, EndLeft
from flame.sdk.codec import Message
from flame.sdk.mode.distributed.agreement import Plan
from flame.sdk.mode.distributed.post import INVITE, MODEL, SEGMENT, UPDATE, Post


class News(Enum):
    """What came of a member that an update is awaited from."""

    UPDATE = "its update"
    LEFT = "it has left"
    OTHER = "something else"
    LATE = "nothing in time"


class Torn(Exception):
    """The plan that is being carried out cannot be."""


class Carrier(Post):
    """A member's part in plans.

    :ivar plan: what is being carried out.
    """

    plan: Plan | None = None
    _since: float = 0.0  # when it was begun, by time.monotonic
    _visits: Mapping[str, int] = {}  # by then: what was on its way to, or from, one who has come anew since may be lost

    def tear(self, plan: Plan) -> None:
        """Tell all who are in a plan that it cannot be carried out: also when another one has said so, as some listen to this one only."""
        self._torn.add(plan.id)
        if plan.id not in self._torn_by_me:
            self._torn_by_me.add(plan.id)
            others = [end for end in plan.members if end != self.me.end]
            self._say_torn(plan.id, others)

    def check(self, source: str) -> None:
        """Look whether what is awaited from another member can still come.

        :raises Torn: that one has left, also if it is back by now; or somebody has torn the plan.
        """
        plan = self.plan
        assert plan is not None
        if plan.id in self._torn or not self.channel.has(source) or self._came_anew(source):
            raise Torn

    def _came_anew(self, source: str) -> bool:
        """Whether a member has come since the plan was made: what it had sent by then may be lost with its connection."""
        return self.channel.visits().get(source) != self._visits.get(source)

    def send_segment(self, end: str, message: Mapping[Any, Any], metadata: Mapping[str, Any]) -> None:
        """Give a piece to the next member of the ring.

        :raises Torn: it has left.
        """
        assert self.plan is not None
        try:
            self.channel.send(
                end, message, self._left(self._since), kind=SEGMENT, metadata={"plan": self.plan.id, **metadata}
            )
        except EndLeft as error:
            raise Torn from error

    def next_segment(self, source: str, index: int) -> Message:
        """The piece of that number from the member before.

        :raises Torn: it will not come.
        """
        plan = self.plan
        assert plan is not None

        def came() -> Message | None:
            pieces = self._segments.get(plan.id)
            if pieces:
                return pieces.popleft()
            self.check(source)
            return None

        piece = self.until(came, self._left(self._since), lambda: f"the others in round {plan.round}")
        if piece is None or piece.metadata.get("index") != index:
            raise Torn
        return piece

    def give(self, message: Mapping[Any, Any], ends: Collection[str]) -> None:
        """Give the model of the plan's round to some members of the plan; one that it does not reach will come to the table."""
        if ends:
            plan = self.plan
            assert plan is not None
            left = self._left(self._since)
            failed = self.channel.broadcast(message, ends, left, kind=MODEL, metadata={"plan": plan.id})
            self._untold.update(dict.fromkeys(failed, plan.id))

    def take_model(self, source: str) -> Message:
        """The model that another member of the plan gives.

        :raises Torn: it will not come.
        """
        plan = self.plan
        assert plan is not None

        def came() -> Message | None:
            if plan.id not in self._models:
                self.check(source)
            return self._models.pop(plan.id, None)

        message = self.until(came, None, lambda: "the model")
        assert message is not None
        return message

    def invite(self, ends: Sequence[str]) -> list[str]:
        """Ask members of the plan for their updates. They come one by one: see :meth:`updates`.

        :returns: those of them who have been asked; the others are not there.
        """
        assert self.plan is not None
        left = self._left(self._since)
        failed = self.channel.broadcast({}, ends, left, kind=INVITE, metadata={"plan": self.plan.id})
        return [end for end in ends if end not in failed]

    def answer(self, source: str, message: Mapping[Any, Any]) -> None:
        """Give an update to the member that asks for it, once it has; not when its model is here already, made without this one.

        :raises Torn: it will not ask.
        """
        plan = self.plan
        assert plan is not None

        def came() -> bool | None:
            if plan.id in self._models:
                return False
            if (plan.id, source) in self._invited:
                return True
            self.check(source)
            return None

        if not self.until(came, None, lambda: f"{source} to ask for the update"):
            return
        try:
            self.channel.send(source, message, self._left(self._since), kind=UPDATE, metadata={"plan": plan.id})
        except EndLeft as error:
            raise Torn from error

    def updates(self, ends: Sequence[str], *, in_order: bool) -> Iterator[Message]:
        """The updates of members that were asked, as they come; one that leaves, or is too late, gives none.

        An update's memory is used again when its arrays are dropped: drop them before the next one is asked for.

        :param in_order: in the order of ``ends``, whenever they come.
        :raises Torn: somebody has torn the plan.
        """
        plan = self.plan
        assert plan is not None
        pending = list(ends)
        while pending:
            news, end, message = self._one_of(pending[:1] if in_order else pending)
            if news is News.LATE:
                return
            if news is not News.OTHER:
                pending.remove(end)
            if message is not None:
                yield message
            del message

    def exchange(self, ends: Sequence[str], message: Mapping[Any, Any]) -> Iterator[Message]:
        """Give an update to some members and get one of each, as they come; one that leaves, or is too late, gives none.

        Each is given when it is ready to take it, by a thread, while others are received: so large updates do not wait for each other
        in a circle.
        """
        plan = self.plan
        assert plan is not None
        pending, owed = self.invite(ends), set(ends)
        sent = []
        with ThreadPoolExecutor(1, "flame-exchange") as sender:
            while pending:
                ready = sorted(end for end in owed if (plan.id, end) in self._invited)
                owed.difference_update(ready)
                sent += [sender.submit(self._send_update, end, message) for end in ready]
                news, end, update = self._one_of(pending)
                if news is News.LATE:
                    break
                if news is not News.OTHER:
                    pending.remove(end)
                if update is not None:
                    yield update
                del update
        for each in sent:
            each.result()

    def _send_update(self, end: str, message: Mapping[Any, Any]) -> None:
        assert self.plan is not None
        left = self._left(self._since)
        self.channel.broadcast(message, [end], left, kind=UPDATE, metadata={"plan": self.plan.id})

    def _one_of(self, ends: Sequence[str]) -> tuple[News, str, Message | None]:
        """What comes next of some members; what is no update for the plan is kept for whom it concerns.

        :raises Torn: somebody has torn the plan.
        """
        plan = self.plan
        assert plan is not None
        if plan.id in self._torn:  # also when that was heard together with the plan: nobody says it twice
            raise Torn
        try:
            ((message, (end, _)),) = self.channel.recv_fifo(ends, 1, self._left(self._since), visits=self._visits)
        except DeadlineExceeded:
            return News.LATE, "", None
        if message is None:
            return News.LEFT, end, None
        if message.kind == UPDATE and message.metadata.get("plan") == plan.id:
            return News.UPDATE, end, message
        self._note(end, message)
        return News.OTHER, end, None
