"""In every topology a job whose workers are killed ends by itself, with all of its rounds; and where it is deterministic and the
topology can (docs/reliability.md), with the model of the undisturbed run."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import Run, asynchronous, bits, central, coordinated, finish, hybrid, parallel, peers, rounds, tree
from test_operations import Server

ROOT = Path(__file__).parents[2]
#: All kills may meet the same worker.
OFTEN = {"attempts": 10, "backoff": 0.1}

EXACT = {
    "tree": (
        lambda folder: tree(folder, optimizer="fedavgm"),
        [
            ["middle@distribute@2.kill", "top@checkpoint@3.kill", "trainer@train+@4.kill"],
            ["middle@upload@2.kill", "top@aggregate@3.kill", "middle@fetch+@4.kill"],
        ],
    ),
    "parallel": (
        parallel,
        [["aggregator@distribute@2.kill", "aggregator@checkpoint@3.kill", "trainer@train+@4.kill"]],
    ),
    "eager": (
        lambda folder: tree(folder, eager=True),
        [["middle@aggregate@2.kill", "top@aggregate@3.kill", "trainer@upload@4.kill", "middle@upload@5.kill"]],
    ),
    "distributed": (
        lambda folder: peers(folder, "distributed", ["ring_allreduce"], restart=OFTEN),
        [
            [
                "trainer@ring_allreduce+@1.kill",
                "trainer@train+@2.kill",
                "trainer@ring_allreduce+@3.kill",
                "trainer@checkpoint+@4.kill",
            ]
        ],
    ),
    "swarm": (
        lambda folder: peers(
            folder, "swarm", ["elect", "handover"], modelSpec={"optimizer": {"sort": "fedadam"}}, restart=OFTEN
        ),
        [["trainer@train+@2.kill", "trainer@train@3.kill", "trainer@handover+@4.kill"]],
    ),
    "gossip": (
        lambda folder: peers(folder, "gossip", ["gossip"], restart=OFTEN),
        [
            ["trainer@train@1.kill", "trainer@gossip@2.kill", "trainer@gossip+@3.kill", "trainer@checkpoint+@4.kill"],
            [
                "trainer@gossip+@1.kill",
                "trainer@train+@3.kill",
                "trainer@checkpoint@5.kill",
                "trainer@save_model@6.kill",
            ],
            ["trainer@inform_end_of_training@6.kill", "trainer@save_model+@6.kill"],
        ],
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
    "eager": (
        lambda folder: tree(folder, eager=True, deterministic=False, policy={"minTrainers": 4}),
        ["middle@aggregate+@2.kill", "top@aggregate@3.kill", "trainer@train@4.kill", "middle@upload@5.kill"],
    ),
    "tree": (
        lambda folder: tree(folder, deterministic=False, policy={"minTrainers": 4}),
        ["middle@aggregate@2.kill", "trainer@train@3.kill", "trainer@upload@4.kill", "middle@upload@5.kill"],
    ),
    "coordinated": (
        lambda folder: coordinated(folder, deterministic=False, policy={"minTrainers": 4}),
        [
            "trainer@train@1.kill",
            "middle@aggregate@2.kill",
            "trainer@train@3.kill",
            "coordinator@pair_mid_aggs_and_trainers@3.kill",
            "trainer@upload@4.kill",
            "middle@upload@5.kill",
        ],
    ),
    "overlapping": (
        lambda folder: central(
            folder,
            sites=4,
            deterministic=False,
            policy={"minTrainers": 2, "overSelection": 2.0, "roundDeadline": 30},
            modelSpec={"selector": {"sort": "random", "kwargs": {"k": 2}}},
        ),
        [
            "trainer@train@2.kill",
            "aggregator@aggregate@3.kill",
            "trainer@upload@3.kill",
            "aggregator@checkpoint@4.kill",
        ],
    ),
    "asynchronous": (asynchronous, ["trainer@train@2.kill", "top@aggregate@3.kill", "top@checkpoint+@4.kill"]),
}


@pytest.mark.parametrize("topology", EXACT)
def test_the_model_is_that_of_the_undisturbed_run(tmp_path, topology):
    make, plans = EXACT[topology]
    job = make(tmp_path / "job")
    document, models = finish(tmp_path, job)
    for number, wishes in enumerate(plans):
        again, found = finish(tmp_path, job, wishes, f"run-{number}")
        assert sorted(rounds(again)) == sorted(rounds(document)) == sorted([1, 2, 3, 4, 5] * len(models))
        assert bits(found) == bits(models), wishes


@pytest.mark.parametrize("topology", WHOLE)
def test_all_rounds_are_done(tmp_path, topology):
    make, wishes = WHOLE[topology]
    document, models = finish(tmp_path, make(tmp_path / "job"), wishes)
    assert rounds(document) == [1, 2, 3, 4, 5]
    assert models


def test_a_hybrid_job_says_that_it_cannot_be_deterministic_whoever_is_killed(tmp_path):
    server = Server(tmp_path)
    try:
        job = server.call("job", "create", str(hybrid(tmp_path / "job")), "--start")["id"]
        warnings = server.state(job, "completed")["warnings"]
    finally:
        server.process.terminate()
        server.process.communicate(timeout=30)
    assert any("policy.deterministic makes undisturbed runs of a hybrid job equal" in each for each in warnings)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A split network of four rounds, and what it ends with undisturbed."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("vertical")
    job = shutil.copytree(ROOT / "examples" / "vertical", folder / "job")
    text = (job / "job.yaml").read_text().replace("rounds: 8", "rounds: 4")
    (job / "job.yaml").write_text(text + "policy: {deterministic: true}\n")
    document, models = finish(folder, job)
    assert len(models) == 4
    return job, document, bits(models)


def test_a_split_network_goes_back_to_a_round_that_all_of_its_parties_have(tmp_path, split):
    job, document, expected = split
    again, found = finish(tmp_path, job, ["laboratory@forward@2.kill", "clinic@train+@3.kill"])
    assert rounds(again) == rounds(document) == [1, 2, 3, 4]
    assert bits(found) == expected


def test_a_party_that_is_killed_while_it_saves_leaves_its_part_of_the_network_though_the_others_are_gone(
    tmp_path, split
):
    job, _, expected = split
    with Run(tmp_path, job, ["laboratory@save_model@4.kill"]) as run:
        run.taken("laboratory@save_model@4.kill")
        (run.chaos / "laboratory@start@0.hold").touch()
        run.taken("laboratory@start@0.hold")
        run.until(lambda: list(run.data.glob("artifacts/*/model.safetensors")))
        run.release("laboratory@start@0.hold")
        document, models, err = run.result()
    assert document["state"] == "completed", (document.get("failure"), err)
    assert bits(models) == expected


@pytest.mark.parametrize("wish", ["clinic@inform_end_of_training@5.kill", "clinic@save_model+@5.kill"])
def test_an_active_party_that_is_killed_at_the_end_leaves_all_parts_of_the_network(tmp_path, split, wish):
    job, _, expected = split
    _, models = finish(tmp_path, job, [wish, "laboratory@save_model@4.kill"])
    assert bits(models) == expected
