"""Who gets the executors. Pure: sessions, nodes and executors in, decisions out; the clock is an argument.

:func:`deserve` says how many executors each session ought to have. First comes every session's minimum, then the tiers of priority
from the highest down; within a tier executors go one group at a time to the session that has had least for its weight, as
water fills a vessel from its lowest place. A group (``batch``) is placed as a whole or not at all, and whatever is given fits on a node.

Shares of whole executors cannot always be those of the weights: of three equal sessions on two slots somebody has none. So
what counts is what a session *has had*: :class:`Service` adds up slot-seconds over weight, and who is behind gets the next
executor. Whoever holds one keeps it until it is ahead by half of :data:`QUANTUM` or so, because changing sides costs more than
being a little unfair for a moment.

:func:`plan` compares what ought to be with what is, and says what to do: bind an idle executor, start one, let one go. It takes an
executor away from a session only for one that lacks it. All this is asked whenever something has happened; nothing ticks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Seconds by which shares look ahead; and about how long one of several sessions keeps an executor that they must take turns with.
QUANTUM = 0.5


class Need(NamedTuple):
    """A session, as far as it matters here.

    ``key``: what executors can serve it (application and resources). ``order``: when it came. ``tasks``: pending and running
    ones. ``most``: executors that it may have; None: no limit. ``had``: what it has had, see :class:`Service`.
    ``blocked``: it gets no new executors.
    """

    id: str
    key: str
    app: str
    order: int
    tasks: int
    priority: int = 0
    weight: float = 1.0
    least: int = 0
    most: int | None = None
    batch: int = 1
    slots: int = 1
    cpu: float = 0.0
    memory: int = 0
    gpu: int = 0
    had: float = 0.0
    blocked: bool = False

    @property
    def wants(self) -> int:
        """How many executors it could use, in whole groups."""
        count = max(self.least, self.tasks)
        if self.most is not None:
            count = min(count, self.most)
        groups = -(-count // self.batch)
        if self.most is not None:
            groups = min(groups, self.most // self.batch)
        return groups * self.batch


class Node(NamedTuple):
    """Room for executors, in all; None: there is no limit. ``starting``: how many may be started there at once."""

    name: str
    slots: int | None
    cpu: float | None = None
    memory: int | None = None
    gpu: int | None = None
    starting: int | None = None


class Held(NamedTuple):
    """An executor that there is. ``session``: which it serves, or is about to; None: it is idle.

    ``ready``: it is there (not just being started). ``busy``: it has a task. ``leaving``: it is being unbound or released.
    ``back``: it is about to be there for anyone: it is being unbound, or the server was restarted and it will say whom it serves.
    """

    id: str
    node: str
    key: str
    app: str
    session: str | None
    ready: bool
    busy: bool
    leaving: bool = False
    back: bool = False
    slots: int = 1
    cpu: float = 0.0
    memory: int = 0
    gpu: int = 0


class Start(NamedTuple):
    """Start an executor for a session on a node."""

    session: str
    node: str


class Bind(NamedTuple):
    """Let an idle executor serve a session."""

    session: str
    executor: str


class Unbind(NamedTuple):
    """Take an executor away from its session at the next task's end; it becomes idle."""

    executor: str


class Release(NamedTuple):
    """End an idle executor, because its room is needed."""

    executor: str


Action = Start | Bind | Unbind | Release


class _Room:
    """What is free on each node."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.free: dict[str, list[float]] = {
            node.name: [float("inf") if limit is None else float(limit) for limit in node[1:5]] for node in nodes
        }

    def take(self, what: Need | Held, node: str) -> bool:
        free, size = self.free.get(node), _size(what)
        if free is None or any(one > left + 1e-9 for one, left in zip(size, free, strict=True)):
            return False
        self.free[node] = [left - one for one, left in zip(size, free, strict=True)]
        return True

    def occupy(self, what: Held) -> None:
        """Take what is taken, even where it is more than there is."""
        if what.node in self.free:
            free = self.free[what.node]
            self.free[what.node] = [left - one for one, left in zip(_size(what), free, strict=True)]

    def give(self, what: Need | Held, node: str) -> None:
        if node in self.free:
            self.free[node] = [left + one for one, left in zip(_size(what), self.free[node], strict=True)]

    def place(self, need: Need, count: int) -> list[str] | None:
        """Room for a whole group, or nothing."""
        taken: list[str] = []
        for node in self.free:
            while len(taken) < count and self.take(need, node):
                taken.append(node)
        if len(taken) == count:
            return taken
        for node in taken:
            self.give(need, node)
        return None


def _size(what: Need | Held) -> tuple[float, ...]:
    return what.slots, what.cpu, what.memory, what.gpu


def deserve(
    needs: Sequence[Need],
    nodes: Sequence[Node],
    caps: Mapping[str, int] | None = None,
    held: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many executors each session ought to have.

    :param caps: most executors of an application, by its name, over all sessions.
    :param held: how many each session has now; it keeps those while the difference to others is small.
    """
    room, given = _Room(nodes), dict.fromkeys((need.id for need in needs), 0)
    left = dict(caps or {})
    held = held or {}

    def give(need: Need) -> bool:
        if need.app in left and left[need.app] < need.batch:
            return False
        if room.place(need, need.batch) is None:
            return False
        given[need.id] += need.batch
        if need.app in left:
            left[need.app] -= need.batch
        return True

    def rank(need: Need) -> float:
        have = given[need.id]
        ahead = need.had + (have + need.batch) * need.slots * QUANTUM / need.weight
        keeps = have + need.batch <= held.get(need.id, 0)
        return ahead - (QUANTUM * need.slots * need.batch / need.weight / 2 if keeps else 0.0)

    active = [need for need in needs if need.wants and not need.blocked]
    for need in sorted(active, key=lambda need: (-need.priority, need.had, need.order)):
        while given[need.id] < min(need.least, need.wants) and give(need):
            pass
    for tier in sorted({need.priority for need in active}, reverse=True):
        queue = [
            (rank(need), need.order, need.id, need)
            for need in active
            if need.priority == tier and given[need.id] < need.wants
        ]
        heapq.heapify(queue)
        while queue:
            _, order, name, need = heapq.heappop(queue)
            if give(need) and given[name] < need.wants:
                heapq.heappush(queue, (rank(need), order, name, need))
    return given


def plan(
    needs: Sequence[Need],
    nodes: Sequence[Node],
    executors: Sequence[Held],
    caps: Mapping[str, int] | None = None,
) -> list[Action]:
    """What to do now, so that every session comes to what it deserves."""
    mine = Counter(one.session for one in executors if one.session is not None and not one.leaving)
    held = {name: count for name, count in mine.items() if name is not None}
    due = deserve(needs, nodes, caps, held)
    room = _Room(nodes)
    for one in executors:
        room.occupy(one)
    starts = {node.name: node.starting for node in nodes}
    for one in executors:
        limit = starts.get(one.node)
        if not one.ready and limit is not None:
            starts[one.node] = limit - 1
    idle = [one for one in executors if one.session is None and one.ready and not one.leaving]
    coming = Counter(one.key for one in executors if one.back and not one.busy)
    left = dict(caps or {})
    for one in executors:
        if one.app in left:
            left[one.app] -= 1
    spare: list[Held] = []  # executors of sessions with more than they deserve, the first to go last
    for need in needs:
        extra = held.get(need.id, 0) - due[need.id]
        if extra > 0:
            own = [one for one in executors if one.session == need.id and one.ready and not one.leaving]
            own.sort(key=lambda one: one.busy)
            spare += reversed(own[:extra])
    leaving = sum(one.leaving for one in executors)  # room that is about to come

    actions: list[Action] = []
    lacking = sorted(
        (need for need in needs if due[need.id] > held.get(need.id, 0)),
        key=lambda need: (-need.priority, need.had, need.order),
    )
    for need in lacking:
        for _ in range(due[need.id] - held.get(need.id, 0)):
            match = next((one for one in idle if one.key == need.key), None)
            if match is not None:
                idle.remove(match)
                actions.append(Bind(need.id, match.id))
                continue
            if coming[need.key] > 0:  # sooner than a new one would be there
                coming[need.key] -= 1
                leaving -= 1
                continue
            capped = need.app in left and left[need.app] < 1
            if not capped:
                node = next((name for name in room.free if starts.get(name) != 0 and room.take(need, name)), None)
                if node is not None:
                    limit = starts.get(node)
                    if limit is not None:
                        starts[node] = limit - 1
                    if need.app in left:
                        left[need.app] -= 1
                    actions.append(Start(need.id, node))
                    continue
                if any(room.take(need, name) for name in room.free):
                    continue  # there is room; it waits its turn to start
            if leaving > 0:  # it is on its way already
                leaving -= 1
                continue
            freed = next((one for one in idle if not capped or one.app == need.app), None)
            if freed is not None:
                idle.remove(freed)
                actions.append(Release(freed.id))
                continue
            taken = next((one for one in reversed(spare) if one.key == need.key), None)
            taken = taken or next((one for one in reversed(spare) if not capped or one.app == need.app), None)
            if taken is not None:
                spare.remove(taken)
                actions.append(Unbind(taken.id))
    return actions


@dataclass
class Service:
    """What each session has had: slot-seconds over weight.

    One that comes, or comes back, begins with what the least served of those that wait have had: nobody saves up rights while it
    wants nothing, and nobody pays for having been alone.
    """

    had: dict[str, float] = field(default_factory=dict)
    _at: float = 0.0
    _slots: dict[str, float] = field(default_factory=dict)
    _waiting: frozenset[str] = frozenset()

    def note(self, now: float, slots: Mapping[str, float], waiting: Iterable[str]) -> None:
        """The clock goes on.

        :param slots: for each session, the slots that it holds from now on, over its weight.
        :param waiting: sessions that have fewer executors than they want, from now on.
        """
        passed = max(0.0, now - self._at)
        self._at = now
        for name, rate in self._slots.items():
            if name in self.had:
                self.had[name] += rate * passed
        self._slots = dict(slots)
        self.had = {name: self.had.get(name, -1.0) for name in slots}
        wait = frozenset(waiting) & self.had.keys()
        base = min((self.had[name] for name in wait & self._waiting if self.had[name] >= 0), default=None)
        if base is None:
            base = max((0.0, *self.had.values()))
        for name, had in self.had.items():
            if had < base and (had < 0 or name not in self._waiting):
                self.had[name] = base
        self._waiting = wait
