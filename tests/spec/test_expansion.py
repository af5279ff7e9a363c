"""The expansion follows its rules, for the topologies that Flame is known by and for any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import SpecError
from flame.spec.check import check_job
from flame.spec.expand import expand, offline_job_id
from flame.spec.nouns import Broker, Dataset, JobForm, Registry, TaskConfig
from flame.spec.shape import shape

JOB = "0123456789abcdef01234567"
Make = Callable[..., JobForm]


def outline(tasks: list[TaskConfig]) -> list[tuple[str, dict[str, str], str]]:
    return [(task.role, task.group_association, task.dataset.removeprefix("https://example.org/")) for task in tasks]


def test_two_tiers(schemas: dict[str, Any], make_job: Make) -> None:
    tasks = expand(make_job(schemas["mnist"], {"us": ["a"]}), None, {}, JOB)
    assert outline(tasks) == [
        ("aggregator", {"param-channel": "us"}, ""),
        ("trainer", {"param-channel": "us"}, "a.npz"),
    ]


def test_three_tiers(schemas: dict[str, Any], make_job: Make) -> None:
    tasks = expand(make_job(schemas["hier_mnist"], {"na": ["canada", "us"], "eu": ["uk", "germany"]}), None, {}, JOB)
    assert outline(tasks) == [
        ("middle-aggregator", {"param-channel": "eu", "global-channel": "default"}, ""),
        ("middle-aggregator", {"param-channel": "na", "global-channel": "default"}, ""),
        ("top-aggregator", {"global-channel": "default"}, ""),
        ("trainer", {"param-channel": "eu"}, "uk.npz"),
        ("trainer", {"param-channel": "eu"}, "germany.npz"),
        ("trainer", {"param-channel": "na"}, "canada.npz"),
        ("trainer", {"param-channel": "na"}, "us.npz"),
    ]
    by_role = {task.role: [channel.name for channel in task.channels] for task in tasks}
    assert by_role == {
        "middle-aggregator": ["param-channel", "global-channel"],
        "top-aggregator": ["global-channel"],
        "trainer": ["param-channel"],
    }
    assert [task.peers for task in tasks] == [
        {"param-channel": 2, "global-channel": 1},
        {"param-channel": 2, "global-channel": 1},
        {"global-channel": 2},
        *({"param-channel": 1},) * 4,
    ]


def test_hybrid_takes_the_first_association_that_has_the_group(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["hybrid"], {"us": ["us1", "us2"], "eu": ["eu1", "eu2"], "default": ["any"]}, backend="mqtt")
    tasks = expand(form, None, {}, JOB)
    in_us, in_eu = ({"param-channel": group, "global-channel": "default"} for group in ("us", "eu"))
    assert outline(tasks) == [
        ("aggregator", {"global-channel": "default"}, ""),
        ("trainer", in_us, "any.npz"),
        ("trainer", in_eu, "eu1.npz"),
        ("trainer", in_eu, "eu2.npz"),
        ("trainer", in_us, "us1.npz"),
        ("trainer", in_us, "us2.npz"),
    ]
    assert {channel.name: channel.backend for channel in tasks[1].channels} == {
        "param-channel": "p2p",
        "global-channel": "mqtt",
    }
    assert tasks[1].peers == {"param-channel": 2, "global-channel": 1}


def test_workers_that_participants_bring_come_behind_the_datasets_of_their_group(
    schemas: dict[str, Any], make_job: Make
) -> None:
    form = make_job(schemas["hier_mnist"], {"na": ["canada"], "eu": ["uk"]})
    spec = [msgspec.structs.replace(form.data_spec[0], from_user={"eu": 2, "na": 0})]
    tasks = expand(msgspec.structs.replace(form, data_spec=spec), None, {}, JOB)
    trainers = [(t.group_association["param-channel"], t.dataset, t.realm, t.from_user) for t in tasks[3:]]
    assert trainers == [
        ("eu", "https://example.org/uk.npz", trainers[0][2], False),
        ("eu", "", "eu", True),
        ("eu", "", "eu", True),
        ("na", "https://example.org/canada.npz", trainers[3][2], False),
    ]
    assert tasks[0].peers == {"param-channel": 3, "global-channel": 1}
    assert len({task.taskid for task in tasks}) == len(tasks)


def test_parallel_experiments(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["parallel_experiment"], {"us": ["west"], "eu": ["uk"], "asia": ["china"]})
    assert outline(expand(form, None, {}, JOB)) == [
        ("aggregator", {"param-channel": "us"}, ""),
        ("aggregator", {"param-channel": "eu"}, ""),
        ("aggregator", {"param-channel": "asia"}, ""),
        ("trainer", {"param-channel": "asia"}, "china.npz"),
        ("trainer", {"param-channel": "eu"}, "uk.npz"),
        ("trainer", {"param-channel": "us"}, "west.npz"),
    ]


def test_distributed_is_its_own_other_end(schemas: dict[str, Any], make_job: Make) -> None:
    tasks = expand(check_job(make_job(schemas["distributed_training"], {"us": ["a", "b", "c"]})), None, {}, JOB)
    assert [task.dataset[-5:] for task in tasks] == ["a.npz", "b.npz", "c.npz"]
    assert all(task.peers == {"param-channel": 2} for task in tasks)


def test_replica_is_the_outer_loop_and_does_not_matter_for_data(schemas: dict[str, Any], make_job: Make) -> None:
    schema = schemas["parallel_experiment"]
    schema["roles"][0]["replica"] = 7
    schema["roles"][1]["replica"] = 2
    form = make_job(schema, {"us": ["a"], "eu": ["b"], "asia": ["c"]})
    tasks = expand(form, None, {}, JOB)
    groups = [task.group_association["param-channel"] for task in tasks if task.role == "aggregator"]
    assert groups == ["us", "eu", "asia", "us", "eu", "asia"]
    assert sum(task.role == "trainer" for task in tasks) == 3
    assert len({task.taskid for task in tasks}) == len(tasks)


def test_a_task_has_all_that_the_sdk_reads(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["mnist"], {"us": ["a"]}, max_run_time=60.0, backend="mqtt")
    broker = Broker(sort="mqtt", host="localhost:1883")
    aggregator, trainer = expand(form, None, {}, JOB, brokers=[broker], registry=Registry(sort="local"))
    assert trainer.realm == "default/a"
    assert aggregator.realm == "default"
    config = msgspec.to_builtins(trainer)
    for key in [
        "taskid",
        "role",
        "job",
        "realm",
        "backend",
        "brokers",
        "channels",
        "groupAssociation",
        "dataset",
        "hyperparameters",
        "baseModel",
        "optimizer",
        "selector",
        "registry",
        "dependencies",
        "maxRunTime",
    ]:
        assert key in config
    assert config["job"] == {"id": JOB, "name": "test"}
    assert config["brokers"] == [{"sort": "mqtt", "host": "localhost:1883"}]
    assert config["registry"] == {"sort": "local", "uri": "", "artifacts": ""}
    assert config["schema"] == "two tiers"
    assert config["maxRunTime"] == 60.0
    assert len(config["taskid"]) == 40


def test_a_registered_schema_and_registered_datasets_serve_as_well(schemas: dict[str, Any], make_job: Make) -> None:
    whole = make_job(schemas["mnist"], {"us": ["a"]})
    lean = msgspec.structs.replace(whole, schema=None, design_id="mnist", datasets=[])
    registered = {dataset.id: dataset for dataset in whole.datasets if dataset.id}
    assert expand(lean, whole.schema, registered, JOB) == expand(whole, None, {}, JOB)


def test_the_natural_association_is_taken_where_there_is_only_one(schemas: dict[str, Any], make_job: Make) -> None:
    schema = schemas["mnist"]
    for role in schema["roles"]:
        role["groupAssociation"] = []
    tasks = expand(check_job(make_job(schema, {"us": ["a"]})), None, {}, JOB)
    assert [task.group_association for task in tasks] == [{"param-channel": "us"}] * 2


def test_a_role_without_association_is_refused_where_there_are_several(schemas: dict[str, Any], make_job: Make) -> None:
    schema = schemas["hier_mnist"]
    schema["roles"][1]["groupAssociation"] = []
    with pytest.raises(
        SpecError, match=r"'middle-aggregator' needs a groupAssociation.*'param-channel'.*'eu' and 'na'"
    ):
        expand(make_job(schema, {"eu": ["a"]}), None, {}, JOB)


def test_an_unknown_dataset_or_group_is_a_sentence(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["mnist"], {"us": ["a"]})
    with pytest.raises(SpecError, match="unknown dataset 'a'"):
        expand(msgspec.structs.replace(form, datasets=[]), None, {}, JOB)
    with pytest.raises(SpecError, match="no groupAssociation with the group 'eu'; its groups are 'us'"):
        expand(make_job(schemas["mnist"], {"eu": ["a"]}), None, {}, JOB)
    with pytest.raises(SpecError, match="the job has no schema"):
        expand(msgspec.structs.replace(form, schema=None), None, {}, JOB)


# --- any topology

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)


@st.composite
def forms(draw: st.DrawFn) -> tuple[JobForm, dict[str, Any]]:
    """A chain of roles of any length with any groups, data at its end; and what it was made of."""
    groups = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    depth = draw(st.integers(1, 3))
    roles = draw(st.lists(names, min_size=depth + 1, max_size=depth + 1, unique=True))
    replicas = [draw(st.integers(1, 3)) for _ in roles]
    channels = [
        {"name": f"c{level}", "pair": [roles[level], roles[level + 1]], "groupBy": {"value": groups}}
        for level in range(depth)
    ]
    made: dict[str, Any] = {"name": "any", "roles": [], "channels": channels}
    for level, name in enumerate(roles):
        mine = [f"c{at}" for at in (level - 1, level) if 0 <= at < depth]
        made["roles"].append(
            {
                "name": name,
                "isDataConsumer": level == depth,
                "replica": replicas[level],
                "groupAssociation": [dict.fromkeys(mine, group) for group in groups],
            }
        )
    used = {group: draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4)) for group in groups}
    form = shape(
        {
            "name": "job",
            "schema": made,
            "datasets": [{"id": one, "name": one, "url": f"https://example.org/{one}"} for one in "abcdefgh"],
            "dataSpec": [{"role": roles[-1], "datasetGroups": used}],
        },
        JobForm,
    )
    return form, {"roles": roles, "replicas": replicas, "groups": groups, "used": used}


@given(forms())
def test_any_job_expands_by_the_rules(made: tuple[JobForm, dict[str, Any]]) -> None:
    form, parts = made
    tasks = expand(form, None, {}, JOB)
    data_role = parts["roles"][-1]
    counts = {
        name: replica * len(parts["groups"]) for name, replica in zip(parts["roles"], parts["replicas"], strict=True)
    }
    counts[data_role] = sum(len(ids) for ids in parts["used"].values())
    assert {name: sum(task.role == name for task in tasks) for name in parts["roles"]} == counts
    assert [task.role for task in tasks] == sorted(task.role for task in tasks)
    fed = [(next(iter(task.group_association.values())), task.dataset) for task in tasks if task.role == data_role]
    assert fed == [
        (group, f"https://example.org/{one}") for group in sorted(parts["used"]) for one in parts["used"][group]
    ]
    assert len({task.taskid for task in tasks}) == len(tasks)
    for task in tasks:
        assert set(task.peers) == {channel.name for channel in task.channels} == set(task.group_association)
        for channel in task.channels:
            other = next(end for end in channel.pair if end != task.role)
            group = task.group_association[channel.name]
            there = [one for one in tasks if one.role == other and one.group_association[channel.name] == group]
            assert task.peers[channel.name] == len(there)


@given(forms())
def test_the_same_job_expands_to_the_same_tasks(made: tuple[JobForm, dict[str, Any]]) -> None:
    form, _ = made
    again = msgspec.json.decode(msgspec.json.encode(form), type=JobForm)
    tasks = expand(form, None, {}, JOB)
    assert expand(again, None, {}, JOB) == tasks
    assert msgspec.json.decode(msgspec.json.encode(tasks), type=list[TaskConfig]) == tasks
    assert offline_job_id(again) == offline_job_id(form)
    other = expand(form, None, {}, JOB[::-1])
    assert not {task.taskid for task in tasks} & {task.taskid for task in other}


def test_the_offline_id_follows_the_content(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["mnist"], {"us": ["a"]})
    changed = msgspec.structs.replace(form, max_run_time=5.0)
    assert len(offline_job_id(form)) == 24
    assert offline_job_id(form) != offline_job_id(changed)


def test_datasets_of_the_job_come_before_registered_ones(schemas: dict[str, Any], make_job: Make) -> None:
    form = make_job(schemas["mnist"], {"us": ["a"]})
    registered = {"a": Dataset(id="a", name="other", url="https://elsewhere.org/a")}
    assert expand(form, None, registered, JOB)[1].dataset == "https://example.org/a.npz"
