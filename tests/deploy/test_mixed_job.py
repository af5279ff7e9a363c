"""One job on this host, in a container, in a pod and with a participant, all at once."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import engines
import pytest

from flame.client import Client
from flame.spec import bundle
from flame.spec.load import load_schema
from flame.spec.nouns import Compute, Dataset, DatasetGroups, JobForm, ModelSpec, Placement, RoundPolicy
from flame.spec.records import Job, JobState

DIGITS = engines.ROOT / "examples" / "digits"
# The example's task, with a model that needs nothing but numpy: the images of containers and pods are small then.
TRAINER = """
import numpy as np
from flame.sdk import Config, Trainer

class Site(Trainer):
    def __init__(self, config):
        self.config = config

    def load_data(self):
        with np.load(self.config.dataset_path) as data:
            self.x, self.y = data["x"].reshape(len(data["y"]), -1) / 16, np.eye(10)[data["y"]]
        self.dataset_size = len(self.y)

    def initialize(self):
        self.model = {"w": np.zeros((64, 10)), "b": np.zeros(10)}

    def train(self):
        for _ in range(20):
            scores = np.exp(self.x @ self.model["w"] + self.model["b"])
            error = scores / scores.sum(1, keepdims=True) - self.y
            self.model["w"] -= 0.5 * self.x.T @ error / len(error)
            self.model["b"] -= 0.5 * error.mean(0)

    def evaluate(self): ...

site = Site(Config("config.json"))
site.compose()
site.run()
"""
AGGREGATOR = """
import numpy as np
from flame.sdk import Aggregator, Config

class Mean(Aggregator):
    def __init__(self, config):
        self.config = config

    def load_data(self):
        with np.load("held-out.npz") as data:
            self.x, self.y = data["x"].reshape(len(data["y"]), -1) / 16, data["y"]

    def initialize(self):
        self.model = {"w": np.zeros((64, 10)), "b": np.zeros(10)}

    def evaluate(self):
        right = (self.x @ self.model["w"] + self.model["b"]).argmax(1) == self.y
        self.update_metrics({"accuracy": right.mean(), "samples": float(len(self.y))})

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""


@pytest.fixture
def code(tmp_path: Path) -> bytes:
    for role, main in (("trainer", TRAINER), ("aggregator", AGGREGATOR)):
        (tmp_path / "code" / role).mkdir(parents=True)
        (tmp_path / "code" / role / "main.py").write_text(main)
    shutil.copy(DIGITS / "aggregator" / "held-out.npz", tmp_path / "code" / "aggregator")
    return bundle.pack(tmp_path / "code")


def form(digest: str, data: str, realms: list[str], *, participants: int = 0) -> JobForm:
    sites = [
        Dataset(id=f"site-{at}", name=f"site {at}", url=f"{data}/site-{at}.npz", realm=realm)
        for at, realm in enumerate(realms, 1)
    ]
    groups: dict[str, Any] = {"dataset_groups": {"default": [site.id for site in sites]}}
    if participants:
        groups["from_user"] = {"default": participants}
    return JobForm(
        name="digits everywhere",
        schema=load_schema(DIGITS / "schema.yaml"),
        code=digest,
        datasets=sites,
        data_spec=[DatasetGroups(role="trainer", **groups)],
        model_spec=ModelSpec(hyperparameters={"rounds": 5}),
        policy=RoundPolicy(deterministic=True),
        placement={"aggregator": Placement(realm="local")},
    )


async def finished(client: Client, job: Job) -> Job:
    async with asyncio.timeout(110):
        ended = await client.jobs.wait(job.id)
    assert ended.state is JobState.COMPLETED, ended.failure
    return ended


def accuracies(job: Job) -> list[float]:
    return [one.metrics["accuracy"] for one in job.rounds]


@pytest.mark.timeout(900)  # the first of a run builds the image
@pytest.mark.parametrize("db", ["sqlite", "mongodb"])
async def test_a_job_over_three_computes_and_a_participant_learns_what_it_learns_on_one(
    db: str,
    serving: Any,
    three: tuple[Compute, ...],
    data_url: str,
    code: bytes,
    join: Any,
    request: pytest.FixtureRequest,
) -> None:
    options = ["--db", request.getfixturevalue("database")] if db == "mongodb" else []
    async with serving(*options) as client:
        digest = await client.code.upload(code)
        for compute in three:
            made = await client.computes.create(compute)
            assert made.state == "ready", made.problem
        alone = await client.jobs.create(form(digest, data_url, ["local"] * 4))
        await client.jobs.start(alone.id)
        expected = accuracies(await finished(client, alone))
        assert expected[-1] > 0.8

        realms = ["local", "site/docker", "kubernetes"]
        job = await client.jobs.create(form(digest, data_url, realms, participants=1))
        await client.jobs.start(job.id)
        invite = await client.invites.create(job.id)
        joined = join(client.server, invite.token, f"{data_url}/site-4.npz", digest)
        found = accuracies(await finished(client, job))
        assert found == pytest.approx(expected, abs=1e-3)
        assert await joined.ended() == 0, joined.log.read_text()
        tasks = await client.jobs.tasks(job.id)
        assert sorted(str(task.compute) for task in tasks) == ["None", "docker", "kubernetes", "local", "local"]
        for compute in three:
            await client.computes.delete(compute.name)
