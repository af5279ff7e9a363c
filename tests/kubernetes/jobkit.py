"""A server, the `flame` command that talks to it, and jobs of plain scripts whose workers are pods."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from engines import kubectl
from waiting import blocked_until

TOKEN = "token-of-the-test"
#: A pod that asks for nothing gets next to nothing of a processor that others use.
SHARE = {"requests": {"cpu": "50m"}}

#: Trains for as many rounds as it is told. An aggregator that finds a gate on its way waits until it is open.
TRAINER = """
from flame.sdk import Config, Trainer
import numpy as np

class Site(Trainer):
    dataset_size = 1
    def __init__(self, config): self.config = config
    def load_data(self): pass
    def initialize(self): self.model = {"w": np.zeros(4, np.float32)}
    def train(self):
        if self.config.hyperparameters.get("eat"):
            held = [np.random.bytes(1 << 20) for _ in range(10000)]
        self.model["w"] += 1
    def evaluate(self): pass

site = Site(Config("config.json"))
site.compose()
site.run()
"""

AGGREGATOR = """
import time
from flame.sdk import Aggregator, Config
import numpy as np

class Mean(Aggregator):
    def __init__(self, config): self.config = config
    def load_data(self): pass
    def initialize(self): self.model = {"w": np.zeros(4, np.float32)}
    def train(self): pass
    def evaluate(self):
        print("round", self._round, float(self.model["w"][0]), flush=True)
        time.sleep(self.config.hyperparameters.get("pause", 0))

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""


def our_address() -> str:
    """The address of this machine as pods see it: the one from which it speaks with the cluster."""
    server = kubectl("config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
    split = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((split.hostname, split.port or 443))
        return str(probe.getsockname()[0])


class Flame:
    """The `flame` command with a server and a folder of its own."""

    def __init__(self, folder: Path, server: str = "", token: str = TOKEN) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        self.environment |= {"FLAME_CONFIG": str(folder / "config.yaml"), "FLAME_SERVER": server, "FLAME_TOKEN": token}

    def __call__(self, *arguments: str) -> Any:
        """What a command prints, as JSON."""
        done = subprocess.run(
            [sys.executable, "-m", "flame", *arguments, "-o", "json"],
            env=self.environment,
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def submit(self, name: str, trainers: int = 2, **fields: Any) -> str:
        """Start a job of plain scripts; gives its id."""
        folder = self.folder / name
        for role, script in (("trainer", TRAINER), ("aggregator", AGGREGATOR)):
            (folder / role).mkdir(parents=True, exist_ok=True)
            (folder / role / "main.py").write_text(script)
        form = {
            "name": name,
            "schema": {
                "name": "central",
                "roles": [{"name": "trainer", "isDataConsumer": True}, {"name": "aggregator"}],
                "channels": [
                    {
                        "name": "param-channel",
                        "pair": ["trainer", "aggregator"],
                        "funcTags": {"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]},
                    }
                ],
            },
            "code": ".",
            "datasets": [f"https://example.invalid/{number}" for number in range(trainers)],
            "registry": {"sort": "dummy"},
            **fields,
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(form))
        return str(self("job", "create", str(folder), "--start")["id"])

    def job(self, id: str) -> Any:
        return self("job", "get", id)

    def tasks(self, id: str) -> Any:
        found = self("task", "list", id)
        return found["items"] if isinstance(found, dict) else found

    def ended(self, id: str, seconds: float = 90) -> Any:
        """The job, once it has ended."""

        def look() -> Any:
            job = self.job(id)
            return job if job["state"] in ("completed", "failed", "terminated") else None

        return blocked_until(look, seconds)


class Server:
    """A `flame serve` process that pods can reach, with one compute: a namespace of the cluster."""

    def __init__(self, folder: Path, namespace: str, kubeconfig: str, image: str, **config: Any) -> None:
        self.folder = folder
        self.computes = folder / "computes.yaml"
        self.computes.write_text(
            yaml.safe_dump(
                [
                    {
                        "name": "cluster",
                        "kind": "kubernetes",
                        "config": {
                            "kubeconfig": kubeconfig,
                            "namespace": namespace,
                            "image": image,
                            "resources": SHARE,
                            **config,
                        },
                    }
                ]
            )
        )
        self.address = our_address()
        self.log = folder / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, *options: str) -> Flame:
        command = [sys.executable, "-m", "flame", "serve", "--host", self.address, "--port", "0"]
        command += ["--insecure-plain-http", "--data-dir", str(self.folder / "data"), "--computes", str(self.computes)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *options], stderr=log, start_new_session=True, env={**environment, "FLAME_TOKEN": TOKEN}
            )
        self.url = blocked_until(self._listens)
        return Flame(self.folder, self.url)

    def _listens(self) -> Any:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            there = json.loads((self.folder / "data" / "server.json").read_text())
        except (OSError, ValueError):
            return None
        return there["url"] if there["pid"] == self.process.pid else None

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
