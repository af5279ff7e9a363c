"""Topologies whose messages are not those of training run over a broker too."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "mqtt"))
from mqttkit import Mosquitto
from runkit import Run, federated


@pytest.fixture
def broker(tmp_path):
    made = Mosquitto(tmp_path / "broker")
    yield json.dumps([{"sort": "mqtt", "host": made.address}])
    made.kill()


@pytest.mark.parametrize(
    ("example", "more"), [("vertical", ["hyperparameters.rounds=2"]), ("analytics", []), ("evaluation", [])]
)
def test_the_example_gives_over_mqtt_what_it_gives_over_p2p(tmp_path, broker, example, more):
    tables = []
    for settings in ([], ["backend=mqtt", f"brokers={broker}"]):
        folder = tmp_path / f"run-{len(tables)}"
        folder.mkdir()
        with Run(folder, example, *settings, *more, "policy.deterministic=true") as run:
            result = run.result()
        assert result.state == "completed", result.text
        (kept,) = run.data.glob("registry/runs/*/metrics.jsonl")
        tables.append([json.loads(line)["metrics"] for line in kept.read_text().splitlines()])
    assert tables[0][0]
    assert tables[0] == [pytest.approx(metrics) for metrics in tables[1]]


@pytest.mark.parametrize("example", ["coordinated", "eager", "swarm"])
def test_training_over_mqtt_ends_at_the_formulas_model(tmp_path, broker, example):
    with Run(tmp_path, example, "backend=mqtt", f"brokers={broker}", "hyperparameters.rounds=5") as run:
        result = run.result()
    assert result.state == "completed", result.text
    weights, bias = federated([1, 2, 3, 4], 5)
    assert np.allclose(result.models["model.safetensors"]["weights"], weights, rtol=0, atol=1e-9)
    assert np.allclose(result.models["model.safetensors"]["bias"], bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("example", ["async", "gossip", "parallel"])
def test_training_without_one_formula_runs_over_mqtt_too(tmp_path, broker, example):
    with Run(tmp_path, example, "backend=mqtt", f"brokers={broker}", "hyperparameters.rounds=5") as run:
        result = run.result()
    assert result.state == "completed", result.text
    assert len(result.models) == (2 if example == "parallel" else 1)
