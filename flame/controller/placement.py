"""Who may start now, and where. Pure: queue and room in, decisions out.

**Realms.** A worker may be bound to a realm: its dataset's, or the one that the job or the schema gives its role. A realm
is a compute's name or a region, such as ``default/us``. Where computes lie in that region, only those will do, the nearest
first: data does not leave its realm because it is crowded, out of reach or drained. Where none does, those whose own
region contains the realm will do, the smallest first, so that a laptop, which lies in ``default``, can run what is
meant for the world. ``default`` is the whole world, and need not be written.

**Room.** A compute has room for so many workers (slots), cores, bytes and GPUs; what it does not say has no limit. A worker
takes one slot and what its resources say. Among equally near computes the one that the job uses already is preferred,
since its workers talk to each other, then the emptiest.

**The queue.** A job's workers are admitted together or not at all: half a topology only waits and takes room from others. The
order is by priority, then by who came first, and it is strict: nobody takes room on a compute for which somebody before it
waits, or a big job would wait for ever behind a stream of small ones. Who waits for a compute that is out of reach holds
nobody up. A job with more workers than there are slots runs when nothing else does; memory, cores and GPUs, of which
there is no more than there is, are never promised twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

from flame.errors import SpecError
from flame.runners.base import Capacity
from flame.spec.nouns import JobForm, Placement, Resources, Schema, TaskConfig
from flame.spec.quantities import show_bytes

PRIORITIES = {"high": 100, "medium": 50, "low": 0}
#: The region that contains all others.
WORLD = "default"
_FOR_ROOM = "It waits for room: "


class Load(NamedTuple):
    """What workers take: how many they are, cores, bytes, GPUs."""

    workers: int = 0
    cpu: float = 0.0
    memory: int = 0
    gpu: int = 0

    def plus(self, other: Load) -> Load:
        """Both together."""
        return Load(
            self.workers + other.workers, self.cpu + other.cpu, self.memory + other.memory, self.gpu + other.gpu
        )


def total(loads: Iterable[Load]) -> Load:
    """All of some loads together."""
    return reduce(Load.plus, loads, Load())


def placement_of(form: JobForm, schema: Schema, role: str) -> Placement:
    """Where the workers of a role run and with what: as the job says, else as the schema says."""
    said = next((one.placement for one in schema.roles if one.name == role), None)
    return form.placement.get(role) or said or Placement()


def need_of(form: JobForm, schema: Schema, config: TaskConfig) -> Need:
    """The place that a task's worker needs."""
    placement = placement_of(form, schema, config.role)
    realms = {realm for realm in (config.realm, placement.realm) if segments(realm)}
    return Need(config.taskid, config.role, load_of(placement.resources), tuple(sorted(realms)))


def load_of(resources: Resources) -> Load:
    """What one worker takes."""
    return Load(1, resources.cpu or 0.0, resources.memory_bytes or 0, resources.gpu)


class Room(NamedTuple):
    """A compute, as far as placement is concerned.

    :ivar closed: why it takes no new workers now; None where it does.
    """

    name: str
    region: str = WORLD
    capacity: Capacity = Capacity()
    used: Load = Load()
    closed: str | None = None


class Need(NamedTuple):
    """One worker that wants a place.

    :ivar key: what the caller knows it by.
    :ivar label: what people know it by, such as its role.
    :ivar load: what it takes.
    :ivar realms: it must be in all of these.
    """

    key: str
    label: str = "worker"
    load: Load = Load(workers=1)
    realms: tuple[str, ...] = ()


class Waiting(NamedTuple):
    """A job in the queue. ``order`` grows with the time at which it was started."""

    job: str
    priority: int
    order: float
    needs: Sequence[Need]


class Fit(NamedTuple):
    """Where each worker goes, by its key; empty where not all can go, and ``reason`` then says why.

    :ivar busy: the computes for whose room it is to wait; none where room would be of no use.
    """

    chosen: dict[str, str]
    reason: str | None = None
    busy: frozenset[str] = frozenset()


class Decision(NamedTuple):
    """Where the workers of the jobs go that start now; for each other job the sentence that says what it waits for.

    :ivar reserved: the computes whose room is waited for: nobody else may take it.
    """

    admitted: dict[str, dict[str, str]]
    reasons: dict[str, str]
    reserved: frozenset[str] = frozenset()


def priority(word: str) -> int:
    """A priority as a number: ``high``, ``medium``, ``low``, or an integer written out (100, 50 and 0 are those three).

    :raises flame.errors.SpecError: it is neither.
    """
    known = PRIORITIES.get(word)
    if known is not None:
        return known
    try:
        return int(word)
    except ValueError:
        raise SpecError(f"{word!r} is no priority; use high, medium, low or an integer.", "job: priority") from None


def segments(region: str) -> tuple[str, ...]:
    """A region's parts, from the largest on. Flame once wrote ``|`` for ``/``; the world itself has no parts."""
    parts = tuple(part for part in region.replace("|", "/").split("/") if part)
    return parts[1:] if parts[:1] == (WORLD,) else parts


def serving(realm: str, rooms: Sequence[Room]) -> dict[str, int]:
    """The computes that serve a realm, each with its distance; of them the nearest are wanted first."""
    if any(room.name == realm for room in rooms):
        return {realm: 0}
    wanted = segments(realm)
    size = len(wanted)
    regions = {room.name: segments(room.region) for room in rooms}
    within = {name: len(region) - size for name, region in regions.items() if region[:size] == wanted}
    around = {name: size - len(region) for name, region in regions.items() if wanted[: len(region)] == region}
    return within or around


def candidates(realms: Sequence[str], rooms: Sequence[Room]) -> dict[str, int]:
    """The computes that serve all of some realms, each with its distance, whether there is room or not."""
    found = {room.name: 0 for room in rooms}
    for realm in realms:
        served = serving(realm, rooms)
        found = {name: distance + served[name] for name, distance in found.items() if name in served}
    return found


def fit(needs: Sequence[Need], rooms: Sequence[Room], *, barred: frozenset[str] = frozenset()) -> Fit:
    """Find each worker a place, or none at all.

    Those that may be at the fewest computes choose first, and among them the largest. For workers of one size that finds places
    whenever there are any, since realms lie within each other or apart; for different sizes it may, rarely, miss a way
    to pack them.

    :param barred: computes whose room others wait for.
    """
    served = {realms: candidates(realms, rooms) for realms in {need.realms for need in needs}}
    there = {need.key: served[need.realms] for need in needs}
    for need in needs:
        if not there[need.key]:
            return Fit({}, _homeless(need, rooms))
    closed = {room.name: room.closed for room in rooms if room.closed is not None}
    for need in needs:
        if there[need.key].keys() <= closed.keys():
            which = "; ".join(f"compute {name!r} {closed[name]}" for name in there[need.key])
            return Fit({}, f"It waits for a compute that can take a {need.label}: {which.removesuffix('.')}.")
    by_name = {room.name: room for room in rooms}
    used = {room.name: room.used for room in rooms}
    chosen: dict[str, str] = {}
    mine: set[str] = set()
    for need in sorted(needs, key=lambda one: (len(there[one.key]), -one.load.gpu, -one.load.memory, -one.load.cpu)):
        distances = there[need.key]
        open_now = [
            name
            for name in distances
            if by_name[name].closed is None
            and name not in barred
            and _fits(need.load, used[name], by_name[name].capacity)
        ]
        if not open_now:
            now = [room._replace(used=used[room.name]) for room in rooms]
            return _refusal(need, needs, there, now, before=rooms, barred=barred)
        best = min(open_now, key=_preference(distances, by_name, used, mine))
        chosen[need.key] = best
        mine.add(best)
        used[best] = used[best].plus(need.load)
    return Fit(chosen)


def never(needs: Sequence[Need], rooms: Sequence[Room]) -> str | None:
    """Why workers could not be placed even if nothing else ran and every compute were there; None where they could."""
    empty = [_unlimited(room._replace(used=Load(), closed=None)) for room in rooms]
    reason = fit(needs, empty).reason
    return None if reason is None else reason.removeprefix(_FOR_ROOM)


def admit(queue: Sequence[Waiting], rooms: Sequence[Room]) -> Decision:
    """Decide who starts, and where.

    :param queue: the waiting jobs, in any order.
    :param rooms: the computes, in the order in which they were registered.
    """
    admitted: dict[str, dict[str, str]] = {}
    reasons: dict[str, str] = {}
    reserved: frozenset[str] = frozenset()
    before: list[frozenset[str]] = []
    rooms = list(rooms)
    for waiting in sorted(queue, key=lambda one: (-one.priority, one.order)):
        found = fit(waiting.needs, rooms, barred=reserved)
        if found.reason is not None and not any(room.used.workers for room in rooms):
            found = fit(waiting.needs, [_unlimited(room) for room in rooms], barred=reserved)
        if found.reason is None:
            admitted[waiting.job] = found.chosen
            rooms = with_load(rooms, waiting.needs, found.chosen)
            continue
        reasons[waiting.job] = found.reason
        if ahead := sum(bool(found.busy & other) for other in before):
            jobs = "job is" if ahead == 1 else "jobs are"
            reasons[waiting.job] = f"{_FOR_ROOM}{ahead} {jobs} ahead of it in the queue."
        before.append(found.busy)
        reserved |= found.busy
    return Decision(admitted, reasons, reserved)


def with_load(rooms: Sequence[Room], needs: Sequence[Need], chosen: Mapping[str, str]) -> list[Room]:
    """The computes with workers placed on them."""
    used = {room.name: room.used for room in rooms}
    for need in needs:
        used[chosen[need.key]] = used[chosen[need.key]].plus(need.load)
    return [room._replace(used=used[room.name]) for room in rooms]


def _fits(load: Load, used: Load, capacity: Capacity) -> bool:
    total = used.plus(load)
    return all(
        most is None or not mine or sum_ <= most + 1e-9 for mine, sum_, most in zip(load, total, capacity, strict=True)
    )


def _unlimited(room: Room) -> Room:
    return room._replace(capacity=room.capacity._replace(slots=None))


def _preference(
    distances: Mapping[str, int], rooms: Mapping[str, Room], used: Mapping[str, Load], mine: set[str]
) -> Callable[[str], tuple[float, ...]]:
    order = {name: at for at, name in enumerate(rooms)}

    def key(name: str) -> tuple[float, ...]:
        slots = rooms[name].capacity.slots
        fullness = used[name].workers / slots if slots else 0.0
        return distances[name], name not in mine, fullness, order[name]

    return key


# ------------------------------------------------------------------------------------------------- the sentences


def _homeless(need: Need, rooms: Sequence[Room]) -> str:
    there = ", ".join(f"{room.name} ({room.region})" for room in rooms) or "none"
    if not need.realms:
        return f"There is no compute that could run a {need.label}: register one with `flame compute create`."
    realms = " and ".join(repr(realm) for realm in need.realms)
    return f"No compute serves the realm {realms} of a {need.label}; the computes are {there}."


def _refusal(
    need: Need,
    needs: Sequence[Need],
    there: Mapping[str, Mapping[str, int]],
    rooms: Sequence[Room],
    *,
    before: Sequence[Room],
    barred: frozenset[str],
) -> Fit:
    """Why a worker has no place.

    :param rooms: the computes with those of its job's workers that have found one.
    :param before: the computes without them.
    """
    roomy = [room for room in rooms if room.name in there[need.key] and room.closed is None]
    wanted = {name for one in needs for name in there[one.key]}
    busy = frozenset(room.name for room in rooms if room.name in wanted and room.closed is None)
    if barred & busy:
        return Fit({}, f"{_FOR_ROOM}others are ahead of it in the queue.", busy)
    for at, word, show in ((3, "GPUs", _number), (2, "of memory", _bytes), (1, "cores", _number)):
        if not need.load[at] or any(_fits(_only(need.load, at), room.used, room.capacity) for room in roomy):
            continue
        lines = ", ".join(
            f"{room.name!r} has {show(max(0, (room.capacity[at] or 0) - room.used[at]))} of "
            f"{show(room.capacity[at] or 0)} free"
            for room in roomy
        )
        others = " beside the job's other workers" if len(needs) > 1 else ""
        asks = f"a {need.label} needs {show(need.load[at])} {word}{others}"
        return Fit({}, f"{_FOR_ROOM}{asks}, and compute {lines}.", busy)
    names = {room.name for room in roomy}
    return Fit({}, _no_slots(needs, there, rooms, [room for room in before if room.name in names]), busy)


def _no_slots(
    needs: Sequence[Need], there: Mapping[str, Mapping[str, int]], rooms: Sequence[Room], roomy: Sequence[Room]
) -> str:
    """Why there is no slot for a worker that may be at certain computes."""
    names = {room.name for room in roomy}
    rivals = [one for one in needs if there[one.key].keys() <= names]
    slots = sum(room.capacity.slots or 0 for room in roomy)
    placed = sum(room.used.workers for room in roomy)
    on = "" if len(roomy) == len(rooms) else f" on {', '.join(sorted(names))}"
    asks = f"it needs {len(rivals)} worker{'s' if len(rivals) != 1 else ''}{on}"
    if len(rivals) > slots:
        return f"It waits until nothing else runs: {asks}, more than the {slots} slots there are."
    free = max(0, slots - placed)
    return f"{_FOR_ROOM}{asks}, and {free} of {slots} slots are free."


def _only(load: Load, at: int) -> Load:
    return Load(*(value if index == at else 0 for index, value in enumerate(load)))  # type: ignore[arg-type]


def _bytes(amount: float) -> str:
    return show_bytes(int(amount))


def _number(amount: float) -> str:
    return f"{amount:g}"
