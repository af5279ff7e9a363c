"""Who is chosen, what happens when somebody leaves, and that a restart goes on alike."""

import json
import math
from collections import Counter
from datetime import timedelta

import pytest

from flame.errors import SpecError
from flame.sdk import selectors
from flame.sdk.selectors.base import PROP_ROUND_DURATION, PROP_STAT_UTILITY


class FakeEnd:
    def __init__(self, **properties):
        self.properties = properties

    def get_property(self, key):
        return self.properties.get(key)

    def set_property(self, key, value):
        self.properties[key] = value


def crowd(number):
    return {f"t{i:02}": FakeEnd() for i in range(number)}


def test_by_default_everyone_takes_part():
    assert selectors.make("default").select(crowd(3), {}) == ["t00", "t01", "t02"]


def test_random_takes_k_and_stands_by_it_for_a_round():
    selector, ends = selectors.make("random", {"k": 3, "seed": 1}), crowd(10)
    first = selector.select(ends, {"round": 1, "state": "send"})
    assert len(set(first)) == 3
    assert selector.select(ends, {"round": 1, "state": "recv"}) == first
    counts = Counter(end for number in range(2, 600) for end in selector.select(ends, {"round": number}))
    assert set(counts) == set(ends)
    assert max(counts.values()) < 1.5 * min(counts.values())
    assert len(selectors.make("random", {"k": 30}).select(ends, {"round": 1})) == 10


def test_a_seed_repeats_the_choices():
    runs = [
        [selectors_.select(crowd(20), {"round": number}) for number in range(5)]
        for selectors_ in (selectors.make("random", {"k": 4, "seed": 7}), selectors.make("random", {"k": 4, "seed": 7}))
    ]
    assert runs[0] == runs[1]


def test_everyone_has_a_turn():
    selector, ends = selectors.make("round_robin", {"k": 2}), crowd(5)
    turns = [selector.select(ends, {"round": number}) for number in range(1, 6)]
    assert turns == [["t00", "t01"], ["t02", "t03"], ["t04", "t00"], ["t01", "t02"], ["t03", "t04"]]


KWARGS = {
    "default": {},
    "random": {"k": 3, "seed": 3},
    "round_robin": {"k": 3},
    "oort": {"k": 3, "seed": 3},
    "fedbuff": {"c": 3, "seed": 3},
    "async_oort": {"c": 3, "seed": 3},
}


@pytest.mark.parametrize("sort", selectors.names())
def test_an_end_that_leaves_is_never_chosen_again_and_takes_no_place(sort):
    selector, ends = selectors.make(sort, KWARGS[sort]), crowd(6)
    first = selector.select(ends, {"round": 1, "state": "send"})
    for end in first:
        ends.pop(end, None)
        if len(ends) <= 3:
            break
    gone = set(crowd(6)) - set(ends)
    assert gone.isdisjoint(selector.select(ends, {"round": 1, "state": "recv"}))
    for number in range(2, 10):
        chosen = selector.select(ends, {"round": number, "state": "send"})
        assert set(chosen) <= set(ends)
        waited = selector.select(ends, {"round": number, "state": "recv"})
        assert set(waited) <= set(ends)
        assert waited
    assert selector.select({}, {"round": 10, "state": "send"}) == []


@pytest.mark.parametrize("sort", selectors.names())
def test_a_restarted_selector_keeps_its_place(sort):
    def world():
        return {
            f"t{i:02}": FakeEnd(**{PROP_STAT_UTILITY: float(i + 1), PROP_ROUND_DURATION: timedelta(seconds=20 - i)})
            for i in range(12)
        }

    def answer(ends):
        for end in ends.values():
            end.set_property("state", "recvd")

    first, ends = selectors.make(sort, KWARGS[sort]), world()
    for number in range(1, 30):
        first.select(ends, {"round": number, "state": "send"})
        answer(ends)
    second = selectors.make(sort, KWARGS[sort])
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    if sort in {"fedbuff", "async_oort"}:
        ends_again = world()
        answer(ends_again)
        assert len(second.select(ends_again, {"round": 30, "state": "send"})) == 3
    else:
        for number in range(30, 40):
            props = {"round": number, "state": "send"}
            assert first.select(ends, props) == second.select(world(), props)


def test_fedbuff_keeps_c_ends_busy():
    selector, ends = selectors.make("fedbuff", {"c": 4, "seed": 1}), crowd(10)
    busy = set(selector.select(ends, {"state": "send"}))
    assert len(busy) == 4
    assert selector.select(ends, {"state": "send"}) == []
    assert set(selector.select(ends, {"state": "recv"})) == busy
    answered = sorted(busy)[:2]
    for end in answered:
        ends[end].set_property("state", "recvd")
    more = set(selector.select(ends, {"state": "send"}))
    assert len(more) == 2
    assert len((busy - set(answered)) | more) == 4
    del ends[next(iter(more))]
    assert len(selector.select(ends, {"state": "send"})) == 1


def told(utilities, durations=None):
    ends = {}
    for i, utility in enumerate(utilities):
        ends[f"t{i:02}"] = FakeEnd(**{PROP_STAT_UTILITY: utility})
        if durations:
            ends[f"t{i:02}"].set_property(PROP_ROUND_DURATION, durations[i])
    return ends


def test_oort_prefers_ends_of_high_utility():
    ends = told([float(i) for i in range(1, 41)])
    selector = selectors.make("oort", {"k": 10, "exploration_factor": 0.0, "min_exploration_factor": 0.0, "seed": 1})
    counts = Counter(end for number in range(1, 50) for end in selector.select(ends, {"round": number}))
    assert set(counts) <= {f"t{i:02}" for i in range(28, 40)}  # within 95 % of the tenth best


def test_oort_computes_the_utility_of_its_paper():
    selector = selectors.make("oort", {"k": 2, "round_threshold": 50})
    selector.last_round = {"a": 4, "b": 2, "c": 9}
    utility = {"a": 5.0, "b": 100.0, "c": 3.0} | {f"x{i}": 1.0 for i in range(17)}
    durations = {"a": 10.0, "b": 1.0, "c": 40.0} | {f"x{i}": 20.0 for i in range(17)}
    total = selector.total_utility(utility, durations, 10)

    def bonus(last):
        return math.sqrt(0.1 * math.log(10) / last)

    # The 95th percentile of the twenty is 5: b's outlier is clipped to it. Half of the ends take at most 20 s.
    assert total["a"] == pytest.approx(5 + bonus(4))
    assert total["b"] == pytest.approx(5 + bonus(2))
    assert total["c"] == pytest.approx((3 + bonus(9)) * (20 / 40) ** 2)
    assert total["x0"] == pytest.approx(1 + bonus(1))


def test_oort_explores_less_and_less_but_never_stops():
    ends = told([1.0] * 20 + [None] * 80)
    selector = selectors.make("oort", {"k": 10, "seed": 1})
    new = [end for end in selector.select(ends, {"round": 1}) if ends[end].get_property(PROP_STAT_UTILITY) is None]
    assert len(new) == 9
    for number in range(2, 300):
        chosen = selector.select(ends, {"round": number})
    assert selector.epsilon == 0.2
    assert sum(ends[end].get_property(PROP_STAT_UTILITY) is None for end in chosen) == 2


def test_oort_tries_the_faster_newcomers_first():
    ends = told([None] * 40, durations=[1.0] * 20 + [100.0] * 20)
    selector = selectors.make("oort", {"k": 10, "seed": 1})
    assert sum(end < "t20" for end in selector.select(ends, {"round": 1})) >= 9


def test_the_pacer_gives_slow_ends_a_chance_when_there_is_less_to_gain():
    selector = selectors.make("oort", {"k": 2, "pacer_step": 3, "exploration_factor": 0, "min_exploration_factor": 0})
    for number in range(1, 7):
        selector.select(told([10.0 / number] * 4, durations=[1.0, 2.0, 3.0, 4.0]), {"round": number})
    assert selector.threshold == 35
    for number in range(7, 10):
        selector.select(told([10.0 * number] * 4, durations=[1.0, 2.0, 3.0, 4.0]), {"round": number})
    assert selector.threshold == 35


def test_an_end_on_the_blocklist_rests():
    selector = selectors.make("oort", {"k": 1, "blocklist_threshold": 2, "exploration_factor": 0})
    ends = told([100.0, 1.0])
    assert [selector.select(ends, {"round": number}) for number in (1, 2, 3)] == [["t00"], ["t00"], ["t01"]]


def test_arguments_are_checked_with_a_sentence():
    with pytest.raises(SpecError, match="'random' needs the argument 'k'"):
        selectors.make("random")
    with pytest.raises(SpecError, match="k must be at least 1"):
        selectors.make("random", {"k": 0})
    with pytest.raises(SpecError, match="needs k"):
        selectors.make("oort")
    with pytest.raises(SpecError, match="'async_oort' takes no argument 'pacer_stepp'"):
        selectors.make("async_oort", {"c": 2, "pacer_stepp": 3})


def test_choices_are_the_same_in_every_run_though_ids_differ():
    for sort in ("random", "round_robin"):
        runs = []
        for prefix in ("x", "a"):
            ends = dict(zip([f"{prefix}{(7 * i) % 10}" for i in range(10)], crowd(10).values(), strict=True))
            selector, places = selectors.make(sort, {"k": 4, **({"seed": 5} if sort == "random" else {})}), list(ends)
            runs.append([[places.index(end) for end in selector.select(ends, {"round": n})] for n in range(1, 6)])
        assert runs[0] == runs[1]
