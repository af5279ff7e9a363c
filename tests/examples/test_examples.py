"""The examples do what their READMEs say, through the whole system: the command, the server, the workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


def flame_run(tmp_path, example, *arguments):
    """``flame run`` with a private server in a folder of its own; gives the document that it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
    environment |= {"FLAME_DATA_DIR": str(tmp_path / "data"), "FLAME_CONFIG": str(tmp_path / "config.yaml")}
    done = subprocess.run(
        [sys.executable, "-m", "flame", "run", str(ROOT / "examples" / example), "-o", "json", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_numpy_fits_nearly_the_line_of_all_patients_together(tmp_path):
    result = flame_run(tmp_path, "numpy")
    assert result["state"] == "completed"
    assert [entry["round"] for entry in result["rounds"]] == list(range(1, 11))
    sites = [
        np.loadtxt(ROOT / "examples" / "numpy" / "data" / f"{site}.csv", delimiter=",", skiprows=1)
        for site in ("north", "south")
    ]
    table = np.vstack(sites)
    together, *_ = np.linalg.lstsq(np.column_stack([table[:, :2], np.ones(len(table))]), table[:, 2])
    model = load_file(result["model"]["path"])
    assert model["slope"] == pytest.approx(together[:2], abs=0.03)
    assert result["rounds"][-1]["metrics"] == pytest.approx(dict(zip(["bmi", "pressure"], model["slope"], strict=True)))
    assert result["model"]["registry"] == "local"
    assert (tmp_path / "data" / "registry" / "models" / "numpy" / "1" / "model.safetensors").exists()


# In a fresh process, elsewhere, without the role's code.
LOOK = """
import json, sys
import mlflow, numpy as np
uri, job, data = sys.argv[1:]
mlflow.set_tracking_uri(uri)
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "accuracy")]
(version,) = client.search_model_versions("name = 'digits'")
held_out = np.load(data)
model = mlflow.pyfunc.load_model("models:/digits/1")
scores = model.predict(held_out["x"].astype(np.float32)[:, None] / 16)
accuracy = float((scores.argmax(axis=1) == held_out["y"]).mean())
print(json.dumps([run.info.status, steps, run.data.params["rounds"], version.tags["flame.job"] == job,
                  version.tags["flame.schema"], accuracy]))
"""


def test_digits_are_read_by_a_model_that_mlflow_has_and_loads_anywhere(tmp_path):
    result = flame_run(tmp_path, "digits")
    assert result["state"] == "completed"
    accuracies = [entry["metrics"]["accuracy"] for entry in result["rounds"]]
    assert len(accuracies) == 10
    assert accuracies[-1] >= 0.93
    held_out = ROOT / "examples" / "digits" / "aggregator" / "held-out.npz"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            LOOK,
            f"sqlite:///{tmp_path}/data/mlflow.db",
            result["job"],
            str(held_out),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, steps, rounds, same_job, schema, accuracy = json.loads(done.stdout.splitlines()[-1])
    assert (status, steps, rounds, same_job, schema) == ("FINISHED", list(range(1, 11)), "10", True, "central")
    assert accuracy == pytest.approx(accuracies[-1])


def test_the_data_are_what_their_scripts_make():
    """Every digit is somewhere once, the sites' labels are skewed, and nothing needs pickle to be read."""
    folder = ROOT / "examples" / "digits"
    pictures, counts = [], []
    for path in [*sorted((folder / "data").glob("*.npz")), folder / "aggregator" / "held-out.npz"]:
        with np.load(path, allow_pickle=False) as data:
            pictures.append(data["x"])
            counts.append(np.bincount(data["y"], minlength=10))
    assert len(counts) == 5
    assert sum(map(len, pictures)) == 1797
    assert all(counts[-1] >= 30)
    assert all((site <= 4).any() for site in counts[:-1])
