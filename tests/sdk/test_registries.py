"""Registries keep parameters, metrics and models, never hold up a round, and outlast their own absence."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from syncjob import InThread, Job, Recorder, config

from flame.errors import MissingExtra, SpecError, WorkerError
from flame.sdk import Aggregator, Trainer, modelfile, registries


class Waiting(Recorder):
    """Lets a test wait for a warning."""

    def __init__(self, folder):
        super().__init__(folder)
        self.news = threading.Condition()

    def warning(self, message):
        with self.news:
            super().warning(message)
            self.news.notify_all()

    def wait_for_warning(self, part):
        with self.news:
            assert self.news.wait_for(lambda: any(part in w for w in self.of("warning")), 60), self.said


def opened(tmp_path, sort, uri="", link=None, job="j1", **more):
    link = link or Waiting(tmp_path / "artifacts")
    made = config("aggregator", job=job, **more)
    made.registry.sort, made.registry.uri, made.job.name = sort, str(uri), "digits"
    return registries.open_registry(made, link), link


def model_file(tmp_path, value=1.0):
    path = tmp_path / "m.safetensors"
    modelfile.save(path, {"w": np.full(3, value, np.float32)})
    return path


def test_an_unknown_registry_is_refused_with_those_that_exist(tmp_path):
    with pytest.raises(SpecError, match=r"There is no registry 'mlfow'\. Did you mean 'mlflow'\?"):
        opened(tmp_path, "mlfow")


def test_the_local_registry_keeps_params_metrics_and_numbered_models(tmp_path):
    for number in (1, 2):
        registry, link = opened(tmp_path, "local", tmp_path / "kept", job=f"j{number}")
        registry.save_params({"rounds": 3})
        registry.save_metrics(1, {"accuracy": 0.5})
        registry.save_metrics(2, {"accuracy": 0.75})
        registry.save_model("digits", None, model_file(tmp_path, number))
        version = registry.finish(1)
        assert version.version == str(number)
        assert (Path(version.uri.removeprefix("file://")) / "model.safetensors").exists()
        assert not link.of("warning")
    run = tmp_path / "kept" / "runs" / "j2"
    assert json.loads((run / "params.json").read_text())["hyperparameters"] == {"rounds": 3}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["metrics"]) for line in lines] == [(1, {"accuracy": 0.5}), (2, {"accuracy": 0.75})]
    assert registry.load_model("digits", 2)["w"].tolist() == [2, 2, 2]
    with pytest.raises(WorkerError, match=r"'digits' version 7 is not in the registry .*: it has versions 1, 2 of it"):
        registry.load_model("digits", 7)
    with pytest.raises(WorkerError, match="it has no model of that name"):
        registry.load_model("faces", 1)


def test_many_jobs_at_once_get_a_version_each(tmp_path):
    path = model_file(tmp_path)
    got = []

    def work(number):
        registry, _ = opened(tmp_path, "local", tmp_path / "kept", job=f"j{number}")
        for _ in range(5):
            registry.save_model("digits", None, path)
            got.append(registry.finish(1).version)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, got)) == list(range(1, 41))
    assert not list((tmp_path / "kept" / "models" / "digits").glob(".*"))


STUCK = """
import shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_registries import opened, model_file
def copyfile(source, target):
    target.write_bytes(b"half of it")
    print("in the middle", flush=True)
    signal.pause()
shutil.copyfile = copyfile
folder = Path({folder!r})
registry, _ = opened(folder, "local", folder / "kept", job="j1")
registry.save_model("digits", None, model_file(folder))
"""


def test_what_a_killed_worker_has_begun_is_taken_over_and_not_left(tmp_path):
    script = STUCK.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as stuck:
        assert stuck.stdout.readline() == "in the middle\n"
        stuck.kill()
    versions = tmp_path / "kept" / "models" / "digits"
    (begun,) = versions.iterdir()
    another = versions / ".new-j2-busy"
    another.mkdir()
    forgotten = versions / ".new-j3-gone"
    forgotten.mkdir()
    os.utime(forgotten, (1.0, 1.0))
    registry, link = opened(tmp_path, "local", tmp_path / "kept", job="j1")
    registry.save_model("digits", None, model_file(tmp_path))
    assert not begun.exists()
    assert sorted(path.name for path in versions.iterdir()) == [another.name, "1"]
    assert registry.load_model("digits", 1)["w"].tolist() == [1, 1, 1]
    assert not link.of("warning")


def test_a_local_registry_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    registry, link = opened(tmp_path, "local", tmp_path / "kept")
    registry.save_params({})
    registry.save_metrics(1, {"a": 1.0})
    registry.save_model("digits", None, model_file(tmp_path))
    assert registry.finish(1) is None
    (warning,) = link.of("warning")
    assert "cannot be written" in warning


def test_the_dummy_keeps_nothing_and_says_so_when_asked(tmp_path):
    registry, _ = opened(tmp_path, "dummy")
    registry.save_metrics(1, {"a": 1.0})
    assert registry.finish(1) is None
    with pytest.raises(WorkerError, match="keeps no models"):
        registry.load_model("digits", 1)


def test_a_missing_mlflow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"The registry 'mlflow' needs the package 'mlflow': pip install 'flame\[mlflow\]'"
    ):
        opened(tmp_path, "mlflow")


class BaseTrainer(InThread, Trainer):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(3, np.float32)}

    def train(self):
        self.model["w"] += 1
        self.dataset_size = 1


class BaseAggregator(InThread, Aggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(3, np.float32)}


def test_a_job_begins_from_its_base_model_whatever_initialize_makes(tmp_path):
    registry, _ = opened(tmp_path, "local", tmp_path / "kept")
    registry.save_model("digits", None, model_file(tmp_path, 40))
    job = Job(tmp_path)
    more = {"registry": {"sort": "local", "uri": str(tmp_path / "kept")}, "baseModel": {"name": "digits", "version": 1}}
    aggregator = job.add(BaseAggregator, "aggregator", rounds=2, trainers=1, **more)
    job.add(BaseTrainer, "trainer", 0)
    job.run()
    assert aggregator.model["w"].tolist() == [42, 42, 42]
    (model,) = aggregator.link_for_test.of("model")
    assert (model["registry"], model["version"], model["name"]) == ("local", "1", "test")


# MLflow itself.


def python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ROLE = """
import numpy as np, torch
from pathlib import Path
from helper import scale
import helper

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)
        self.bn = torch.nn.BatchNorm1d(1)
    def forward(self, x):
        return scale(self.bn(self.fc(x))) + helper.OFFSET

from flame.sdk.config import Config
from flame.sdk.link import Link
from flame.sdk import modelfile, registries
from flame.sdk.weights import get_weights

link = Link("artifacts")
registry = registries.open_registry(Config("config.json"), link)
registry.save_params({"rounds": 10, "learning_rate": 0.1})
for round in range(1, 11):
    registry.save_metrics(round, {"accuracy": round / 10, "loss": 1 / round})
torch.manual_seed(3)
net = Net()
if link.folder.absolute().parent.name == "job2":
    net = {"w": np.arange(4.0)}
modelfile.save("model.safetensors", get_weights(net))
registry.save_model("digits", net, Path("model.safetensors"))
version = registry.finish(100)
assert version.uri == f"models:/digits/{version.version}", version
if isinstance(net, Net):
    net.eval()
    with torch.no_grad():
        np.save("expected.npy", net(torch.ones(4, 2)).numpy())
print(version.version, len(list(Path("artifacts").iterdir())))
"""

FRESH = """
import mlflow, numpy as np
mlflow.set_tracking_uri(URI)
model = mlflow.pyfunc.load_model(f"models:/digits/{VERSION}")
got = model.predict(np.ones((4, 2), np.float32))
assert np.allclose(got, np.load(EXPECTED)), got
module = mlflow.pytorch.load_model(f"models:/digits/{VERSION}")
assert type(module).__name__ == "Net"
plain = mlflow.pyfunc.load_model(f"models:/digits/{3 - VERSION}")
assert plain.predict(np.zeros((1, 1)))["w"].tolist() == [0, 1, 2, 3]

client = mlflow.MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name == "digits"]
for run in client.search_runs([experiment.experiment_id]):
    history = client.get_metric_history(run.info.run_id, "accuracy")
    print(run.data.tags["flame.job"], run.data.tags["flame.schema"], run.info.status, run.data.params["rounds"],
          [(m.step, m.value) for m in history] == [(r, r / 10) for r in range(1, 11)])
for version in client.search_model_versions("name = 'digits'"):
    print(version.tags["flame.job"], version.tags["flame.schema"])
"""


def role_folder(tmp_path, uri, job):
    folder = tmp_path / job
    folder.mkdir()
    (folder / "helper.py").write_text("OFFSET = 5.0\ndef scale(x):\n    return 3 * x\n")
    (folder / "main.py").write_text(ROLE)
    raw = {
        "taskid": "a",
        "role": "aggregator",
        "job": {"id": job, "name": "digits"},
        "schema": "central",
        "channels": [{"name": "c", "pair": ["trainer", "aggregator"]}],
        "registry": {"sort": "mlflow", "uri": uri},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_two_jobs_at_once_fill_a_fresh_mlflow_and_their_models_load_and_predict_elsewhere(tmp_path):
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    folders = [role_folder(tmp_path, uri, job) for job in ("job1", "job2")]
    running = [
        subprocess.Popen(
            [sys.executable, "main.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for folder in folders
    ]
    results = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results.append(out.split())
    assert sorted(version for version, _ in results) == ["1", "2"]
    assert {left for _, left in results} == {"0"}
    names = f"URI = {uri!r}\nVERSION = {results[0][0]}\nEXPECTED = {str(folders[0] / 'expected.npy')!r}\n"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = python(names + FRESH, elsewhere)
    assert sorted(out.splitlines()) == [
        "job1 central",
        "job1 central FINISHED 10 True",
        "job2 central",
        "job2 central FINISHED 10 True",
    ]
    assert (tmp_path / "store" / "mlartifacts" / "digits").is_dir()
    # The weights of such a version are a base model for any role, without its class.
    registry, _ = opened(tmp_path, "mlflow", uri)
    registry.close()
    weights = registry.load_model("digits", int(results[0][0]))
    theirs, _ = modelfile.load(folders[0] / "model.safetensors")
    assert weights.keys() == theirs.keys()
    assert all(np.array_equal(weights[name], theirs[name]) for name in theirs)
    with pytest.raises(WorkerError, match=r"baseModel 'digits' version 9 cannot be loaded from sqlite:.*: .*not found"):
        registry.load_model("digits", 9)


def test_an_absent_mlflow_is_told_and_gets_everything_when_it_is_back(tmp_path):
    store = tmp_path / "store"
    store.write_text("a file where the folder should be")
    uri = f"sqlite:///{store}/mlflow.db"
    registry, link = opened(tmp_path, "mlflow", uri)
    registry.save_params({"rounds": 2})
    registry.save_metrics(1, {"accuracy": 0.5})
    link.wait_for_warning("has not answered since")
    registry.save_metrics(2, {"accuracy": 0.75})
    store.unlink()
    link.wait_for_warning("is back since")
    registry.save_model("digits", {"w": np.ones(3)}, model_file(tmp_path))
    version = registry.finish(60)
    assert version.version == "1"
    assert len(link.of("warning")) == 2
    out = python(
        f"""if True:
        import mlflow, numpy
        mlflow.set_tracking_uri({uri!r})
        model = mlflow.pyfunc.load_model("models:/digits/1")
        print(model.predict(numpy.zeros((1, 1)))["w"].tolist())
        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        print(run.data.metrics)
        """,
        tmp_path,
    )
    assert out.splitlines() == ["[1.0, 1.0, 1.0]", "{'accuracy': 0.75}"]


def test_a_job_ends_in_time_without_its_registry_and_keeps_what_it_should_have_got(tmp_path):
    store = tmp_path / "store"
    store.write_text("a file where the folder should be")
    uri = f"sqlite:///{store}/mlflow.db"
    registry, link = opened(tmp_path, "mlflow", uri)
    registry.save_metrics(1, {"accuracy": 0.5})
    registry.save_model("digits", {"w": np.ones(3)}, model_file(tmp_path))
    link.wait_for_warning("has not answered since")
    assert registry.finish(0.2) is None
    assert "did not take the model within 0.2 s" in link.of("warning")[-1]
    assert registry._process.returncode is not None
    # By hand, later: the spool is finished by the same command.
    import shutil

    (archive,) = (tmp_path / "artifacts").iterdir()
    shutil.unpack_archive(archive, tmp_path / "spool")
    store.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "flame.sdk.registries.mlflow_worker", "run", str(tmp_path / "spool")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["version"] == "1"


def test_a_store_whose_making_was_cut_off_is_made_anew(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    tags = {"flame.job": "j1", "flame.schema": ""}
    about = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "digits", "run": "r", "tags": tags}
    (spool / "about.json").write_text(json.dumps(about))
    (spool / "ops.jsonl").write_text(json.dumps({"op": "end", "status": "FINISHED"}) + "\n")
    command = [sys.executable, "-m", "flame.sdk.registries.mlflow_worker", "run", str(spool)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        half_made, pause = tmp_path / ".mlflow.db.new", threading.Event()
        while not (half_made.exists() and half_made.stat().st_size):
            assert first.poll() is None
            pause.wait(0.005)
        first.kill()
    assert not (tmp_path / "mlflow.db").exists()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=100, check=True)
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["open", "done"]


def test_a_job_that_fails_marks_its_run_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("flame.sdk.registries.mlflow.FAREWELL_SECONDS", 60)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry, _ = opened(tmp_path, "mlflow", uri)
    registry.save_metrics(1, {"accuracy": 0.5})
    with registry._news:
        assert registry._news.wait_for(lambda: registry.run is not None, 60)
    registry.close()
    registry.close()
    assert registry._process.returncode == 0
    assert not registry.spool.exists()
    code = "import mlflow; run = mlflow.MlflowClient(URI).get_run(RUN); print(run.info.status, run.data.metrics)"
    out = python(code.replace("URI", repr(uri)).replace("RUN", repr(registry.run)), tmp_path)
    assert out.strip() == "FAILED {'accuracy': 0.5}"


def test_a_database_of_mlflow_keeps_its_files_in_a_bucket_when_it_is_told_to(tmp_path, s3):
    link = Waiting(tmp_path / "artifacts")
    made = config("aggregator", job="j1")
    made.registry.sort, made.registry.uri, made.job.name = "mlflow", f"sqlite:///{tmp_path}/mlflow.db", "digits"
    made.registry.artifacts = f"s3://{s3.bucket}/{tmp_path.name}/mlflow"
    registry = registries.open_registry(made, link)
    registry.save_model("digits", {"w": np.arange(3)}, model_file(tmp_path, 7.0))
    version = registry.finish(60)
    assert version is not None, link.said
    files = [name for name in s3.objects() if name.startswith(f"{tmp_path.name}/mlflow/digits/")]
    assert [name for name in files if name.endswith("model.safetensors")], files
    assert not (tmp_path / "mlartifacts").exists()
    assert registry.load_model("digits", version.version)["w"].tolist() == [7.0] * 3
