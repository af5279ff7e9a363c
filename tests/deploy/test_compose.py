"""compose.yaml, run for real: the job's end, its state in MongoDB, its model in MLflow, and its channel over the broker."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymongo import MongoClient

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines

ROOT = Path(__file__).parents[2]


class Demo:
    """A project of compose of a test's own, with ports that are free."""

    def __init__(self, image: str) -> None:
        self.name = f"flame-test-{uuid.uuid4().hex[:8]}"
        self._environment = {**os.environ, "FLAME_IMAGE": image, "FLAME_PORT": "0", "MLFLOW_PORT": "0"}

    def compose(self, *arguments: str, check: bool = True, timeout: float = 120) -> str:
        command = ["docker", "compose", "--project-name", self.name, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0 or not check, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def inspect(self, service: str, form: str) -> str:
        container = self.compose("ps", "--all", "--quiet", service).strip()
        done = subprocess.run(["docker", "inspect", "--format", form, container], capture_output=True, text=True)
        return done.stdout.strip()

    def address(self, service: str) -> str:
        return self.inspect(service, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")


@pytest.fixture
def demo() -> Iterator[Demo]:
    missing = [name for name in ("mongo:7", "eclipse-mosquitto:2") if not engines.has_image(name)]
    if missing:
        pytest.skip(f"no image {', '.join(missing)} on a Docker engine, and none can be pulled by a test")
    demo = Demo(engines.docker_image("torch"))
    try:
        yield demo
    finally:
        demo.compose("down", "--volumes", "--remove-orphans", "--timeout", "2", check=False)


@pytest.mark.timeout(1200)
def test_docker_compose_up_trains_the_digits_with_all_that_belongs_to_it(demo: Demo) -> None:
    demo.compose("up", "--detach", "--no-build", "--pull", "never", timeout=600)
    while "worker" not in (there := demo.compose("ps", "--format", "{{.Service}} {{.State}}")).split():
        assert "job running" in there, "compose sees the workers as its own, so that it can remove them: " + there
        time.sleep(1)
    demo.compose("wait", "job", check=False, timeout=500)
    said = demo.compose("logs", "--no-log-prefix", "job")
    assert demo.inspect("job", "{{.State.ExitCode}}") == "0", said + demo.compose("logs", "server")
    assert "state    completed" in said
    assert "accuracy 0.9" in said.split("round 10/10")[1].splitlines()[0]

    with MongoClient[dict[str, object]](f"mongodb://{demo.address('mongo')}:27017") as client:
        (job,) = client["flame"]["docs.jobs"].find()
        tasks = list(client["flame"]["docs.tasks"].find())
    assert "completed" in json.dumps(job, default=str)
    assert len(tasks) == 5
    assert all("engine" in json.dumps(task, default=str) for task in tasks), "each ran on the compute of that name"

    identity = str(job["_id"])
    published = demo.compose("logs", "--no-log-prefix", "broker")
    assert f"flame/{identity}/" in published, "the channel went over the broker"
    url = f"http://{demo.address('mlflow')}:5000/api/2.0/mlflow/model-versions/search?filter=name%3D%27digits%27"
    asked = urllib.request.Request(url, headers={"Host": "mlflow:5000"})  # it answers to the names that it was told
    with urllib.request.urlopen(asked, timeout=60) as answer:
        (version,) = json.load(answer)["model_versions"]
    assert version["status"] == "READY"
    assert {"key": "flame.job", "value": identity} in version["tags"]

    left = ["docker", "ps", "--quiet", "--filter", f"network={demo.name}_default", "--filter", "label=flame.task"]
    assert subprocess.run(left, capture_output=True, text=True, check=True).stdout == ""
