"""How the members of a channel agree on what to do next, with no server and with members that die at any moment.

The first in order is the *speaker*. Everyone tells it where they stand; it makes a plan (:mod:`.agreement`) and tells it to all.
When the speaker leaves, the next in order is the speaker, and everyone tells it anew. Nobody needs to be remembered: what
a member says of itself is all there is to know.

**Order.** Members are sorted by what their ids are made of: by the digest of what a worker works on, which is the same in every run of a
job, then by the task's id. Never by sizes of data sets, which may be equal.

**Torn plans.** A member that cannot do its part of a plan, because another one of it has left or has torn it, tears it: it tells all
who are in it, and goes back to the table. So nobody waits for somebody who waits for a third. A member follows only
plans of the speaker that it last told where it stands, and only the answer to that; it tears others.

**Silence.** Where rounds have a deadline, the speaker goes on without those who have not come by then; and a speaker that says nothing
for much longer is passed over until it is heard of again.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, TypeVar, cast

import msgspec

from flame.errors import DeadlineExceeded, EndLeft, RoundFailed
from flame.sdk.backends.base import Member
from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.link import Link
from flame.sdk.mode.distributed.agreement import Plan, Stand, decide
from flame.sdk.mode.role import SHORT_WAIT
from flame.spec.nouns import RoundPolicy

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Kinds of messages between members.
STAND, PLAN, TORN, SEGMENT, MODEL, FAREWELL = "stand", "plan", "torn", "segment", "model", "farewell"
INVITE, UPDATE = "invite", "update"


class News(Enum):
    """What came of a member that an update is awaited from."""

    UPDATE = "its update"
    LEFT = "it has left"
    OTHER = "something else"
    LATE = "nothing in time"


class Torn(Exception):
    """The plan that is being carried out cannot be."""


class Table:
    """A member's place among the others.

    :param channel: links the role with itself.
    :param policy: what a round needs.
    :param link: where waits are told.
    :param expected: how many members the first agreement waits for, this one included.
    :param least: how many updates make a round; None: the policy's ``minTrainers``.
    :ivar me: this worker.
    :ivar plan: what is being carried out.
    :ivar began: when the round began, by :func:`time.monotonic`; its deadline counts from there.
    :ivar only: the members that matter, with the attempt of each; None: all.
    :ivar limit: the longest that a round may take, in seconds; None: as long as it takes.
    """

    def __init__(
        self, channel: Channel, policy: RoundPolicy, link: Link, *, expected: int = 1, least: int | None = None
    ) -> None:
        self.channel = channel
        self.me = cast(Member, channel.member(channel.get_backend_id()))
        self.only: Mapping[str, int] | None = None
        self.limit = policy.round_deadline
        self._least = policy.min_trainers if least is None else least
        self.plan: Plan | None = None
        self.began = self._since = time.monotonic()
        self._policy = policy
        self._link = link
        self._expected = expected
        self._met = expected <= 1
        self._stands: dict[str, tuple[int, Stand]] = {}  # with the attempt of the worker that said so
        self._plans: deque[tuple[str, Plan]] = deque()
        self._torn: set[str] = set()
        self._segments: dict[str, deque[Message]] = {}
        self._models: dict[str, Message] = {}
        self._invited: set[tuple[str, str]] = set()  # plan, end
        self._silent: set[str] = set()
        self._farewells: set[str] = set()
        self._tickets = itertools.count(1)
        self._numbers = itertools.count(1)

    # Who is there.

    def order(self) -> list[str]:
        """All who are there and heard of, this member included, in the order of the ring."""
        known = {self.me.end: self.me}
        for end in self.channel.all_ends():
            member = self.channel.member(end)
            if member is None or end in self._silent:
                continue
            if self.only is None or self.only.get(end) == member.attempt:
                known[end] = member
        return sorted(known, key=lambda end: (known[end].order, end))

    def _ready(self) -> dict[str, Stand]:
        """Where those stand who have said so, in the order of the ring."""
        ready = {}
        for end in self.order():
            attempt, stand = self._stands.get(end, (0, None))
            member = self.channel.member(end)
            if stand is not None and member is not None and member.attempt == attempt:
                ready[end] = stand
        return ready

    def _left(self, began: float) -> float | None:
        """What is left of the time that something may take which began then, but always time for a last look."""
        return None if self.limit is None else max(SHORT_WAIT, began + self.limit - time.monotonic())

    # Agreement.

    def agree(self, done: int, trained: bool) -> Plan:
        """Come to the table and leave it with a plan that names this member, or that says that all is over.

        :param done: the round whose model this member has.
        :param trained: whether it has trained it.
        """
        self.plan = None
        while True:
            self._hear()
            if self._farewells:
                return Plan(id="farewell", round=done)
            speaker = self.order()[0]
            stand = Stand(done, trained, next(self._tickets))
            plan = self._speak(stand) if speaker == self.me.end else self._listen(speaker, stand)
            if plan is not None:
                break
        self.plan = plan
        self._met = True
        self._since = time.monotonic()
        self._segments = {key: kept for key, kept in self._segments.items() if key == plan.id}
        self._models = {key: kept for key, kept in self._models.items() if key == plan.id}
        if plan.failure:
            raise RoundFailed(plan.failure)
        return plan

    def _speak(self, mine: Stand) -> Plan | None:
        """Make a plan with those who come; None when somebody else is the speaker now."""
        policy, least = self._policy, self._least
        me = self.me.end
        self._stands[me] = self.me.attempt, mine
        wanted = least if self._met else max(least, self._expected)

        def complete(number: int) -> bool | None:
            order = self.order()
            if order[0] != me or self._farewells:
                return False
            return True if len(order) >= number and len(self._ready()) == len(order) else None

        def missing() -> str:
            late = max(len(self.order()), wanted) - len(self._ready())
            return f"{late} more of {max(len(self.order()), wanted)} workers of role {self.me.role}"

        came = None
        if self._met:
            came = self.until(lambda: complete(1), self._left(self.began), missing)
        if came is not False and len(self._ready()) < wanted:
            came = self.until(lambda: complete(wanted), policy.join_deadline, missing)
        if came is False:
            return None
        ready = self._ready()
        if not self._met and least <= len(ready) < self._expected:
            self._link.warning(
                f"The work begins with {len(ready)} of {self._expected} workers of role {self.me.role}: the others did not "
                f"come within {policy.join_deadline:g} s (policy.joinDeadline)."
            )
        plan = decide(f"{me}/{self.me.attempt}/{next(self._numbers)}", ready, list(ready), least)
        self._stands.clear()
        self._tell(plan, [end for end in ready if end != me])
        return plan

    def _listen(self, speaker: str, mine: Stand) -> Plan | None:
        """Tell the speaker where this member stands, and wait for its plan; None when somebody else is the speaker now."""
        try:
            self.channel.send(speaker, {}, kind=STAND, metadata={"stand": list(mine)}, timeout=self._left(self.began))
        except EndLeft:
            self.until(lambda: self.order()[0] != speaker or None, SHORT_WAIT, lambda: "")
            return None

        def answer() -> Plan | bool | None:
            while self._plans:
                sender, plan = self._plans.popleft()
                if sender == speaker and plan.tickets.get(self.me.end) == mine.ticket:
                    return plan
                self.tear(plan)
            return False if self.order()[0] != speaker or self._farewells else None

        limit = self.limit
        patience = None if limit is None else limit + self._policy.join_deadline + SHORT_WAIT
        plan = self.until(answer, patience, lambda: f"the others; {speaker} speaks for them")
        if plan is None:
            log.warning("%s has said nothing for %g s and is passed over.", speaker, patience)
            self._silent.add(speaker)
        return plan if isinstance(plan, Plan) else None

    def _tell(self, plan: Plan, ends: list[str]) -> None:
        self.channel.broadcast(
            {}, ends, self._policy.join_deadline, kind=PLAN, metadata={"plan": msgspec.to_builtins(plan)}
        )

    # Carrying out.

    def tear(self, plan: Plan) -> None:
        """Tell all who are in a plan that it cannot be carried out."""
        if plan.id not in self._torn:
            self._torn.add(plan.id)
            others = [end for end in plan.members if end != self.me.end]
            self.channel.broadcast({}, others, SHORT_WAIT, kind=TORN, metadata={"plan": plan.id})

    def check(self, source: str) -> None:
        """Look whether what is awaited from another member can still come.

        :raises Torn: that one has left, or somebody has torn the plan.
        """
        plan = self.plan
        assert plan is not None
        if plan.id in self._torn or not self.channel.has(source):
            raise Torn

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
            assert self.plan is not None
            self.channel.broadcast(message, ends, self._left(self._since), kind=MODEL, metadata={"plan": self.plan.id})

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

    def invite(self, ends: Collection[str]) -> None:
        """Ask members of the plan for their updates. They come one by one: see :meth:`updates`."""
        assert self.plan is not None
        self.channel.broadcast({}, ends, self._left(self._since), kind=INVITE, metadata={"plan": self.plan.id})

    def answer(self, source: str, message: Mapping[Any, Any]) -> None:
        """Give an update to the member that asks for it, once it has.

        :raises Torn: it will not.
        """
        plan = self.plan
        assert plan is not None

        def came() -> bool | None:
            if (plan.id, source) in self._invited:
                return True
            self.check(source)
            return None

        self.until(came, None, lambda: f"{source} to ask for the update")
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
        self.invite(ends)
        pending, owed = list(ends), set(ends)
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
        try:
            ((message, (end, _)),) = self.channel.recv_fifo(ends, 1, self._left(self._since))
        except DeadlineExceeded:
            return News.LATE, "", None
        if message is None:
            return News.LEFT, end, None
        if message.kind == UPDATE and message.metadata.get("plan") == plan.id:
            return News.UPDATE, end, message
        self._note(end, message)
        if plan.id in self._torn:
            raise Torn
        return News.OTHER, end, None

    # The end.

    def farewell(self, last: Callable[[], None]) -> None:
        """One of those who came to the end does ``last``; the others leave when it is done, and do it if that one dies."""
        among = self.plan.tickets.keys() if self.plan is not None else set()

        def speaker() -> str:
            return next((end for end in self.order() if end in among), self.me.end)

        while not self._farewells:
            first = speaker()
            if first == self.me.end:
                last()
                self.channel.broadcast({}, timeout=self._policy.join_deadline, kind=FAREWELL)
                return
            self.until(
                lambda: True if self._farewells or speaker() != first else None,  # noqa: B023
                None,
                lambda: "the model to be kept",
            )
            self._hear()

    # What arrives.

    def until(self, came: Callable[[], T | None], timeout: float | None, whom: Callable[[], str]) -> T | None:
        """Take in what arrives until ``came()`` gives something.

        :param timeout: seconds; None waits as long as it takes.
        :param whom: what is waited for, should it take long.
        :returns: what ``came()`` gave; None when the time ran out.
        """
        channel = self.channel
        begun = time.monotonic()
        told = False
        try:
            while True:
                members = channel.all_ends()
                # First what was said, then who is there: who has left may have said something last.
                self._hear()
                found = came()
                if found is not None:
                    return found
                spent = time.monotonic() - begun
                left = None if timeout is None else timeout - spent
                if left is not None and left <= 0:
                    return None
                if not told and spent >= SHORT_WAIT:
                    told = True
                    self._link.waiting(f"Waiting for {whom()} on channel {channel.name()}.")
                pause = left if told else SHORT_WAIT - spent if left is None else min(left, SHORT_WAIT - spent)
                channel.wait_until(lambda: bool(channel.heard()) or channel.all_ends() != members, pause)  # noqa: B023
        finally:
            if told:
                self._link.waiting("")

    def _hear(self) -> None:
        """Take in all that has arrived."""
        while heard := self.channel.heard():
            for end in heard:
                self._take(end)

    def _take(self, end: str) -> None:
        """One message of an end that has sent some."""
        try:
            message, _ = self.channel.recv(end, 0)
        except DeadlineExceeded:
            return
        if message is not None:
            self._note(end, message)

    def _note(self, end: str, message: Message) -> None:
        """Keep what a message says until it is asked for."""
        self._silent.discard(end)
        told, key = message.metadata, str(message.metadata.get("plan", ""))
        try:
            if message.kind == STAND:
                done, trained, ticket = told["stand"]
                self._stands[end] = message.attempt, Stand(int(done), bool(trained), int(ticket))
            elif message.kind == PLAN:
                self._plans.append((end, msgspec.convert(told["plan"], Plan)))
            elif message.kind == TORN:
                self._torn.add(key)
            elif message.kind == SEGMENT and key not in self._torn:
                self._segments.setdefault(key, deque()).append(message)
            elif message.kind == MODEL:
                self._models[key] = message
            elif message.kind == INVITE:
                self._invited.add((key, end))
            elif message.kind == FAREWELL:
                self._farewells.add(end)
        except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
            log.warning("What %s said is not understood: %s", end, error)
