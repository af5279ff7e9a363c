"""What members say to each other, kept until it is asked for; and how a member waits for it.

A member waits for different things at different times, and others are ahead of it or behind. So everything that arrives is taken
in and sorted by what it is about.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar, cast

import msgspec

from flame.errors import DeadlineExceeded
from flame.sdk.backends.base import Member
from flame.sdk.channel import Channel
from flame.sdk.codec import Message
from flame.sdk.link import Link
from flame.sdk.mode.distributed.agreement import Plan, Stand
from flame.sdk.mode.role import SHORT_WAIT, WorkIsDone
from flame.spec.nouns import RoundPolicy

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Kinds of messages between members.
STAND, PLAN, TORN, SEGMENT, MODEL, FAREWELL = "stand", "plan", "torn", "segment", "model", "farewell"
INVITE, UPDATE = "invite", "update"


class Post:
    """A member's letterbox.

    :param channel: links the role with itself.
    :param policy: what a round needs.
    :param link: where waits are told.
    :ivar me: this worker.
    :ivar only: the members that matter, with the attempt of each; None: all.
    :ivar limit: the longest that a round may take, in seconds; None: as long as it takes.
    """

    def __init__(self, channel: Channel, policy: RoundPolicy, link: Link) -> None:
        self.channel = channel
        self.me = cast(Member, channel.member(channel.get_backend_id()))
        self.only: Mapping[str, int] | None = None
        self.limit = policy.round_deadline
        self._policy = policy
        self._link = link
        self._stands: dict[str, tuple[int, Stand]] = {}  # with the attempt of the worker that said so
        self._plans: deque[tuple[str, Plan]] = deque()
        self._torn: set[str] = set()
        self._torn_by_me: set[str] = set()
        self._untold: dict[str, str] = {}  # by end, a plan that it may still wait in, though nothing comes of it
        self._segments: dict[str, deque[Message]] = {}
        self._models: dict[str, Message] = {}
        self._invited: set[tuple[str, str]] = set()  # plan, end
        self._silent: set[str] = set()
        self._farewells: set[str] = set()

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

    def _left(self, began: float) -> float | None:
        """What is left of the time that something may take which began then, but always time for a last look."""
        return None if self.limit is None else max(SHORT_WAIT, began + self.limit - time.monotonic())

    def _forget(self, plan: Plan) -> None:
        """Drop what was said about other plans than this one."""
        self._torn &= {plan.id}
        self._torn_by_me &= {plan.id}
        self._invited = {pair for pair in self._invited if pair[0] == plan.id}
        self._segments = {key: kept for key, kept in self._segments.items() if key == plan.id}
        self._models = {key: kept for key, kept in self._models.items() if key == plan.id}

    def _answered(self, plan: Plan) -> None:
        """Drop what members said of themselves before the word that a plan answers.

        A member told it to this one when this one was the speaker for a moment, and has told another one since. Taken for its last word
        when this one becomes the speaker again, it would cost that member's update.
        """
        for end, ticket in plan.tickets.items():
            if end in self._stands and self._stands[end][1].ticket <= ticket:
                del self._stands[end]

    def _say_torn(self, plan: str, ends: Collection[str]) -> None:
        """Tell members that a plan cannot be carried out; those who are not there, when they are.

        A member may have come for another one and not yet for this one: it follows the plan and waits for what this one cannot send.
        """
        failed = self.channel.broadcast({}, ends, SHORT_WAIT, kind=TORN, metadata={"plan": plan})
        self._untold.update(dict.fromkeys(failed, plan))

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
                members = channel.all_ends(), channel.visits()
                # First what was said, then who is there: who has left may have said something last.
                self._hear()
                for end in [end for end in self._untold if channel.has(end)]:
                    self._say_torn(self._untold.pop(end), [end])
                found = came()
                if found is not None:
                    return found
                if self._link.done:
                    raise WorkIsDone
                spent = time.monotonic() - begun
                left = None if timeout is None else timeout - spent
                if left is not None and left <= 0:
                    return None
                if not told and spent >= SHORT_WAIT:
                    told = True
                    self._link.waiting(f"Waiting for {whom()} on channel {channel.name()}.")
                pause = left if told else SHORT_WAIT - spent if left is None else min(left, SHORT_WAIT - spent)
                channel.wait_until(
                    lambda: (
                        self._link.done or bool(channel.heard()) or (channel.all_ends(), channel.visits()) != members  # noqa: B023
                    ),
                    pause,
                )
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
                plan = msgspec.convert(told["plan"], Plan)
                self._plans.append((end, plan))
                self._answered(plan)
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
