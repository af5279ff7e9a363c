"""The same rounds with Flame and with Flower: 10 trainer processes, a 50 MB numpy model, training that does nothing.

Flower comes from PyPI (``flwr``), in an environment of its own, made on the first run in the user's cache directory. It runs as its
documentation deploys it: a SuperLink, ten SuperNodes, the app started with ``flwr run``, all on this machine without TLS. A
round is the time from one configuration of training to the next, and the peak memory is that of the process that aggregates, in
models of 50 MB above what it held before.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from typing import Any

from benchmarks.jobs import flame_run, no_op_job
from benchmarks.report import Figure, report

MODEL = 50_000_000
TENSORS = 50
TRAINERS = 10
ROUNDS = 4
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flame-benchmarks" / "flower"

SERVER = """
import json, time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

class Timed(FedAvg):
    times = []
    def configure_train(self, *args, **kwargs):
        self.times.append(time.perf_counter())
        return super().configure_train(*args, **kwargs)

app = ServerApp()

@app.main()
def main(grid, context):
    given = context.run_config
    before = memory("VmRSS:")
    part = given["model"] // 4 // given["tensors"]
    model = ArrayRecord(numpy_ndarrays=[np.ones(part, np.float32) for _ in range(given["tensors"])])
    n = given["trainers"]
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=n, min_available_nodes=n)
    result = strategy.start(grid=grid, initial_arrays=model, num_rounds=given["rounds"])
    end = [*strategy.times, time.perf_counter()]
    with open(given["result"], "w") as file:
        json.dump({"seconds": [b - a for a, b in zip(end, end[1:])], "peak": memory("VmHWM:") - before,
                   "sum": float(sum(a.sum() for a in result.arrays.to_numpy_ndarrays()))}, file)
"""

CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
"""

PROJECT = """
[project]
name = "noop"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "flame"

[tool.flwr.app.components]
serverapp = "noop.server_app:app"
clientapp = "noop.client_app:app"

[tool.flwr.app.config]
model = {model}
tensors = {tensors}
trainers = {trainers}
rounds = {rounds}
result = "{result}"
"""


def flower() -> pathlib.Path:
    """The folder of Flower's commands; installed on the first run."""
    binaries = CACHE / "bin"
    if not (binaries / "flower-superlink").exists():
        print(f"installing flwr into {CACHE} ...", file=sys.stderr, flush=True)
        venv.create(CACHE, with_pip=True)
        subprocess.run([binaries / "pip", "install", "--quiet", "--quiet", "flwr", "numpy"], check=True)
    return binaries


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


def flower_rounds(scratch: pathlib.Path) -> dict[str, Any]:
    """Run the rounds with Flower; gives the seconds of each and the peak memory in bytes."""
    binaries, result = flower(), scratch / "result.json"
    app, home = scratch / "app", scratch / "home"
    (app / "noop").mkdir(parents=True)
    home.mkdir()
    (app / "noop" / "__init__.py").touch()
    (app / "noop" / "server_app.py").write_text(textwrap.dedent(SERVER))
    (app / "noop" / "client_app.py").write_text(textwrap.dedent(CLIENT))
    (app / "pyproject.toml").write_text(
        PROJECT.format(model=MODEL, tensors=TENSORS, trainers=TRAINERS, rounds=ROUNDS, result=result)
    )
    link, *nodes = free_ports(1 + TRAINERS)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    here = "127.0.0.1"
    superlink = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
    commands = [[*superlink, "--host", here, "--port", str(link)]]
    commands += [
        ["flower-supernode", "--insecure", "--superlink", f"{here}:{link}", "--host", here, "--port", str(port)]
        for port in nodes
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((scratch / "flower.log").open("w"))
        for command in commands:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
            if command is commands[0]:
                wait_for(link)
        if subprocess.run(["flwr", "run", str(app)], env=environment, stdout=log, stderr=log, check=False).returncode:
            raise SystemExit(f"Flower did not start:\n{(scratch / 'flower.log').read_text()[-4000:]}")
        deadline = time.monotonic() + 300
        while not result.exists() or not result.read_text().endswith("}"):
            if time.monotonic() > deadline:
                raise SystemExit(f"Flower did not finish:\n{(scratch / 'flower.log').read_text()[-4000:]}")
            time.sleep(0.2)
    document: dict[str, Any] = json.loads(result.read_text())
    return document


def wait_for(port: int) -> None:
    """Wait until something listens on a port of this machine."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise SystemExit(f"Nothing listens on port {port} after a minute.")


def main() -> None:
    """Measure both, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        job = no_op_job(
            scratch / "job", trainers=TRAINERS, rounds=ROUNDS, model_bytes=MODEL, tensors=TENSORS, watch_memory=True
        )
        document = flame_run(job, scratch / "data")
        theirs = flower_rounds(scratch)
    ours = statistics.median(entry["seconds"] for entry in document["rounds"][1:])
    our_peak = max(entry["metrics"]["peak bytes"] for entry in document["rounds"]) / MODEL
    flowers = statistics.median(theirs["seconds"][1:])
    report(
        [
            Figure("round with Flame, 10 trainers, 50 MB", ours, "s", "<= 0.6"),
            Figure("round with Flower, 10 trainers, 50 MB", flowers, "s"),
            Figure("Flower's round in rounds of Flame", flowers / ours, "x"),
            Figure("aggregator's peak, Flame", our_peak, "models", "<= 3"),
            Figure("aggregator's peak, Flower", theirs["peak"] / MODEL, "models"),
        ]
    )


if __name__ == "__main__":
    main()
