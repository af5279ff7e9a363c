"""Workers as processes, started by hand as a user would: a script and a ``config.json`` each, meeting at an address."""

import json
import os
import socket
import subprocess
import sys
import threading
import uuid

CHANNEL = {
    "name": "param-channel",
    "description": "models go both ways",
    "pair": ["trainer", "aggregator"],
    "groupBy": {"type": "tag", "value": ["default"]},
    "funcTags": {"aggregator": ["distribute", "aggregate"], "trainer": ["fetch", "upload"]},
}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Worker:
    """A process; its output is read by a thread, which lets a test wait for a line of it."""

    def __init__(self, folder, script, environment):
        self.lines = []
        self.news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(script), "config.json"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with self.process.stdout as lines:
            for line in lines:
                with self.news:
                    self.lines.append(line.rstrip("\n"))
                    self.news.notify_all()
        with self.news:
            self.lines.append("ended")
            self.news.notify_all()

    def wait_for(self, *parts, after=0):
        """Wait until a line with all the parts is printed; gives its number."""

        def find():
            return next((i for i, line in enumerate(self.lines[after:], after) if all(p in line for p in parts)), None)

        with self.news:
            assert self.news.wait_for(lambda: find() is not None or self.lines[-1:] == ["ended"], 60), self.text
            assert find() is not None, self.text
            return find()

    @property
    def text(self):
        return "\n".join(self.lines)

    def end(self):
        """Wait for the process; gives its status."""
        status = self.process.wait(60)
        self.reader.join(10)
        return status

    def kill(self):
        self.process.kill()
        return self.end()


class Hand:
    """A job run by hand, in a folder."""

    def __init__(self, folder, backend="p2p", broker=None, **more):
        self.folder = folder
        self.base = {
            "backend": backend,
            "brokers": [{"sort": backend, "host": broker or f"127.0.0.1:{free_port()}"}],
            "groupAssociation": {"param-channel": "default"},
            "channels": [CHANNEL],
            "dependencies": ["numpy >= 1.2.0"],
            "hyperparameters": {"batchSize": 32, "learningRate": 0.01, "rounds": 3},
            "baseModel": {"name": "", "version": 1},
            "job": {"id": uuid.uuid4().hex[:24], "name": "hand"},
            "registry": {"sort": "dummy", "uri": ""},
            "selector": {"sort": "default", "kwargs": {}},
            "optimizer": {"sort": "fedavg", "kwargs": {}},
            "maxRunTime": 300,
            "realm": "default",
            **more,
        }
        self.workers = []

    def start(self, role, number, script, attempt=1, **more):
        folder = self.folder / f"{role}-{number}-{attempt}"
        folder.mkdir()
        dataset = f"https://example.org/{number}.npz" if role == "trainer" else ""
        config = {**self.base, "taskid": f"{role}{number:034}", "role": role, "dataset": dataset, **more}
        (folder / "config.json").write_text(json.dumps(config))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        worker = Worker(folder, script, {**environment, "FLAME_ATTEMPT": str(attempt)})
        self.workers.append(worker)
        return worker

    def stop(self):
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.end()
