"""The examples through the whole system: ``flame run``, a private server, a process a worker. And killing one of them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits" / "data"


class Run:
    """``flame run`` of an example, in a folder of its own. A context manager, at whose end nothing is left."""

    def __init__(self, folder, example, *overrides):
        self.data = folder / "data"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        environment |= {"FLAME_DATA_DIR": str(self.data), "FLAME_CONFIG": str(folder / "config.yaml")}
        # What becomes of a job whose workers are not replaced; tests/survival has those that are.
        sets = [word for each in ("restart.attempts=0", *overrides) for word in ("--set", each)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flame", "run", str(ROOT / "examples" / example), *sets],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.told = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._news:
                self.told.append(line)
                self._news.notify_all()
        with self._news:
            self.told.append("")
            self._news.notify_all()

    def wait_for(self, word, timeout=60):
        """Wait until the command has printed a line that begins so."""
        with self._news:
            found = self._news.wait_for(lambda: any(each.startswith(word) or not each for each in self.told), timeout)
        assert found, "it took too long"
        assert any(each.startswith(word) for each in self.told), "".join(self.told)

    def workers(self, role):
        """The processes that run a role's code."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd().startswith(str(self.data / "workers")) and process.cwd().endswith("/" + role):
                    found.append(process)
        return found

    def kill_one(self, role):
        """SIGKILL one of a role's processes."""
        victim = min(self.workers(role), key=lambda process: process.pid)
        victim.send_signal(signal.SIGKILL)

    def result(self, timeout=100):
        """Wait for the end: ``state``, ``rounds`` (numbers), ``models`` (arrays by the artifact's name), ``text``."""
        self._reader.join(timeout)
        self.process.wait(timeout)
        text = "".join(self.told)
        (state,) = re.findall(r"^state +(\w+)", text, re.MULTILINE)
        assert (self.process.returncode == 0) == (state == "completed"), text
        deadline = time.monotonic() + 20
        while self._left() and time.monotonic() < deadline:
            psutil.wait_procs(self._left(), 0.5)
        assert not self._left(), "workers were left behind"
        return SimpleNamespace(
            state=state,
            text=text,
            rounds=[int(number) for number in re.findall(r"^round (\d+)[/ ]", text, re.MULTILINE)],
            models={path.name: load_file(path) for path in self.data.glob("artifacts/*/*.safetensors")},
        )

    def _left(self):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd().startswith(str(self.data / "workers")):
                    found.append(process)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._reader.join(10)
        self.process.stdout.close()


class Softmax:
    """A site of the examples, written once more: its SGD on a softmax regression."""

    def __init__(self, number, *, epochs, batch, rate, seed=1):
        with np.load(DIGITS / f"site-{number}.npz") as data:
            self.x, self.y = data["x"].reshape(-1, 64) / 16, data["y"]
        self.epochs, self.batch, self.rate = epochs, batch, rate
        self.order = np.random.default_rng(seed)

    def train(self, w, b):
        w, b = w.copy(), b.copy()
        for _ in range(self.epochs):
            order = self.order.permutation(len(self.y))
            for start in range(0, len(order), self.batch):
                x, y = self.x[order[start : start + self.batch]], self.y[order[start : start + self.batch]]
                scores = x @ w + b
                chances = np.exp(scores - scores.max(1, keepdims=True))
                error = chances / chances.sum(1, keepdims=True) - np.eye(10)[y]
                w -= self.rate * x.T @ error / len(y)
                b -= self.rate * error.mean(0)
        return w, b


def federated(numbers, rounds, *, epochs=2, batch=32, rate=0.1):
    """FedAvg of the sites, by the paper's formula. Gives the weights and the bias."""
    sites = [Softmax(number, epochs=epochs, batch=batch, rate=rate) for number in numbers]
    counts = np.array([len(site.y) for site in sites])
    w, b = np.zeros((64, 10)), np.zeros(10)
    for _ in range(rounds):
        trained = [site.train(w, b) for site in sites]
        w = sum(c * each for c, (each, _) in zip(counts, trained, strict=True)) / counts.sum()
        b = sum(c * each for c, (_, each) in zip(counts, trained, strict=True)) / counts.sum()
    return w, b
