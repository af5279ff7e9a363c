"""Builders of small jobs, shared by the tests of ``flame.spec``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from flame.spec.nouns import Dataset, DatasetGroups, JobForm, ModelSpec, Schema
from flame.spec.shape import shape

# How long an example takes says nothing on a machine that others share.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

Json = dict[str, Any]

UP = ["distribute", "aggregate"]
DOWN = ["fetch", "upload"]


def channel(
    name: str, first: str, second: str, *groups: str, backend: str | None = None, tags: Json | None = None
) -> Json:
    made: Json = {
        "name": name,
        "pair": [first, second],
        "groupBy": {"type": "tag", "value": list(groups or ("default",))},
    }
    made["funcTags"] = {second: UP, first: DOWN} if tags is None else tags
    return made | ({"backend": backend} if backend else {})


def role(name: str, *associations: Json, data: bool = False, replica: int = 1) -> Json:
    return {"name": name, "isDataConsumer": data, "replica": replica, "groupAssociation": list(associations)}


SCHEMAS: dict[str, Json] = {
    "mnist": {
        "name": "two tiers",
        "roles": [role("trainer", {"param-channel": "us"}, data=True), role("aggregator", {"param-channel": "us"})],
        "channels": [channel("param-channel", "trainer", "aggregator", "us")],
    },
    "hier_mnist": {
        "name": "three tiers",
        "roles": [
            role("trainer", {"param-channel": "eu"}, {"param-channel": "na"}, data=True),
            role(
                "middle-aggregator",
                {"param-channel": "eu", "global-channel": "default"},
                {"param-channel": "na", "global-channel": "default"},
            ),
            role("top-aggregator", {"global-channel": "default"}),
        ],
        "channels": [
            channel("param-channel", "trainer", "middle-aggregator", "eu", "na"),
            channel("global-channel", "middle-aggregator", "top-aggregator"),
        ],
    },
    "hybrid": {
        "name": "hybrid",
        "roles": [
            role(
                "trainer",
                {"param-channel": "us", "global-channel": "default"},
                {"param-channel": "eu", "global-channel": "default"},
                data=True,
            ),
            role("aggregator", {"global-channel": "default"}),
        ],
        "channels": [
            channel(
                "param-channel", "trainer", "trainer", "eu", "us", backend="p2p", tags={"trainer": ["ring_allreduce"]}
            ),
            channel("global-channel", "trainer", "aggregator", backend="mqtt"),
        ],
    },
    "parallel_experiment": {
        "name": "parallel experiments",
        "roles": [
            role("trainer", {"param-channel": "us"}, {"param-channel": "eu"}, {"param-channel": "asia"}, data=True),
            role("aggregator", {"param-channel": "us"}, {"param-channel": "eu"}, {"param-channel": "asia"}),
        ],
        "channels": [channel("param-channel", "trainer", "aggregator", "us", "eu", "asia")],
    },
    "distributed_training": {
        "name": "distributed",
        "roles": [role("trainer", {"param-channel": "us"}, data=True)],
        "channels": [channel("param-channel", "trainer", "trainer", "us", tags={"trainer": ["ring_allreduce"]})],
    },
    "coordinated": {
        "name": "coordinated",
        "roles": [
            role("coordinator", {"top-coord": "default", "middle-coord": "default", "trainer-coord": "default"}),
            role("top-aggregator", {"top-coord": "default", "global-channel": "default"}),
            role(
                "middle-aggregator",
                {"middle-coord": "default", "param-channel": "default", "global-channel": "default"},
                replica=2,
            ),
            role("trainer", {"trainer-coord": "default", "param-channel": "default"}, data=True),
        ],
        "channels": [
            channel(
                "top-coord",
                "top-aggregator",
                "coordinator",
                tags={"top-aggregator": ["coordinate"], "coordinator": ["coordinateWithTopAgg"]},
            ),
            channel(
                "middle-coord",
                "middle-aggregator",
                "coordinator",
                tags={"middle-aggregator": ["coordinate"], "coordinator": ["coordinateWithMidAgg"]},
            ),
            channel(
                "trainer-coord",
                "trainer",
                "coordinator",
                tags={"trainer": ["coordinate"], "coordinator": ["coordinateWithTrainer"]},
            ),
            channel("global-channel", "middle-aggregator", "top-aggregator"),
            channel("param-channel", "trainer", "middle-aggregator"),
        ],
    },
}


def job_of(schema: Json, groups: dict[str, list[str]], *, role: str = "trainer", **fields: Any) -> JobForm:
    """A job of a schema whose data role has these datasets by group; a dataset's URL is told from its id."""
    ids = sorted({one for group in groups.values() for one in group})
    return JobForm(
        name="test",
        schema=shape(schema, Schema),
        datasets=[
            Dataset(id=one, name=one, url=f"https://example.org/{one}.npz", realm=f"default/{one}") for one in ids
        ],
        data_spec=[DatasetGroups(role=role, dataset_groups=groups)],
        model_spec=ModelSpec(hyperparameters={"rounds": 2}),
        **fields,
    )


Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Write:
    """Writes a folder: names to text, bytes, or data that is dumped as JSON (which is YAML, too)."""

    def write(**files: Any) -> Path:
        return write_all(files)

    def write_all(files: dict[str, Any]) -> Path:
        root = tmp_path / "job"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
        return root

    write.all = write_all  # type: ignore[attr-defined]
    return write


@pytest.fixture
def schemas() -> dict[str, Json]:
    """Flame's well-known topologies, by the names of its examples; a fresh copy."""
    return json.loads(json.dumps(SCHEMAS))  # type: ignore[no-any-return]


@pytest.fixture
def make_job() -> Callable[..., JobForm]:
    return job_of


@pytest.fixture
def flame_folder(folder: Write, schemas: dict[str, Json]) -> Callable[..., Path]:
    """A job folder as Flame's examples have it, with the given files in place of (or, if None, without) the usual ones."""

    def write(example: str = "mnist", groups: dict[str, list[str]] | None = None, **changes: Any) -> Path:
        schema = schemas[example]
        groups = groups or {"us": ["64109d853e579ab7ff9fafb9"]}
        count = sum(len(ids) for ids in groups.values())
        files: dict[str, Any] = {
            "job.json": {
                "name": example,
                "designId": example,
                "priority": "low",
                "maxRunTime": 1800,
                "backend": "mqtt",
                "dataSpecPath": "dataSpec.json",
                "modelSpecPath": "modelSpec.json",
            },
            "schema.json": schema,
            "dataSpec.json": [{"role": "trainer", "datasetGroups": groups}],
            "modelSpec.json": {
                "baseModel": {"name": "", "version": 1},
                "hyperparameters": {"rounds": 5, "batchSize": 32, "learningRate": 0.01},
                "dependencies": ["numpy >= 1.2.0"],
                "selector": {"sort": "random", "kwargs": {"k": 1}},
                "optimizer": {"sort": "fedavg", "kwargs": {}},
            },
        }
        for number in range(1, count + 1):
            files[f"dataset{number}.json"] = {
                "name": "the digits",
                "description": "handwritten digits",
                "url": f"https://example.org/digits_{number}.npz",
                "//": "a placeholder",
                "dataFormat": "npy",
                "realm": "default/us",
                "isPublic": True,
            }
        for one in schema["roles"]:
            files[f"code/{one['name']}/main.py"] = f"print({one['name']!r})\n"
        files |= {name.replace("__", "."): content for name, content in changes.items()}
        return folder.all({name: content for name, content in files.items() if content is not None})  # type: ignore[attr-defined, no-any-return]

    return write
