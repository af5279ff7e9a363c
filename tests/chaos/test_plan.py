"""What a user writes of who shall be hit when, as it is understood."""

from random import Random

import pytest

from flame.chaos.plan import PHASES, Deed, duration, read
from flame.errors import UsageError


def understood(text, act="kill"):
    return read(act, text, Random(7), rounds=5)


def test_a_role_at_a_round_is_hit_when_that_round_is_given_out():
    assert understood("aggregator@round=3") == Deed(act="kill", who="aggregator", phase="distribute", round=3)


def test_a_phase_may_be_called_as_one_speaks_of_it():
    assert (
        understood("server@uploading=2")
        == understood("server@upload=2")
        == Deed(act="kill", who="server", phase="upload", round=2)
    )
    assert understood("server@before-start").phase == "start"


def test_a_worker_of_a_role_has_a_number():
    assert understood("trainer/2@train=1").number == 2


def test_what_is_left_open_is_drawn_and_the_same_seed_draws_the_same():
    drawn = [read("kill", "trainer", Random(seed), rounds=5) for seed in range(40)]
    assert drawn == [read("kill", "trainer", Random(seed), rounds=5) for seed in range(40)]
    assert {deed.phase for deed in drawn} == set(PHASES)
    assert all(deed.round is None or 1 <= deed.round <= 5 for deed in drawn)


def test_a_deed_is_asked_for_at_the_points_of_its_phase():
    assert understood("server@upload=2").wishes() == ["*@upload@2.hold"]
    assert understood("server@stop").wishes() == ["*@inform_end_of_training@*.hold"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@upload", "no target"),
        ("server@lunch", "There is no phase 'lunch'"),
        ("server@round", "which round"),
        ("server@upload=9", "There is no round 9: the job has 5"),
    ],
)
def test_what_cannot_be_is_said(text, says):
    with pytest.raises(UsageError, match=says):
        understood(text)


def test_durations_have_units():
    assert [duration(text) for text in ("20s", "500ms", "2m", "3")] == [20, 0.5, 120, 3]
    with pytest.raises(UsageError, match="no duration"):
        duration("soon")
