"""Jobs to measure with: no-op training on a numpy model of a given size, as a folder that ``flame run`` takes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

TRAINER = """
import numpy as np
from flame.sdk import Config, Trainer

class NoOpTrainer(Trainer):
    def __init__(self, config):
        self.config = config
        self.model = None
        self.dataset_size = 1

    def load_data(self): ...
    def initialize(self):
        elements = self.config.hyperparameters.model_bytes // 4
        parts = self.config.hyperparameters.tensors
        self.model = {f"w{i}": np.ones(elements // parts, np.float32) for i in range(parts)}
    def train(self): ...
    def evaluate(self): ...

trainer = NoOpTrainer(Config("config.json"))
trainer.compose()
trainer.run()
"""

AGGREGATOR = """
import numpy as np
from flame.sdk import Config, TopAggregator

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

class NoOpAggregator(TopAggregator):
    def __init__(self, config):
        self.config = config
        self.model = None

    def load_data(self): ...
    def initialize(self):
        self.before = memory("VmRSS:")
        elements = self.config.hyperparameters.model_bytes // 4
        parts = self.config.hyperparameters.tensors
        self.model = {f"w{i}": np.ones(elements // parts, np.float32) for i in range(parts)}
    def train(self): ...
    def evaluate(self):
        if self.config.hyperparameters.watch_memory:
            self.update_metrics({"peak bytes": float(memory("VmHWM:") - self.before)})

aggregator = NoOpAggregator(Config("config.json"))
aggregator.compose()
aggregator.run()
"""


def no_op_job(
    folder: pathlib.Path,
    *,
    trainers: int,
    rounds: int,
    model_bytes: int = 1024,
    tensors: int = 1,
    watch_memory: bool = False,
) -> pathlib.Path:
    """Write a job folder: ``trainers`` trainers that train nothing, one aggregator, a float32 model of ``model_bytes`` bytes."""
    for role, code in (("trainer", TRAINER), ("aggregator", AGGREGATOR)):
        (folder / "code" / role).mkdir(parents=True)
        (folder / "code" / role / "main.py").write_text(textwrap.dedent(code))
    job = {
        "name": "no-op",
        "schema": {
            "name": "central",
            "roles": [
                {"name": "trainer", "isDataConsumer": True, "groupAssociation": [{"param-channel": "default"}]},
                {"name": "aggregator", "groupAssociation": [{"param-channel": "default"}]},
            ],
            "channels": [
                {
                    "name": "param-channel",
                    "pair": ["trainer", "aggregator"],
                    "groupBy": {"type": "tag", "value": ["default"]},
                    "funcTags": {"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]},
                }
            ],
        },
        "code": "code",
        "datasets": [
            {"id": f"site-{i}", "name": f"site-{i}", "url": f"none://{i}", "realm": "default"} for i in range(trainers)
        ],
        "dataSpec": [{"role": "trainer", "datasetGroups": {"default": [f"site-{i}" for i in range(trainers)]}}],
        "modelSpec": {
            "hyperparameters": {
                "rounds": rounds,
                "modelBytes": model_bytes,
                "tensors": tensors,
                "watchMemory": watch_memory,
            }
        },
        "registry": {"sort": "local"},
    }
    (folder / "job.json").write_text(json.dumps(job, indent=2))
    return folder


def flame_run(job: pathlib.Path, data_dir: pathlib.Path) -> dict[str, Any]:
    """``flame run JOB -o json`` with a private server; gives the document that it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("FLAME_SERVER", "FLAME_TOKEN")}
    environment |= {"FLAME_DATA_DIR": str(data_dir), "FLAME_CONFIG": str(data_dir / "config.yaml")}
    command = [sys.executable, "-m", "flame", "run", str(job), "-o", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"flame run failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document
