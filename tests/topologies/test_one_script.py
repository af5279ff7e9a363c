"""Moving a trainer from one topology to another takes a schema: its script stays the same, to the byte."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runkit import ROOT, Run, federated

from flame.spec import bundle
from flame.spec.load import load_job

JOBS = ["central", "hierarchical", "asynchronous", "distributed", "hybrid"]


def test_every_schema_gives_its_trainers_the_same_bytes(tmp_path):
    seen, shapes = [], set()
    for name in JOBS:
        job = load_job(ROOT / "examples" / "one-script" / f"{name}.yaml")
        (tmp_path / name).mkdir()
        folder = bundle.extract(job.archive, "trainer", tmp_path / name)
        seen.append((folder / "main.py").read_bytes())
        channels = tuple((channel.name, tuple(channel.pair)) for channel in job.form.schema.channels)
        shapes.add((job.form.schema.name, channels))
    assert len(seen) == len(shapes) == 5
    assert len(set(seen)) == 1
    assert b"def train" in seen[0]


@pytest.mark.parametrize("name", JOBS)
def test_the_script_learns_under_every_schema(tmp_path, name):
    with Run(tmp_path, f"one-script/{name}.yaml") as run:
        result = run.result()
    assert result.state == "completed", result.text
    model = result.models["model.safetensors"]
    if name == "asynchronous":  # which updates meet in a version depends on who is faster
        assert float(re.findall(r"accuracy ([\d.]+)", result.text)[-1]) > 0.6
        return
    w, b = federated([1, 2, 3, 4], 10)
    np.testing.assert_allclose(model["weights"], w, atol=1e-9)
    np.testing.assert_allclose(model["bias"], b, atol=1e-9)
