"""A synchronous job whose workers are killed at every point ends by itself, with the model of the undisturbed run to the bit."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import bits, central, finish, rounds


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return central(
        tmp_path_factory.mktemp("job"),
        modelSpec={"optimizer": {"sort": "fedadam"}},
        restart={"attempts": 10, "backoff": 0.1},
    )


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    document, models = finish(tmp_path_factory.mktemp("undisturbed"), job)
    assert rounds(document) == [1, 2, 3, 4, 5]
    return document, models


@pytest.mark.parametrize(
    "wishes",
    [
        [
            "aggregator@start@0.kill",
            "trainer@start@0.kill",
            "aggregator@internal_init@1.kill",
            "aggregator@distribute@1.kill",
            "trainer@train@2.kill",
        ],
        [
            "trainer@upload@2.kill",
            "aggregator@distribute+@3.kill",
            "trainer@train+@4.kill",
            "aggregator@aggregate+@4.kill",
        ],
        [
            "trainer@fetch+@2.kill",
            "aggregator@checkpoint@3.kill",
            "trainer@upload+@4.kill",
            "aggregator@checkpoint+@4.kill",
        ],
        ["aggregator@inform_end_of_training@6.kill", "aggregator@save_model+@6.kill"],
        ["aggregator@inform_end_of_training+@6.kill"],
    ],
    ids=" ".join,
)
def test_the_model_is_that_of_the_undisturbed_run_whoever_is_killed(job, undisturbed, tmp_path, wishes):
    document, models = finish(tmp_path, job, wishes)
    assert rounds(document) == [1, 2, 3, 4, 5]
    assert [entry["metrics"] for entry in document["rounds"]] == [e["metrics"] for e in undisturbed[0]["rounds"]]
    assert bits(models) == bits(undisturbed[1])
