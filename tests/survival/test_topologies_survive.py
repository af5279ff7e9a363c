"""In every topology a job whose workers are killed ends by itself, with all of its rounds; and where it is deterministic and the
topology can (docs/reliability.md), with the model of the undisturbed run."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import asynchronous, bits, coordinated, finish, hybrid, peers, rounds, tree

ROOT = Path(__file__).parents[2]

EXACT = {
    "tree": (
        lambda folder: tree(folder, optimizer="fedavgm"),
        [
            ["middle@distribute@2.kill", "top@checkpoint@3.kill", "trainer@train+@4.kill"],
            ["middle@upload@2.kill", "top@aggregate@3.kill", "middle@fetch+@4.kill"],
        ],
    ),
    "distributed": (
        lambda folder: peers(folder, "distributed", ["ring_allreduce"]),
        [["trainer@train+@2.kill", "trainer@train@3.kill", "trainer@checkpoint+@4.kill"]],
    ),
    "swarm": (
        lambda folder: peers(folder, "swarm", ["elect", "handover"], modelSpec={"optimizer": {"sort": "fedadam"}}),
        [["trainer@train+@2.kill", "trainer@train@3.kill"]],
    ),
    "coordinated": (
        coordinated,
        [
            ["middle@distribute@2.kill", "coordinator@pair_mid_aggs_and_trainers@3.kill", "trainer@train@4.kill"],
            ["top@aggregate@3.kill"],
        ],
    ),
}

WHOLE = {
    "hybrid": (hybrid, ["trainer@train@2.kill", "top@aggregate@3.kill", "trainer@upload@4.kill"]),
    "asynchronous": (asynchronous, ["trainer@train@2.kill", "top@aggregate@3.kill", "top@checkpoint+@4.kill"]),
    "gossip": (lambda folder: peers(folder, "gossip", ["gossip"]), ["trainer@train@2.kill", "trainer@gossip@3.kill"]),
}


@pytest.mark.parametrize("topology", EXACT)
def test_the_model_is_that_of_the_undisturbed_run(tmp_path, topology):
    make, plans = EXACT[topology]
    job = make(tmp_path / "job")
    document, models = finish(tmp_path, job)
    for number, wishes in enumerate(plans):
        again, found = finish(tmp_path, job, wishes, f"run-{number}")
        assert rounds(again) == rounds(document) == [1, 2, 3, 4, 5]
        assert bits(found) == bits(models), wishes


@pytest.mark.parametrize("topology", WHOLE)
def test_all_rounds_are_done(tmp_path, topology):
    make, wishes = WHOLE[topology]
    document, models = finish(tmp_path, make(tmp_path / "job"), wishes)
    assert rounds(document) == [1, 2, 3, 4, 5]
    assert models


def test_a_split_network_goes_back_to_a_round_that_all_of_its_parties_have(tmp_path):
    pytest.importorskip("torch")
    shutil.copytree(ROOT / "examples" / "vertical", tmp_path / "vertical")
    job = tmp_path / "vertical" / "job.yaml"
    job.write_text(job.read_text().replace("rounds: 8", "rounds: 4") + "policy: {deterministic: true}\n")
    document, models = finish(tmp_path, tmp_path / "vertical")
    wishes = ["laboratory@forward@2.kill", "clinic@train+@3.kill"]
    again, found = finish(tmp_path, tmp_path / "vertical", wishes, "disturbed")
    assert rounds(again) == rounds(document) == [1, 2, 3, 4]
    assert len(models) == 4
    assert bits(found) == bits(models)
