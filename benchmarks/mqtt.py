"""A 100 MB model to 4 trainers through Mosquitto, beside a bare publish; then 5 rounds, with and without broken brokers.

The limit on the same machine is the same broker with nothing around it: paho-mqtt publishes the same chunks with QoS 1
to four paho-mqtt subscribers that only count bytes. The two take turns in the same processes. What ours adds is what
makes it a transport: proof of origin over every byte, delivery that survives the broker, and a buffer for the model.

The rounds are real roles in processes of their own, run by hand: 4 trainers, each of which adds its number to the model.
They are run with a broker that stays, and with one that is killed and started again twice in the middle, forgetting
everything; the models must be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import paho.mqtt.client as paho

from benchmarks.report import Figure, report
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.mqtt import CHUNK_BYTES, MqttBackend
from flame.sdk.channel import Channel

SIZE = 100_000_000
TENSORS = 50
TRAINERS = 4
REPEATS = 7
ROUNDS = 5
KEY = b"benchmark" * 4
GO, BARE, END = "go", "bare", "end"
BARE_TOPIC = "bare/chunks"

ROLE = """
import hashlib, sys
import numpy as np
from flame.sdk import Aggregator, Config, Trainer

SIZE, TENSORS = {size}, {tensors}

class Ours:
    def load_data(self): pass
    def evaluate(self): pass
    def initialize(self):
        self.model = {{f"w{{i}}": np.zeros(SIZE // TENSORS // 4, np.float32) for i in range(TENSORS)}}

class Site(Ours, Trainer):
    dataset_size = 1
    def __init__(self, config): self.config = config
    def train(self):
        for array in self.model.values():
            array += int(self.config.dataset)

class Study(Ours, Aggregator):
    def __init__(self, config): self.config = config
    def save_metrics(self):
        print("round", self._round, flush=True)
        super().save_metrics()

config = Config("config.json")
role = (Site if config.role == "trainer" else Study)(config)
role.compose()
role.run()
"""


class Broker:
    """A Mosquitto of our own with its settings as they ship."""

    def __init__(self, folder: pathlib.Path) -> None:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if program is None:
            raise SystemExit("This benchmark needs Eclipse Mosquitto: install its package.")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nlog_type none\n")
        self.command = [program, "-c", str(config)]
        self.start()

    def start(self) -> None:
        """Start, and wait until it listens."""
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it; it forgets everything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def join(end: str, role: str, other: str, port: int) -> tuple[MqttBackend, Channel]:
    """A worker with one channel."""
    me = Member(end=end, role=role)
    backend = MqttBackend(BackendContext(job="benchmark", key=KEY, me=me, broker=f"127.0.0.1:{port}"))
    channel = Channel("c", backend=backend, job="benchmark", me=me, other_role=other)
    channel.join()
    return backend, channel


def receive(index: int, port: int, orders: Connection) -> None:
    """A receiver of both kinds: takes a model by its channel, or counts bare bytes, as it is told."""
    backend, channel = join(f"t{index}", "trainer", "aggregator", port)
    channel.await_join(30)
    count, complete, subscribed = 0, threading.Event(), threading.Event()

    def counted(client: Any, data: Any, message: paho.MQTTMessage) -> None:
        nonlocal count
        count += len(message.payload)
        if count >= SIZE:
            complete.set()

    bare = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    bare.on_message = counted
    bare.on_subscribe = lambda *args: subscribed.set()
    bare.connect("127.0.0.1", port)
    bare.subscribe(BARE_TOPIC, 1)
    bare.loop_start()
    subscribed.wait(30)
    orders.send("ready")
    while (order := orders.recv()) != END:
        if order == GO:
            message, _ = channel.recv("agg", 60)
            assert message is not None
            assert len(message["weights"]) == TENSORS
            del message
        else:
            complete.wait(60)
            count = 0
            complete.clear()
        orders.send("done")
    bare.disconnect()
    bare.loop_stop()
    channel.leave()
    backend.close()


def throughput(port: int) -> tuple[float, float]:
    """MB/s of the model, to all four at once: ours and bare. Medians of turns."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    backend, channel = join("agg", "aggregator", "trainer", port)
    processes = []
    for index in range(TRAINERS):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        processes.append(context.Process(target=receive, args=(index, port, theirs)))
        processes[-1].start()
    for pipe in pipes:
        pipe.recv()
    channel.wait_until(lambda: len(channel.all_ends()) == TRAINERS, 60)
    bare = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    bare.connect("127.0.0.1", port)
    bare.loop_start()
    model = {f"w{i}": np.full(SIZE // TENSORS // 4, i, np.float32) for i in range(TENSORS)}
    flat = np.concatenate(list(model.values())).data.cast("B")
    taken: dict[str, list[float]] = {GO: [], BARE: []}
    for turn in range(2 * (REPEATS + 1)):
        what = (GO, BARE)[turn % 2]
        for pipe in pipes:
            pipe.send(what)
        began = time.perf_counter()
        if what == GO:
            failed = channel.broadcast({"weights": model})
            assert not failed
        else:
            for start in range(0, len(flat), CHUNK_BYTES):
                bare.publish(BARE_TOPIC, bytes(flat[start : start + CHUNK_BYTES]), 1)
        for pipe in pipes:
            pipe.recv()
        if turn > 1:
            taken[what].append(time.perf_counter() - began)
    for pipe in pipes:
        pipe.send(END)
    channel.leave()
    backend.close()
    bare.disconnect()
    bare.loop_stop()
    for process in processes:
        process.join(30)
    ours, limit = (SIZE / 1e6 / statistics.median(taken[what]) for what in (GO, BARE))
    return ours, limit


@contextlib.contextmanager
def workers(folder: pathlib.Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Four trainers and an aggregator, run by hand; gives the aggregator."""
    processes: list[subprocess.Popen[str]] = []
    for number in range(TRAINERS + 1):
        role = "trainer" if number else "aggregator"
        place = folder / f"{role}-{number}"
        place.mkdir()
        config = {
            "taskid": f"{role}-{number}",
            "role": role,
            "job": {"id": "benchmark", "name": "benchmark"},
            "realm": "default",
            "backend": "mqtt",
            "brokers": [{"sort": "mqtt", "host": f"127.0.0.1:{port}"}],
            "channels": [
                {
                    "name": "param",
                    "pair": ["trainer", "aggregator"],
                    "groupBy": {"type": "tag", "value": ["default"]},
                    "funcTags": {"aggregator": ["distribute", "aggregate"], "trainer": ["fetch", "upload"]},
                }
            ],
            "groupAssociation": {"param": "default"},
            "dataset": str(number) if number else "",
            "hyperparameters": {"rounds": ROUNDS},
            "registry": {"sort": "dummy", "uri": ""},
            "policy": {"minTrainers": TRAINERS, "joinDeadline": 120},
        }
        (place / "config.json").write_text(json.dumps(config))
        (place / "main.py").write_text(ROLE.format(size=SIZE, tensors=TENSORS))
        output = subprocess.DEVNULL if number else subprocess.PIPE
        processes.append(subprocess.Popen([sys.executable, "main.py"], cwd=place, stdout=output, text=True))
    try:
        yield processes[0]
        for process in processes:
            if process.wait(120):
                raise SystemExit("A worker failed.")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rounds(broker: Broker, scratch: pathlib.Path, kill_in: tuple[int, ...]) -> tuple[float, str]:
    """Seconds from the first round's start to the last one's end, and the model's digest.

    :param kill_in: the rounds in the middle of which the broker is killed and started again.
    """
    folder = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    with workers(folder, broker.port) as aggregator:
        assert aggregator.stdout is not None
        began = 0.0
        for line in aggregator.stdout:
            if not line.startswith("round "):
                continue
            number = int(line.split()[1])
            began = began or time.perf_counter()
            seconds = time.perf_counter() - began
            if number + 1 in kill_in:
                time.sleep(0.5)  # a model is on its way now
                broker.kill()
                broker.start()
    model = folder / "aggregator-0" / "artifacts" / "model.safetensors"
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(model)
    expected = ROUNDS * sum(range(1, TRAINERS + 1)) / TRAINERS
    if any((array != np.float32(expected)).any() for array in arrays.values()):
        raise SystemExit(f"The model is wrong: not {expected} everywhere.")
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()
    return seconds / (ROUNDS - 1), digest


def main() -> None:
    """Measure both, and check the models."""
    with tempfile.TemporaryDirectory() as scratch:
        broker = Broker(pathlib.Path(scratch))
        try:
            ours, limit = throughput(broker.port)
            calm, model = rounds(broker, pathlib.Path(scratch), ())
            rough, again = rounds(broker, pathlib.Path(scratch), (2, 4))
        finally:
            broker.kill()
    report(
        [
            Figure("mqtt, 100 MB to 4 trainers", ours, "MB/s"),
            Figure("mqtt, bare publish of the same chunks", limit, "MB/s"),
            Figure("mqtt, against a bare publish", ours / limit, "x"),
            Figure("mqtt, a round of 100 MB with 4 trainers", calm, "s"),
            Figure("mqtt, the same with the broker killed twice in 5 rounds", rough, "s"),
            Figure("mqtt, same model in spite of that", float(model == again), "(1: yes)", "== 1"),
        ]
    )


if __name__ == "__main__":
    main()
