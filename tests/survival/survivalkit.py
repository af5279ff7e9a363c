"""Small jobs on real servers, in which something is killed at an exact moment; and what they ended with.

A job is a folder of scripts that need numpy alone, so its workers are there in a moment. Wishes of who shall die where are files, see
:mod:`flame.sdk.chaospoints`.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
from safetensors.numpy import load_file

SITE = """
import numpy as np
from flame.sdk import Config
from {module} import {base}

class Site({base}):
    def __init__(self, config):
        self.config = config
        self.number = int(config.dataset.rsplit("/", 1)[1])
        self.dataset_size = self.number + 1

    def initialize(self):
        self.model = {{"w": np.zeros({size}, np.float32)}}
        self.momentum = np.zeros({size}, np.float32)

    def train(self):
        # Depends on the round's random numbers, on the model, and on what earlier rounds have left here.
        self.momentum = 0.5 * self.momentum + np.random.normal(self.number, 1, {size}).astype(np.float32)
        self.model["w"] += 0.1 * (self.momentum - self.model["w"])
        self.local_steps = 2

    def checkpoint(self):
        return {{"momentum": self.momentum}}

    def restore(self, state):
        self.momentum = np.array(state["momentum"])

site = Site(Config("config.json"))
site.compose()
site.run()
"""

TOP = """
import numpy as np
from flame.sdk import Config
from {module} import {base}

class Top({base}):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {{"w": np.random.normal(size={size}).astype(np.float32)}}

    def evaluate(self):
        self.update_metrics({{"norm": float(np.linalg.norm(self.model["w"]))}})

top = Top(Config("config.json"))
top.compose()
top.run()
"""

PLAIN = """
from flame.sdk import Config
from {module} import {base}

worker = {base}(Config("config.json"))
worker.compose()
worker.run()
"""

UP, DOWN = ["fetch", "upload"], ["distribute", "aggregate"]


def channel(name, lower, upper, groups=("default",), lower_tags=UP, upper_tags=DOWN, **more):
    return {
        **more,
        "name": name,
        "pair": [lower, upper],
        "groupBy": {"type": "tag", "value": list(groups)},
        "funcTags": {lower: lower_tags, upper: upper_tags},
    }


def write_job(folder, roles, channels, data, *, rounds=5, deterministic=True, policy=None, **more):
    """A job folder.

    :param roles: by name: the script, and what else the schema says of the role.
    :param data: the dataSpec's groups: names of sites by group.
    """
    for role, (script, _) in roles.items():
        (folder / "code" / role).mkdir(parents=True)
        (folder / "code" / role / "main.py").write_text(script)
    consumer = next(name for name, (_, about) in roles.items() if about.get("isDataConsumer"))
    sites = [site for each in data.values() for site in each]
    job = {
        "name": "trial",
        "schema": {
            "name": "trial",
            "roles": [{"name": name, **about} for name, (_, about) in roles.items()],
            "channels": channels,
        },
        "datasets": [{"id": str(site), "name": f"s{site}", "url": f"file:///nowhere/{site}"} for site in sites],
        "dataSpec": [{"role": consumer, "datasetGroups": {g: [str(s) for s in each] for g, each in data.items()}}],
        "modelSpec": {"hyperparameters": {"rounds": rounds, "seed": 7}, **more.pop("modelSpec", {})},
        "policy": {"deterministic": deterministic, "joinDeadline": 60, **(policy or {})},
        "registry": {"sort": "local"},
        **more,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def site(module, base="Trainer", size=200):
    """A trainer's script.

    :param size: of its model, in numbers of 4 bytes; from 131072 on it goes through shared memory.
    """
    return SITE.format(module=module, base=base, size=size)


def top(module, base="TopAggregator", size=200):
    """The script of the aggregator that makes the model."""
    return TOP.format(module=module, base=base, size=size)


def central(folder, *, sites=3, size=200, compression=None, **settings):
    """One aggregator and some sites."""
    more = {"compression": compression} if compression else {}
    return write_job(
        folder,
        {
            "trainer": (site("flame.sdk", size=size), {"isDataConsumer": True}),
            "aggregator": (top("flame.sdk", "Aggregator", size), {}),
        },
        [channel("param", "trainer", "aggregator", **more)],
        {"default": range(sites)},
        **settings,
    )


def parallel(folder, **settings):
    """Two groups of one site and one aggregator, which know nothing of each other."""
    groups = ("eu", "na")
    places = [{"param": group} for group in groups]
    return write_job(
        folder,
        {
            "trainer": (
                site("flame.sdk"),
                {"isDataConsumer": True, "groupAssociation": places},
            ),
            "aggregator": (top("flame.sdk", "Aggregator"), {"groupAssociation": places}),
        },
        [channel("param", "trainer", "aggregator", groups)],
        {"eu": (0,), "na": (1,)},
        **settings,
    )


class Run:
    """``flame run`` of a job, with wishes; in a folder of its own, so that nobody else's processes are counted."""

    def __init__(self, folder, job, wishes=(), name="run"):
        self.folder = folder / name
        self.folder.mkdir()
        self.data = self.folder / "data"
        self.chaos = self.folder / "chaos"
        self.chaos.mkdir()
        for wish in wishes:
            (self.chaos / wish).touch()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        environment |= {
            "FLAME_DATA_DIR": str(self.data),
            "FLAME_CONFIG": str(self.folder / "config.yaml"),
            "FLAME_CHAOS": str(self.chaos),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flame", "run", str(job), "-o", "json"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until(self, found, timeout=60):
        """Wait until a function finds something; gives it."""
        deadline = time.monotonic() + timeout
        while not (what := found()):
            assert time.monotonic() < deadline, f"it did not come: {os.listdir(self.chaos)}"
            threading.Event().wait(0.005)
        return what

    def taken(self, wish, timeout=60):
        """Wait until a worker has come to the point of a wish; gives its process id."""
        found = self.until(lambda: list(self.chaos.glob(f"{glob_escaped(wish)}.taken-*")), timeout)
        return int(found[0].name.rpartition("-")[2])

    def release(self, wish):
        """Let a worker go on that is held."""
        for path in self.chaos.glob(f"{glob_escaped(wish)}.taken-*"):
            path.unlink()

    def result(self, timeout=90):
        """Wait for the end: the job as JSON, and its model's bytes."""
        out, err = self.process.communicate(timeout=timeout)
        assert out, err
        job = json.loads(out)
        models = {path.name: load_file(path) for path in self.data.glob("artifacts/*/*.safetensors")}
        left = [process for process in psutil.process_iter() if self._mine(process)]
        psutil.wait_procs(left, 10)
        assert not [process for process in left if process.is_running()], "processes are left"
        return job, models, err

    def _mine(self, process):
        with contextlib.suppress(psutil.Error):
            return process.cwd().startswith(str(self.folder)) and process.pid != os.getpid()
        return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()


def glob_escaped(wish):
    return re.sub(r"([*?[])", r"[\1]", wish)


def finish(folder, job, wishes=(), name="run"):
    """Run a job to its end; all wishes must have been fulfilled."""
    with Run(folder, job, wishes, name) as run:
        document, models, err = run.result()
        assert document["state"] == "completed", (document.get("failure"), err)
        left = [wish for wish in wishes if (run.chaos / wish).exists()]
        assert not left, f"nobody came to {left}"
        return document, models


def bits(models):
    return {name: {key: array.tobytes() for key, array in each.items()} for name, each in models.items()}


def rounds(document):
    return [entry["round"] for entry in document["rounds"]]


def tree(folder, *, optimizer="fedavg", size=200, eager=False, **settings):
    """Two groups of two sites below middle aggregators.

    :param eager: what has come in goes up early.
    """
    module = "flame.sdk"
    middle, upper = module, (module, "Aggregator")
    if eager:
        middle = "flame.sdk.mode.horizontal.eager_syncfl.middle_aggregator"
        upper = ("flame.sdk.mode.horizontal.eager_syncfl.top_aggregator", "TopAggregator")
    model = {"optimizer": {"sort": optimizer}, "hyperparameters": {"rounds": 5, "seed": 7, "aggGoal": 1}}
    return write_job(
        folder,
        {
            "trainer": (
                site(module, size=size),
                {"isDataConsumer": True, "groupAssociation": [{"param": "eu"}, {"param": "na"}]},
            ),
            "middle": (
                PLAIN.format(module=middle, base="MiddleAggregator"),
                {"groupAssociation": [{"param": g, "global": "default"} for g in ("eu", "na")]},
            ),
            "top": (top(*upper, size), {}),
        },
        [channel("param", "trainer", "middle", ("eu", "na")), channel("global", "middle", "top")],
        {"eu": (0, 1), "na": (2, 3)},
        modelSpec=model,
        **settings,
    )


def peers(folder, kind, tags, *, sites=3, **settings):
    """Sites without a server."""
    return write_job(
        folder,
        {"trainer": (site(f"flame.sdk.mode.{kind}.trainer"), {"isDataConsumer": True})},
        [channel("ring", "trainer", "trainer", lower_tags=tags, upper_tags=tags)],
        {"default": range(sites)},
        **settings,
    )


def coordinated(folder, kind="coord_syncfl", **settings):
    """Four sites that a coordinator gives to two aggregators."""
    at = f"flame.sdk.mode.horizontal.{kind}"
    coordination = "coordinateWith"
    return write_job(
        folder,
        {
            "trainer": (site(f"{at}.trainer"), {"isDataConsumer": True}),
            "middle": (PLAIN.format(module=f"{at}.middle_aggregator", base="MiddleAggregator"), {"replica": 2}),
            "top": (top(f"{at}.top_aggregator"), {}),
            "coordinator": (PLAIN.format(module=f"{at}.coordinator", base="Coordinator"), {}),
        },
        [
            channel("param", "trainer", "middle"),
            channel("global", "middle", "top"),
            channel("t", "trainer", "coordinator", lower_tags=["getAggregator"], upper_tags=[f"{coordination}Trainer"]),
            channel("m", "middle", "coordinator", lower_tags=["coordinate"], upper_tags=[f"{coordination}MidAgg"]),
            channel("o", "top", "coordinator", lower_tags=["coordinate"], upper_tags=[f"{coordination}TopAgg"]),
        ],
        {"default": range(4)},
        **settings,
    )


def hybrid(folder, **settings):
    """Two rings of two below an aggregator."""
    at, ring = "flame.sdk.mode.hybrid", ["ring_allreduce"]
    places = [{"param": "default", "ring": g} for g in ("eu", "na")]
    return write_job(
        folder,
        {
            "trainer": (
                site(f"{at}.trainer"),
                {"isDataConsumer": True, "groupAssociation": places},
            ),
            "top": (top(f"{at}.top_aggregator"), {}),
        },
        [
            channel("param", "trainer", "top"),
            channel("ring", "trainer", "trainer", ("eu", "na"), lower_tags=ring, upper_tags=ring),
        ],
        {"eu": (0, 1), "na": (2, 3)},
        **settings,
    )


def asynchronous(folder, **settings):
    """One aggregator that takes updates as they come."""
    at = "flame.sdk.mode.horizontal.asyncfl"
    return write_job(
        folder,
        {
            "trainer": (site(f"{at}.trainer"), {"isDataConsumer": True}),
            "top": (top(f"{at}.top_aggregator"), {}),
        },
        [channel("param", "trainer", "top")],
        {"default": range(3)},
        deterministic=False,
        modelSpec={"optimizer": {"sort": "fedbuff", "kwargs": {"agg_goal": 2}}},
        **settings,
    )
