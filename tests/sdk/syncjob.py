"""A synchronous job in the threads of one process: real roles and channels over the inproc backend."""

import contextlib
import threading
import uuid
from pathlib import Path

from flame.sdk.config import Config
from flame.sdk.link import Link

CHANNEL = {
    "name": "param-channel",
    "pair": ["trainer", "aggregator"],
    "groupBy": {"type": "tag", "value": ["default"]},
    "funcTags": {"aggregator": ["distribute", "aggregate"], "trainer": ["fetch", "upload"]},
}


def config(role, number=0, *, job="job", rounds=3, trainers=2, backend="inproc", **more):
    raw = {
        "taskid": f"{role}-{number}-{job}",
        "role": role,
        "job": {"id": job, "name": "test"},
        "realm": "default",
        "backend": backend,
        "brokers": [],
        "channels": [CHANNEL],
        "groupAssociation": {"param-channel": "default"},
        "dataset": f"file:///{number}" if role == "trainer" else "",
        "hyperparameters": {"rounds": rounds},
        "registry": {"sort": "dummy", "uri": ""},
        "peers": {"param-channel": trainers if role == "aggregator" else 1},
        "schema": "central",
    }
    raw.update(more)
    return Config(raw)


class Recorder(Link):
    """Remembers what a role reports."""

    def __init__(self, folder):
        super().__init__(folder)
        self.said = []

    def metrics(self, round, metrics):
        self.said.append(("metrics", round, dict(metrics)))

    def round(self, round, metrics, seconds):
        self.said.append(("round", round, dict(metrics)))

    def warning(self, message):
        self.said.append(("warning", message))

    def _say_waiting(self, message):
        self.said.append(("waiting", message))

    def model(self, model):
        self.said.append(("model", dict(model)))

    def of(self, kind):
        return [entry[1:] if len(entry) > 2 else entry[1] for entry in self.said if entry[0] == kind]


class Job:
    """Roles in threads; ``run`` ends when all have ended and raises what the first one raised."""

    def __init__(self, folder: Path):
        self.id = uuid.uuid4().hex[:12]
        self.folder = folder
        self.roles = []
        self.errors = {}
        self.threads = []

    def add(self, cls, role, number=0, **more):
        made = cls(config(role, number, job=self.id, **more))
        made.link_for_test = Recorder(self.folder / f"{role}-{number}")
        self.roles.append(made)
        return made

    def start(self, role):
        def work():
            try:
                role.compose()
                role.run()
            except BaseException as error:
                self.errors[role] = error

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def run(self, timeout=60):
        for role in self.roles:
            self.start(role)
        self.join(timeout)

    def join(self, timeout=60):
        for thread in self.threads:
            thread.join(timeout)
            assert not thread.is_alive(), "a role did not end"
        for error in self.errors.values():
            raise error


class InThread:
    """Mixed into a role: its own link, as the process's would be shared by all threads."""

    link_for_test: Recorder

    def internal_init(self):
        from flame.sdk import link as links

        with _one_at_a_time, _installed(links, self.link_for_test):
            super().internal_init()


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _installed(links, link):
    links.install(link)
    try:
        yield
    finally:
        links.install(None)
