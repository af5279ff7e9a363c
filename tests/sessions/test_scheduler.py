"""The scheduler's promises, for any sessions on any nodes."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flame.controller.placement import Load, Room
from flame.runners.base import Capacity
from flame.sessions.manager.ground import Ground
from flame.sessions.scheduler import Bind, Held, Need, Node, Release, Service, Start, Unbind, deserve, plan

NODES = st.lists(
    st.builds(
        Node,
        name=st.just(""),
        slots=st.integers(0, 8),
        cpu=st.one_of(st.none(), st.integers(0, 8).map(float)),
        memory=st.one_of(st.none(), st.integers(0, 8)),
        gpu=st.one_of(st.none(), st.integers(0, 2)),
        starting=st.none(),
    ),
    min_size=1,
    max_size=3,
).map(lambda nodes: [node._replace(name=f"n{k}") for k, node in enumerate(nodes)])

NEEDS = st.lists(
    st.builds(
        Need,
        id=st.just(""),
        key=st.sampled_from("ab"),
        app=st.sampled_from("xy"),
        order=st.just(0),
        tasks=st.integers(0, 12),
        priority=st.integers(0, 2),
        weight=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        least=st.integers(0, 3),
        most=st.one_of(st.none(), st.integers(3, 8)),
        batch=st.integers(1, 3),
        slots=st.integers(1, 2),
        cpu=st.sampled_from([0.0, 1.0, 2.0]),
        memory=st.integers(0, 3),
        gpu=st.integers(0, 1),
        had=st.floats(0, 3),
        blocked=st.booleans(),
    ),
    max_size=5,
).map(lambda needs: [need._replace(id=f"s{k}", order=k) for k, need in enumerate(needs)])

PLAIN = st.lists(
    st.builds(
        Need,
        id=st.just(""),
        key=st.just("k"),
        app=st.just("x"),
        order=st.just(0),
        tasks=st.integers(0, 20),
        priority=st.integers(0, 2),
        weight=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
        least=st.integers(0, 3),
        most=st.one_of(st.none(), st.integers(3, 8)),
        batch=st.just(1),
        slots=st.just(1),
        cpu=st.just(0.0),
        memory=st.just(0),
        gpu=st.just(0),
        had=st.floats(0, 3),
        blocked=st.just(False),
    ),
    min_size=1,
    max_size=6,
).map(lambda needs: [need._replace(id=f"s{k}", order=k) for k, need in enumerate(needs)])


class Cluster:
    """Does what the plan says, one action at a time, and checks that it can be done."""

    def __init__(self, needs: list[Need], nodes: list[Node], caps: dict[str, int]) -> None:
        self.needs = {need.id: need for need in needs}
        self.nodes = nodes
        self.caps = caps
        self.executors: dict[str, Held] = {}
        self._names = itertools.count()

    def settle(self) -> None:
        for _ in range(200):
            actions = plan(list(self.needs.values()), self.nodes, list(self.executors.values()), self.caps)
            if not actions:
                return
            for action in actions:
                self.do(action)
            self.check()
        raise AssertionError("it never comes to rest")

    def do(self, action: Start | Bind | Unbind | Release) -> None:
        if isinstance(action, Start):
            need = self.needs[action.session]
            name = f"e{next(self._names)}"
            sizes = need.slots, need.cpu, need.memory, need.gpu
            self.executors[name] = Held(
                name, action.node, need.key, need.app, need.id, True, True, False, False, *sizes
            )
        elif isinstance(action, Bind):
            one = self.executors[action.executor]
            assert one.session is None
            assert one.key == self.needs[action.session].key
            self.executors[one.id] = one._replace(session=action.session)
        elif isinstance(action, Unbind):
            one = self.executors[action.executor]
            assert one.session is not None
            self.executors[one.id] = one._replace(session=None)
        else:
            assert self.executors.pop(action.executor).session is None

    def check(self) -> None:
        for node in self.nodes:
            free = self.free(node)
            assert all(left >= -1e-9 for left in free), (node, free)
        for app, count in Counter(one.app for one in self.executors.values()).items():
            assert count <= self.caps.get(app, count)
        for name, count in self.held().items():
            need = self.needs[name]
            assert count <= need.wants
            assert need.most is None or count <= need.most

    def held(self) -> Counter[str]:
        return Counter(one.session for one in self.executors.values() if one.session is not None)

    def free(self, node: Node, *, idle: bool = False) -> list[float]:
        mine = [one for one in self.executors.values() if one.node == node.name and (one.session or not idle)]
        used = [sum(one[field] for one in mine) for field in range(9, 13)]
        return [float("inf") if limit is None else limit - u for limit, u in zip(node[1:5], used, strict=True)]

    def fits(self, need: Need, count: int) -> bool:
        """Whether a group would fit beside all that serves somebody."""
        found = 0
        for node in self.nodes:
            free = self.free(node, idle=True)
            size = need.slots, need.cpu, need.memory, need.gpu
            while found < count and all(one <= left for one, left in zip(size, free, strict=True)):
                free = [left - one for one, left in zip(size, free, strict=True)]
                found += 1
        return found >= count


def distinct(needs: list[Need]) -> list[Need]:
    """Executors that can be exchanged are of one size and one application."""
    sizes: dict[str, Need] = {}
    for need in needs:
        sizes.setdefault(need.key, need)
    return [
        need._replace(
            app=sizes[need.key].app,
            slots=sizes[need.key].slots,
            cpu=sizes[need.key].cpu,
            memory=sizes[need.key].memory,
            gpu=sizes[need.key].gpu,
        )
        for need in needs
    ]


@given(NEEDS, NODES, st.dictionaries(st.sampled_from("xy"), st.integers(0, 6)))
@settings(max_examples=150, deadline=None)
def test_what_is_given_fits_and_nobody_has_more_than_it_may(
    needs: list[Need], nodes: list[Node], caps: dict[str, int]
) -> None:
    given = deserve(needs, nodes, caps)
    for need in needs:
        assert given[need.id] % need.batch == 0
        assert given[need.id] <= need.wants
        assert need.most is None or given[need.id] <= need.most
    for app, cap in caps.items():
        assert sum(given[need.id] for need in needs if need.app == app) <= cap
    for field in ("slots", "cpu", "memory", "gpu"):
        limits = [getattr(node, field) for node in nodes]
        if None not in limits:
            assert sum(given[need.id] * getattr(need, field) for need in needs) <= sum(limits)


@given(NEEDS.map(distinct), NODES, st.dictionaries(st.sampled_from("xy"), st.integers(0, 6)))
@settings(max_examples=150, deadline=None)
def test_the_plan_comes_to_rest_without_ever_taking_more_room_than_there_is(
    needs: list[Need], nodes: list[Node], caps: dict[str, int]
) -> None:
    cluster = Cluster(needs, nodes, caps)
    cluster.settle()


@given(PLAIN, st.lists(PLAIN, max_size=3), st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_work_is_conserved_and_minimums_are_kept_whatever_was_there_before(
    needs: list[Need], before: list[list[Need]], slots: int
) -> None:
    cluster = Cluster(needs, [Node("n", slots)], {})
    for earlier in [*before, needs]:
        cluster.needs = {need.id: need for need in earlier}
        for name, one in cluster.executors.items():  # whose session is gone, is idle
            if one.session not in cluster.needs:
                cluster.executors[name] = one._replace(session=None)
        for session, count in cluster.held().items():  # and whose session wants less, too
            mine = [one.id for one in cluster.executors.values() if one.session == session]
            for name in mine[: max(0, count - cluster.needs[session].wants)]:
                cluster.executors[name] = cluster.executors[name]._replace(session=None)
        cluster.settle()
    held = cluster.held()
    final = cluster.needs.values()
    free = slots - held.total()
    assert free >= 0
    for need in final:
        assert held[need.id] == need.wants or free == 0  # nothing lies idle that somebody could use
    if sum(min(need.least, need.wants) for need in final) <= slots:
        for need in final:
            assert held[need.id] >= min(need.least, need.wants)
    for low, high in itertools.permutations(final, 2):
        if low.priority < high.priority and held[high.id] < high.wants:
            assert held[low.id] <= low.least


def fair(weights: list[float], slots: int) -> list[float]:
    return [weight * slots / sum(weights) for weight in weights]


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0]), min_size=1, max_size=6), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_shares_converge_to_the_weights_and_nobody_starves(weights: list[float], slots: int) -> None:
    service, step, steps = Service(), 0.1, 600
    names = [f"s{k}" for k in range(len(weights))]
    held = dict.fromkeys(names, 0)
    had = dict.fromkeys(names, 0.0)
    last = dict.fromkeys(names, 0)
    for now in range(steps):
        rates = {name: held[name] / weight for name, weight in zip(names, weights, strict=True)}
        service.note(now * step, rates, names)
        needs = [
            Need(name, "k", "x", k, 1000, weight=weight, had=service.had[name])
            for k, (name, weight) in enumerate(zip(names, weights, strict=True))
        ]
        held = deserve(needs, [Node("n", slots)], held=held)
        for name in names:
            had[name] += held[name] / steps
            if held[name]:
                last[name] = now
            else:
                share = fair(weights, slots)[names.index(name)]
                assert (now - last[name]) * step <= 5 / min(share, 1.0), f"{name} has waited too long"
    for name, share in zip(names, fair(weights, slots), strict=True):
        assert abs(had[name] - share) <= 0.1 * share + 0.1, (had, fair(weights, slots))


def test_whole_shares_hold_still() -> None:
    service, held, moves = Service(), {"a": 0, "b": 0}, 0
    for now in range(100):
        service.note(now * 0.1, {"a": held["a"] / 1, "b": held["b"] / 3}, ["a", "b"])
        needs = [
            Need("a", "k", "x", 0, 100, weight=1, had=service.had["a"]),
            Need("b", "k", "x", 1, 100, weight=3, had=service.had["b"]),
        ]
        fresh = deserve(needs, [Node("n", 4)], held=held)
        moves += fresh != held
        held = fresh
    assert held == {"a": 1, "b": 3}
    assert moves == 1


def test_who_comes_late_has_no_claim_for_the_time_before() -> None:
    service = Service()
    service.note(0.0, {"old": 4.0}, ["old"])
    service.note(100.0, {"old": 4.0, "new": 0.0}, ["old", "new"])
    assert service.had["new"] == service.had["old"] == 400.0


def test_an_executor_is_reused_before_one_is_started_and_idle_ones_make_room() -> None:
    need = Need("s", "k", "x", 0, 1)
    idle = Held("e1", "n", "k", "x", None, True, False)
    assert plan([need], [Node("n", 4)], [idle]) == [Bind("s", "e1")]
    other = idle._replace(key="other")
    assert plan([need], [Node("n", 4)], [other]) == [Start("s", "n")]
    assert plan([need], [Node("n", 1)], [other]) == [Release("e1")]
    leaving = other._replace(leaving=True)
    assert plan([need], [Node("n", 1)], [leaving]) == []
    back = idle._replace(leaving=True, back=True)
    assert plan([need], [Node("n", 4)], [back]) == []


def test_as_many_are_started_at_once_as_a_node_allows() -> None:
    need = Need("s", "k", "x", 0, 10)
    node = Node("n", 8, starting=2)
    assert plan([need], [node], []) == [Start("s", "n")] * 2
    starting = Held("e1", "n", "k", "x", "s", False, False)
    assert plan([need], [node], [starting]) == [Start("s", "n")]


def test_a_late_session_takes_from_who_has_too_many_and_idle_ones_first() -> None:
    old = Need("old", "k", "x", 0, 10, had=9.0)
    new = Need("new", "k", "x", 1, 10, had=9.0)
    held = [Held(f"e{k}", "n", "k", "x", "old", True, k != 2) for k in range(4)]
    actions = plan([old, new], [Node("n", 4)], held)
    assert actions[0] == Unbind("e2")
    assert len(actions) == 2


class Computes:
    """What the computes say of their room."""

    def __init__(self, *rooms: Room, reserved: frozenset[str] = frozenset()) -> None:
        self.reserved = reserved
        self._rooms = rooms

    def rooms(self) -> tuple[Room, ...]:
        return self._rooms


def nodes(computes: Computes) -> dict[str, int | None]:
    return {node.name: node.slots for node in Ground(computes).nodes([])}  # type: ignore[arg-type]


def test_a_compute_without_a_number_of_slots_still_has_an_end() -> None:
    unlimited = Room("a", capacity=Capacity(slots=None, cpu=2.0), used=Load(3))
    unknown, counted = Room("b", capacity=Capacity()), Room("c", capacity=Capacity(slots=5), used=Load(1))
    closed = Room("d", capacity=Capacity(slots=5), closed="is drained")
    assert nodes(Computes(unlimited, unknown, counted, closed)) == {"a": 13, "b": 64, "c": 4}


def test_nobody_takes_room_that_jobs_wait_for() -> None:
    assert nodes(Computes(Room("a", capacity=Capacity(slots=5)), reserved=frozenset({"a"}))) == {"a": 0}
