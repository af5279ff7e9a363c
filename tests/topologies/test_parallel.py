"""Experiments that run side by side in one job know nothing of each other, and are told apart everywhere."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from runkit import Run, federated
from treekit import DOWN, UP, Site, Top, Tree, spec, trained


def parallel():
    groups = ["a", "b", "c"]
    return {
        "name": "parallel",
        "roles": [
            {"name": "trainer", "isDataConsumer": True, "groupAssociation": [{"param": g} for g in groups]},
            {"name": "top", "groupAssociation": [{"param": g} for g in groups]},
        ],
        "channels": [
            {
                "name": "param",
                "pair": ["trainer", "top"],
                "groupBy": {"type": "tag", "value": groups},
                "funcTags": {"trainer": UP, "top": DOWN},
            }
        ],
    }


def test_each_group_computes_its_own_mean(tmp_path):
    job = Tree(tmp_path, parallel(), {"a": 2, "b": 1, "c": 3}, {"trainer": Site, "top": Top}, modelSpec=spec(4))
    job.run()
    for numbers, top in zip(([0, 1], [2], [3, 4, 5]), job["top"], strict=True):
        w, after = np.zeros(3), []
        for _ in range(4):
            w = sum((n + 1) * trained(w, n) for n in numbers) / sum(n + 1 for n in numbers)
            after.append(w)
        np.testing.assert_allclose(top.after, after, rtol=1e-12)
    assert [role.link_for_test.group for role in job["top"]] == ["a", "b", "c"]
    models = [role.link_for_test.of("model")[0] for role in job["top"]]
    assert [(model["group"], model["name"]) for model in models] == [("a", "test-a"), ("b", "test-b"), ("c", "test-c")]
    assert [Path(model["path"]).name for model in models] == [f"model-{group}.safetensors" for group in "abc"]


def test_the_example_gives_each_experiment_its_rounds_and_its_model(tmp_path):
    with Run(tmp_path, "parallel") as run:
        result = run.result()
    assert result.state == "completed"
    for group, numbers in (("half", [1, 2]), ("rest", [3, 4])):
        told = [line for line in run.told if line.startswith(f"{group}  round ")]
        assert [line.split()[2] for line in told] == [f"{number}/10" for number in range(1, 11)]
        weights, bias = federated(numbers, 10)
        np.testing.assert_allclose(result.models[f"model-{group}.safetensors"]["weights"], weights, atol=1e-9)
        np.testing.assert_allclose(result.models[f"model-{group}.safetensors"]["bias"], bias, atol=1e-9)
        assert f"parallel-{group} version 1 in the registry local" in result.text


def test_a_killed_trainer_does_not_disturb_the_other_experiment(tmp_path):
    overrides = ["hyperparameters.rounds=100", "policy.roundDeadline=30"]
    with Run(tmp_path, "parallel", *overrides) as run:
        run.wait_for("half  round 5/")
        run.kill_one("trainer")
        result = run.result()
    assert result.state == "completed"
    assert "the job goes on without it" in result.text
    for group in ("half", "rest"):
        assert any(line.startswith(f"{group}  round 100/") for line in run.told)
