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
from collections.abc import Callable

import msgspec

from flame.errors import EndLeft, RoundFailed
from flame.sdk.channel import Channel
from flame.sdk.link import Link
from flame.sdk.mode.distributed.agreement import Plan, Stand, decide
from flame.sdk.mode.distributed.carrier import Carrier
from flame.sdk.mode.distributed.post import FAREWELL, PLAN, STAND
from flame.sdk.mode.role import SHORT_WAIT, WorkIsDone
from flame.spec.nouns import RoundPolicy

log = logging.getLogger(__name__)

#: A ticket has the attempt of who draws it above so many bits.
ATTEMPT_BITS = 32


class Table(Carrier):
    """A member's place among the others.

    :param channel: links the role with itself.
    :param policy: what a round needs.
    :param link: where waits are told.
    :param expected: how many members the first agreement waits for, this one included.
    :param least: how many updates make a round; None: the policy's ``minTrainers``.
    :param whole: wait for all in each round, as those that leave come again.
    :param own: each member has a model of its own.
    :ivar began: when the round began, by :func:`time.monotonic`; its deadline counts from there.
    """

    def __init__(
        self,
        channel: Channel,
        policy: RoundPolicy,
        link: Link,
        *,
        expected: int = 1,
        least: int | None = None,
        whole: bool = False,
        own: bool = False,
    ) -> None:
        super().__init__(channel, policy, link)
        self.began = time.monotonic()
        self._least = policy.min_trainers if least is None else least
        self._expected = expected
        self._whole = whole
        self._own = own
        self._met = expected <= 1
        self._tickets = itertools.count((self.me.attempt << ATTEMPT_BITS) + 1)  # a later attempt's are higher
        self._numbers = itertools.count(1)

    def expect(self, number: int) -> None:
        """Wait for no more members than so many, this one included."""
        self._expected, self._whole = number, self._whole and self._own
        self._met = number <= 1

    def _ready(self) -> dict[str, Stand]:
        """Where those stand who have said so, in the order of the ring."""
        ready = {}
        for end in self.order():
            attempt, stand = self._stands.get(end, (0, None))
            member = self.channel.member(end)
            if stand is not None and member is not None and member.attempt == attempt:
                ready[end] = stand
        return ready

    def agree(self, done: int, trained: bool) -> Plan:
        """Come to the table and leave it with a plan that names this member, or that says that all is over.

        :param done: the round whose model this member has.
        :param trained: whether it has trained it.
        :raises WorkIsDone: the others have ended the work, without this one if it was left behind.
        """
        self.plan = None
        while True:
            self._hear()
            if self._farewells:
                raise WorkIsDone
            speaker = self.order()[0]
            stand = Stand(done, trained, next(self._tickets))
            plan = self._speak(stand) if speaker == self.me.end else self._listen(speaker, stand)
            if plan is not None:
                break
        self.plan = plan
        self._met = True
        self._since = time.monotonic()
        self._visits = self.channel.visits()
        self._forget(plan)
        if plan.failure:
            raise RoundFailed(plan.failure)
        return plan

    def _speak(self, mine: Stand) -> Plan | None:
        """Make a plan with those who come; None when somebody else is the speaker now."""
        policy, least = self._policy, self._least
        me = self.me.end
        self._stands[me] = self.me.attempt, mine
        if self._own and self._whole:  # those who wait for the end come to the table again
            self.channel.broadcast({}, timeout=SHORT_WAIT, kind=STAND, metadata={"stand": list(mine)})
        wanted = least if self._met and not self._whole else max(least, self._expected)

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
        if wanted > least and least <= len(ready) < self._expected:
            self._whole = False  # who has not come by now will not be waited for again
            self._link.warning(
                f"The work begins with {len(ready)} of {self._expected} workers of role {self.me.role}: the others did not "
                f"come within {policy.join_deadline:g} s (policy.joinDeadline)."
            )
        plan = decide(
            f"{me}/{self.me.attempt}/{next(self._numbers)}", ready, list(ready), least, whole=self._whole, own=self._own
        )
        self._stands.clear()
        self._tell(plan, [end for end in ready if end != me])
        return plan

    def _listen(self, speaker: str, mine: Stand) -> Plan | None:
        """Tell the speaker where this member stands, and wait for its plan; None when it has to be told anew, or somebody else.

        A speaker that has come anew since, if only because its connection broke, may not have heard it, or its plan was lost.
        """
        visit = self.channel.visits().get(speaker)
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
            anew = self.channel.visits().get(speaker) != visit
            return False if anew or self.order()[0] != speaker or self._farewells else None

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

    def await_farewell(self, leader: str, patience: float) -> bool | None:
        """Wait until one of those who came to the end has done what one does for all.

        :param leader: who is to do it.
        :param patience: how long that one may be away, in seconds, before it is given up.
        :returns: True: it is done; False: somebody is at the table again, and needs the others; None: the leader is given up.
        """

        def came() -> bool | None:
            if self._farewells:
                return True
            return False if self._ready() or self._newcomers() else None

        def came_or_gone() -> bool | str | None:
            found = came()
            return found if found is not None or self.channel.has(leader) else "gone"

        found = self.until(came_or_gone, None, lambda: "the model to be kept")
        if isinstance(found, bool):
            return found
        return self.until(came, patience, lambda: f"the successor of {leader}, to keep its model")

    def _newcomers(self) -> bool:
        """Whether somebody is there who had not come to the table when the last plan was made."""
        tickets = self.plan.tickets if self.plan is not None else {}
        members = [self.channel.member(end) for end in self.channel.all_ends()]
        return any(each is not None and tickets.get(each.end, 0) >> ATTEMPT_BITS != each.attempt for each in members)

    def say_farewell(self) -> None:
        """Tell the others that what one does for all is done."""
        self.channel.broadcast({}, timeout=self._policy.join_deadline, kind=FAREWELL)

    def farewell(self, last: Callable[[], None]) -> None:
        """One of those who came to the end does ``last``; the others leave when it is done, and do it if that one dies."""
        among = self.plan.tickets.keys() if self.plan is not None else set()

        def speaker() -> str:
            return next((end for end in self.order() if end in among), self.me.end)

        while not self._farewells:
            first = speaker()
            if first == self.me.end:
                last()
                self.say_farewell()
                return
            self.until(
                lambda: True if self._farewells or speaker() != first else None,  # noqa: B023
                None,
                lambda: "the model to be kept",
            )
            self._hear()
