"""Where workers go and who has to wait: what holds for any queue, any computes."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.controller.placement import (
    Fit,
    Load,
    Need,
    Room,
    Waiting,
    admit,
    candidates,
    fit,
    never,
    priority,
    segments,
    serving,
    total,
    with_load,
)
from flame.errors import SpecError
from flame.runners import Capacity

REGIONS = ["default", "default/us", "default/us/west", "default/eu"]
NAMES = ["a", "b", "c"]

realms = st.lists(st.sampled_from([*REGIONS, "us", "eu/north", *NAMES]), max_size=2).map(tuple)
loads = st.builds(
    Load,
    workers=st.just(1),
    cpu=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    memory=st.integers(0, 4),
    gpu=st.integers(0, 2),
)
capacities = st.builds(
    Capacity,
    slots=st.integers(1, 6) | st.none(),
    cpu=st.sampled_from([None, 1.0, 2.0, 4.0]),
    memory=st.integers(1, 8) | st.none(),
    gpu=st.integers(0, 2) | st.none(),
)


@st.composite
def needs(draw: st.DrawFn, *, most: int = 5, **fixed: object) -> list[Need]:
    count = draw(st.integers(1, most))
    made = st.builds(Need, key=st.just(""), load=fixed.get("load", loads), realms=realms)
    return [draw(made)._replace(key=str(index)) for index in range(count)]


@st.composite
def rooms(draw: st.DrawFn, *, closed: bool = True, plain: bool = False) -> list[Room]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    whys = st.sampled_from([None, None, "is drained"]) if closed else st.none()
    slots = st.integers(1, 4).map(Capacity)
    return [
        Room(
            name,
            draw(st.sampled_from(REGIONS)),
            draw(slots if plain else capacities),
            Load(workers=draw(st.integers(0, 3))),
            draw(whys),
        )
        for name in names
    ]


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    return [
        Waiting(f"job {index}", draw(st.integers(0, 2)), index, draw(needs()))
        for index in range(draw(st.integers(0, 6)))
    ]


def overfull(room: Room) -> bool:
    return any(most is not None and used > most for used, most in zip(room.used, room.capacity, strict=True))


@given(needs(), rooms())
def test_all_workers_find_a_place_where_there_is_room_or_none_does_and_it_is_said_why(
    asked: list[Need], there: list[Room]
) -> None:
    found = fit(asked, there)
    if found.reason is not None:
        assert found.chosen == {}
        assert found.reason.endswith(".")
        return
    assert set(found.chosen) == {need.key for need in asked}
    by_name = {room.name: room for room in there}
    for need in asked:
        assert found.chosen[need.key] in candidates(need.realms, there), "never outside its realm"
        assert by_name[found.chosen[need.key]].closed is None
    for before, after in zip(there, with_load(there, asked, found.chosen), strict=True):
        assert after.used == before.used or not overfull(after)


@given(needs(most=4, load=st.just(Load(workers=1))), rooms(plain=True))
def test_workers_of_one_size_find_places_whenever_there_are_any(asked: list[Need], there: list[Room]) -> None:
    possible = False
    options = [list(candidates(need.realms, there)) for need in asked]
    by_name = {room.name: room for room in there}
    for choice in product(*options):
        after = with_load(there, asked, dict(zip([need.key for need in asked], choice, strict=True)))
        chosen = [room for room in after if room.name in choice]
        if all(by_name[name].closed is None for name in choice) and not any(overfull(room) for room in chosen):
            possible = True
    assert (fit(asked, there).reason is None) == possible


@given(needs(), rooms())
def test_what_is_let_in_at_its_creation_starts_once_all_is_free(asked: list[Need], there: list[Room]) -> None:
    idle = [room._replace(used=Load(), closed=None) for room in there]
    decision = admit([Waiting("job", 0, 0.0, asked)], idle)
    assert (never(asked, there) is None) == ("job" in decision.admitted)


@given(queues(), rooms())
def test_the_queue_is_strict_on_every_compute_and_never_overfull(queue: list[Waiting], there: list[Room]) -> None:
    decision = admit(queue, there)
    assert set(decision.reasons) | set(decision.admitted) == {one.job for one in queue}
    assert not set(decision.reasons) & set(decision.admitted)
    ordered = sorted(queue, key=lambda one: (-one.priority, one.order))
    waited_for: set[str] = set()
    now = list(there)
    open_ = {room.name for room in there if room.closed is None}
    for waiting in ordered:
        wanted = {name for need in waiting.needs for name in candidates(need.realms, there)}
        if waiting.job in decision.admitted:
            chosen = decision.admitted[waiting.job]
            assert not waited_for & set(chosen.values()), "nobody takes what somebody before it waits for"
            idle = not any(room.used.workers for room in now)
            now = with_load(now, waiting.needs, chosen)
            for room in now:
                if room.name in chosen.values():
                    slots = None if idle else room.capacity.slots
                    assert not overfull(room._replace(capacity=room.capacity._replace(slots=slots)))
        else:
            alone = fit(waiting.needs, now, barred=frozenset(waited_for))
            assert alone.reason is not None, "no room is wasted"
            if all(candidates(need.realms, there).keys() & open_ for need in waiting.needs):
                waited_for |= wanted & open_
    assert decision.reserved <= open_


@given(rooms(closed=False), realms)
def test_a_realm_is_served_from_within_and_only_where_nobody_is_there_from_around(
    there: list[Room], asked: tuple[str, ...]
) -> None:
    for realm in asked:
        served = serving(realm, there)
        by_name = {room.name: segments(room.region) for room in there}
        if realm in by_name:
            assert served == {realm: 0}
            continue
        wanted = segments(realm)
        within = {name for name, region in by_name.items() if region[: len(wanted)] == wanted}
        if within:
            assert set(served) == within
        else:
            assert all(wanted[: len(by_name[name])] == by_name[name] for name in served)
        assert all(distance >= 0 for distance in served.values())


def two(**fields: object) -> list[Room]:
    return [Room("laptop", "default"), Room("west", "default/us/west", **fields)]  # type: ignore[arg-type]


def at(realm: str, there: list[Room]) -> Fit:
    return fit([Need("x", "trainer", realms=(realm,))], there)


def test_data_go_to_the_nearest_compute_of_their_realm_and_nowhere_else() -> None:
    assert at("default", two()).chosen == {"x": "laptop"}
    assert at("default/us", two()).chosen == {"x": "west"}
    assert at("us|west", two()).chosen == {"x": "west"}, "as Flame once wrote it"
    assert at("default/us/west/org1", two()).chosen == {"x": "west"}, "the smallest that contains it"
    assert at("default/eu", two()).chosen == {"x": "laptop"}, "a laptop runs what is meant for the world"
    assert at("laptop", two()).chosen == {"x": "laptop"}
    full = at("default/us", two(capacity=Capacity(slots=1), used=Load(workers=1)))
    assert full.reason == "It waits for room: it needs 1 worker on west, and 0 of 1 slots are free."
    away = at("default/us", two(closed="cannot be used now: The engine does not answer."))
    assert away.reason == (
        "It waits for a compute that can take a trainer: compute 'west' cannot be used now: The engine does not answer."
    )
    nowhere = at("default/eu", [Room("west", "default/us/west")])
    assert (
        nowhere.reason
        == "No compute serves the realm 'default/eu' of a trainer; the computes are west (default/us/west)."
    )


def test_the_reason_names_what_there_is_too_little_of() -> None:
    small = [Room("laptop", capacity=Capacity(8, 2.0, 4 << 30, 0), used=Load(1, 0.5, 3 << 30, 0))]
    big = Need("x", "trainer", Load(1, 1.0, 2 << 30, 0))
    assert fit([big], small).reason == (
        "It waits for room: a trainer needs 2Gi of memory, and compute 'laptop' has 1Gi of 4Gi free."
    )
    gpu = Need("x", "trainer", Load(1, 0.0, 0, 1))
    assert never([gpu], small) == "a trainer needs 1 GPUs, and compute 'laptop' has 0 of 0 free."
    assert never([big], small) is None
    many = [big._replace(key=str(index)) for index in range(3)]
    assert never(many, small) == (
        "a trainer needs 2Gi of memory beside the job's other workers, and compute 'laptop' has 0 of 4Gi free."
    )


def test_a_job_that_waits_for_a_compute_out_of_reach_holds_nobody_up() -> None:
    there = two(closed="cannot be used now: It is off.")
    held = Waiting("held", 1, 0.0, [Need("x", realms=("west",))])
    free = Waiting("free", 0, 1.0, [Need("y")])
    decision = admit([held, free], there)
    assert decision.admitted == {"free": {"y": "laptop"}}
    assert "It is off." in decision.reasons["held"]
    assert decision.reserved == frozenset()


def test_a_jobs_workers_stay_together_where_they_may() -> None:
    there = [Room("a", capacity=Capacity(slots=4)), Room("b", capacity=Capacity(slots=4), used=Load(workers=1))]
    asked = [Need("data", realms=("b",)), Need("one"), Need("two")]
    assert fit(asked, there).chosen == {"data": "b", "one": "b", "two": "b"}
    assert fit(asked[1:], there).chosen == {"one": "a", "two": "a"}, "the emptiest"


def test_a_priority_is_a_word_or_a_number() -> None:
    assert [priority(word) for word in ("high", "medium", "low", "75", "-1")] == [100, 50, 0, 75, -1]
    with pytest.raises(SpecError, match="no priority"):
        priority("urgent")


def test_loads_add_up() -> None:
    assert total([Load(1, 0.5, 3, 1), Load(1, 1.0, 4, 0)]) == Load(2, 1.5, 7, 1)
