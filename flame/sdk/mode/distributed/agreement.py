"""What the members of a channel do next, as a pure function of where each of them stands.

One of them, the first in order, asks it and tells the others (:mod:`flame.sdk.mode.distributed.table`). That one needs not know
more than the others: it may have come in a moment ago.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

#: Where a member stands that has no model in common with anybody yet.
NEWCOMER = -1


class Stand(NamedTuple):
    """Where a member stands.

    :ivar done: the round whose model it has; 0 is the first common model, :data:`NEWCOMER`: it has none.
    :ivar trained: it has trained that model and can take part in the next round.
    :ivar ticket: counts what a member says of itself; a plan that answers an older one is void.
    """

    done: int
    trained: bool
    ticket: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done, by whom.

    :ivar id: tells plans apart.
    :ivar round: the round whose model all named here have afterwards.
    :ivar ring: who averages, in the order of the ring; empty: nobody.
    :ivar giver: who gives the model of that round to those in ``to``.
    :ivar to: who is behind, or new.
    :ivar tickets: which word of each member this answers.
    :ivar failure: the work cannot go on, and why; empty: it can.
    """

    id: str
    round: int
    ring: list[str] = []
    giver: str = ""
    to: list[str] = []
    tickets: dict[str, int] = {}
    failure: str = ""

    @property
    def members(self) -> set[str]:
        """Everyone who does something."""
        return {*self.ring, *self.to, *([self.giver] if self.to else [])}

    @property
    def over(self) -> bool:
        """All have the same model, and nobody has trained it: there is nothing left to do."""
        return not self.ring and not self.to and not self.failure


def decide(
    id: str, stands: Mapping[str, Stand], order: Sequence[str], least: int, *, whole: bool = False, own: bool = False
) -> Plan:
    """The next plan.

    Who is new gets the model after the round that the others are about to close, and does not hold them up. Who was left behind
    when a round was torn gets the model at once, because its update counts as much as any other's; so does a newcomer without
    whom a round is too small.

    :param id: the plan's.
    :param stands: where each one stands.
    :param order: all of them in the order of the ring.
    :param least: how many updates make a round.
    :param whole: nobody who is there may be missing in a round, whatever that takes.
    :param own: each member has a model of its own, so nobody else's is of use to who is behind. With ``whole``, the round is done again
        with all of them: those who have closed it give their updates once more, and keep the models that they have.
    """
    tickets = {end: stand.ticket for end, stand in stands.items()}
    ahead = max(stand.done for stand in stands.values())
    if ahead == NEWCOMER and len(order) < least:
        failure = f"The work cannot begin: {len(order)} of at least {least} workers (policy.minTrainers) came"
        return Plan(id=id, round=0, tickets=tickets, failure=failure)
    if ahead == NEWCOMER:
        return Plan(id=id, round=0, giver=order[0], to=list(order[1:]), tickets=tickets)
    current = [end for end in order if stands[end].done == ahead]
    behind = [end for end in order if stands[end].done < ahead]
    ring = [end for end in current if stands[end].trained]
    if own and whole and behind and ahead > 0 and all(stands[end].done == ahead - 1 for end in behind):
        ready = all(stands[end].trained for end in behind)
        return Plan(id=id, round=ahead, ring=list(order) if ready else [], tickets=tickets)
    torn = whole or any(stands[end].done != NEWCOMER for end in behind)
    if (behind and (torn or len(ring) < least)) or not ring:
        return Plan(id=id, round=ahead, giver=current[0], to=behind, tickets=tickets)
    if len(ring) < least:
        failure = f"Round {ahead + 1} has {len(ring)} of at least {least} updates (policy.minTrainers)"
        return Plan(id=id, round=ahead, tickets=tickets, failure=failure)
    if whole and len(ring) < len(current):
        return Plan(id=id, round=ahead, tickets=tickets)  # who has not trained yet is waited for
    return Plan(id=id, round=ahead + 1, ring=ring, giver=ring[0], to=behind, tickets=tickets)
