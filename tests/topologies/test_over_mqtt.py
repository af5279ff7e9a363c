"""Topologies whose messages are not those of training run over a broker too."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "mqtt"))
from mqttkit import Mosquitto
from runkit import Run


@pytest.fixture
def broker(tmp_path):
    made = Mosquitto(tmp_path / "broker")
    yield json.dumps([{"sort": "mqtt", "host": made.address}])
    made.kill()


@pytest.mark.parametrize("example", ["vertical", "analytics", "evaluation"])
def test_the_example_gives_over_mqtt_what_it_gives_over_p2p(tmp_path, broker, example):
    tables = []
    for settings in ([], ["backend=mqtt", f"brokers={broker}"]):
        folder = tmp_path / f"run-{len(tables)}"
        folder.mkdir()
        with Run(folder, example, *settings, "policy.deterministic=true") as run:
            result = run.result()
        assert result.state == "completed", result.text
        (kept,) = run.data.glob("registry/runs/*/metrics.jsonl")
        tables.append([json.loads(line)["metrics"] for line in kept.read_text().splitlines()])
    assert tables[0][0]
    assert tables[0] == [pytest.approx(metrics) for metrics in tables[1]]
