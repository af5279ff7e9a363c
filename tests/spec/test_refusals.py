"""Each refusal at submission is one sentence that names the file, the place and the mend."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame.errors import SpecError
from flame.spec.check import check_job, check_schema
from flame.spec.load import load_job, load_schema
from flame.spec.nouns import JobForm, Schema
from flame.spec.shape import shape

Change = Callable[[dict[str, Any]], Any]
Flame = Callable[..., Path]


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_job(path, overrides)
    sentence = str(caught.value)
    assert sentence[-1] in ".?"
    assert "\n" not in sentence
    assert caught.value.where
    return sentence


def _set(*path: Any, to: Any) -> Change:
    def change(schema: dict[str, Any]) -> None:
        node: Any = schema
        for step in path[:-1]:
            node = node[step]
        if to is None:
            del node[path[-1]]
        else:
            node[path[-1]] = to

    return change


ROLES, CHANNELS = "roles", "channels"
OF_THE_SCHEMA: dict[str, tuple[Change, str]] = {
    "no data-consuming role": (
        _set(ROLES, 0, "isDataConsumer", to=False),
        "schema.json: roles: no role consumes data; set isDataConsumer to true for the one that trains "
        "('trainer', 'middle-aggregator' and 'top-aggregator').",
    ),
    "pair with an unknown role": (
        _set(CHANNELS, 0, "pair", to=["trainr", "middle-aggregator"]),
        "schema.json: channels[0].pair[0]: channel 'param-channel' names an unknown role 'trainr'; did you mean 'trainer'?",
    ),
    "pair of one": (
        _set(CHANNELS, 1, "pair", to=["top-aggregator"]),
        "schema.json: channels[1].pair: the pair of channel 'global-channel' must name two roles (one role twice, for a "
        "channel of it with itself); it names 1.",
    ),
    "pair of three": (
        _set(CHANNELS, 1, "pair", to=["top-aggregator", "middle-aggregator", "trainer"]),
        "schema.json: channels[1].pair: the pair of channel 'global-channel' must name two roles (one role twice, for a "
        "channel of it with itself); it names 3.",
    ),
    "two roles of a name": (
        _set(ROLES, 2, "name", to="trainer"),
        "schema.json: roles[2]: two roles are called 'trainer'; rename one of them.",
    ),
    "two channels of a name": (
        _set(CHANNELS, 1, "name", to="param-channel"),
        "schema.json: channels[1]: two channels are called 'param-channel'; rename one of them.",
    ),
    "two groups of a name": (
        _set(CHANNELS, 0, "groupBy", "value", to=["eu", "na", "eu"]),
        "schema.json: channels[0].groupBy.value[2]: two groups are called 'eu'; rename one of them.",
    ),
    "a group that the channel has not": (
        _set(ROLES, 0, "groupAssociation", 1, "param-channel", to="us"),
        "schema.json: roles[0].groupAssociation[1].param-channel: channel 'param-channel' has no group 'us'; "
        "its groups are 'eu' and 'na'.",
    ),
    "a misspelt group": (
        _set(ROLES, 2, "groupAssociation", 0, "global-channel", to="defalt"),
        "schema.json: roles[2].groupAssociation[0].global-channel: channel 'global-channel' has no group 'defalt'; "
        "did you mean 'default'?",
    ),
    "a channel missing in the association": (
        _set(ROLES, 1, "groupAssociation", 1, "global-channel", to=None),
        "schema.json: roles[1].groupAssociation[1]: role 'middle-aggregator' is in the pair of channel 'global-channel', so the "
        "association must name a group of it; add 'global-channel' with the group 'default'.",
    ),
    "an unknown channel in the association": (
        _set(ROLES, 2, "groupAssociation", 0, to={"globl-channel": "default"}),
        "schema.json: roles[2].groupAssociation[0].globl-channel: unknown channel 'globl-channel'; "
        "did you mean 'global-channel'?",
    ),
    "a channel of others in the association": (
        _set(ROLES, 2, "groupAssociation", 0, to={"global-channel": "default", "param-channel": "eu"}),
        "schema.json: roles[2].groupAssociation[0].param-channel: role 'top-aggregator' is not in the pair of channel "
        "'param-channel'; remove it here, or add the role there.",
    ),
    "no association where several are possible": (
        _set(ROLES, 1, "groupAssociation", to=[]),
        "schema.json: roles[1]: role 'middle-aggregator' needs a groupAssociation, because its channel 'param-channel' has "
        "several groups: 'eu' and 'na'.",
    ),
    "trainers and nobody at the other end": (
        _set(ROLES, 1, "groupAssociation", 1, to=None),
        "schema.json: channels[0].groupBy.value[1]: group 'na' of channel 'param-channel' has workers of role 'trainer' but "
        "none of role 'middle-aggregator' at the other end; add a groupAssociation with this group to role 'middle-aggregator'.",
    ),
    "roles not connected": (
        _set(CHANNELS, 1, to=None),
        "schema.json: channels: the roles are not connected: no channel leads from 'middle-aggregator' and 'trainer' to "
        "'top-aggregator'; add a channel with one of each in its pair.",
    ),
    "an unknown function tag": (
        _set(CHANNELS, 0, "funcTags", "trainer", 1, to="uplod"),
        "schema.json: channels[0].funcTags.trainer[1]: unknown function tag 'uplod'; did you mean 'upload'? "
        "A tag of your own begins with 'x-'.",
    ),
    "a function tag of a role that is not in the pair": (
        _set(CHANNELS, 0, "funcTags", "top-aggregator", to=["aggregate"]),
        "schema.json: channels[0].funcTags.top-aggregator: role 'top-aggregator' is not in the pair of channel "
        "'param-channel'; its roles are 'trainer' and 'middle-aggregator'.",
    ),
    "an unknown backend": (
        _set(CHANNELS, 1, "backend", to="mqqt"),
        "schema.json: channels[1].backend: unknown backend 'mqqt'; did you mean 'mqtt'?",
    ),
    "an unknown compression": (
        _set(CHANNELS, 1, "compression", to={"sort": "zip"}),
        "schema.json: channels[1].compression.sort: unknown compression 'zip'; the compressions are 'none', 'float16', "
        "'bfloat16', 'int8' and 'topk'.",
    ),
    "groups formed by something else": (
        _set(CHANNELS, 0, "groupBy", "type", to="realm"),
        "schema.json: channels[0].groupBy.type: unknown type 'realm'; groups are formed by 'tag'.",
    ),
    "a wrong type": (
        _set(ROLES, 1, "replica", to="two"),
        "schema.json: roles[1].replica: must be a whole number of at least 1, not the text 'two'.",
    ),
    "no worker at all": (
        _set(ROLES, 1, "replica", to=0),
        "schema.json: roles[1].replica: must be a whole number of at least 1, not 0.",
    ),
    "text where a list belongs": (
        _set(CHANNELS, 0, "pair", to="trainer"),
        "schema.json: channels[0].pair: must be a list, not the text 'trainer'.",
    ),
    "a number where text belongs": (
        _set(ROLES, 0, "groupAssociation", 0, "param-channel", to=7),
        "schema.json: roles[0].groupAssociation[0].param-channel: must be text, not 7; put it in quotes.",
    ),
    "a misspelt key": (
        _set(ROLES, 0, "isDataConsumr", to=True),
        "schema.json: roles[0]: unknown key 'isDataConsumr'; did you mean 'isDataConsumer'?",
    ),
    "an unknown key": (
        _set("colour", to="red"),
        "schema.json: unknown key 'colour'; the keys here are 'name', 'description', 'roles' and 'channels'.",
    ),
    "a missing key": (_set(CHANNELS, 1, "pair", to=None), "schema.json: channels[1]: the key 'pair' is missing."),
    "a name that is empty": (_set(ROLES, 0, "name", to=""), "schema.json: roles[0].name: must not be empty."),
    "no roles": (_set(ROLES, to=[]), "schema.json: roles: a schema needs at least one role."),
    "a role whose name leads elsewhere": (
        _set(ROLES, 2, "name", to="../top"),
        "schema.json: roles[2].name: the role's name '../top' cannot be a folder's name; use letters, digits, dashes and "
        "underscores.",
    ),
}


@pytest.mark.parametrize("what", OF_THE_SCHEMA)
def test_a_schema_is_refused_with_its_sentence(what: str, flame_folder: Flame, schemas: dict[str, Any]) -> None:
    change, sentence = OF_THE_SCHEMA[what]
    schema = schemas["hier_mnist"]
    change(schema)
    folder = flame_folder("hier_mnist", {"eu": ["1"], "na": ["2"]}, schema__json=schema)
    assert refused(folder) == sentence


@pytest.mark.parametrize("what", OF_THE_SCHEMA)
def test_a_schema_by_itself_is_refused_as_well(
    what: str, tmp_path: Path, folder: Flame, schemas: dict[str, Any]
) -> None:
    change, sentence = OF_THE_SCHEMA[what]
    schema = schemas["hier_mnist"]
    change(schema)
    path = folder.all({"schema.json": schema}) / "schema.json"  # type: ignore[attr-defined]
    with pytest.raises(SpecError) as caught:
        load_schema(path)
    assert str(caught.value) == sentence.replace("schema.json", str(path))


@pytest.mark.parametrize("what", OF_THE_SCHEMA)
def test_a_server_without_files_names_the_place_in_the_form(what: str, schemas: dict[str, Any]) -> None:
    change, sentence = OF_THE_SCHEMA[what]
    schema = schemas["hier_mnist"]
    change(schema)
    with pytest.raises(SpecError) as caught:
        check_schema(shape(schema, Schema))
    assert str(caught.value) == sentence.removeprefix("schema.json: ")


def test_the_known_topologies_are_accepted(schemas: dict[str, Any]) -> None:
    for schema in schemas.values():
        check_schema(shape(schema, Schema))


def test_a_wrong_schema_is_what_the_user_hears_first(folder: Flame, schemas: dict[str, Any]) -> None:
    for what in ("no data-consuming role", "no association where several are possible", "a misspelt group"):
        change, sentence = OF_THE_SCHEMA[what]
        schema = json.loads(json.dumps(schemas["hier_mnist"]))
        change(schema)
        path = folder.all({"job.yaml": {"name": "j", "datasets": ["https://x.org/a"]}, "schema.json": schema})  # type: ignore[attr-defined]
        assert refused(path) == sentence


# --- the job and its data


def test_a_group_without_trainers(flame_folder: Flame) -> None:
    assert refused(flame_folder("hier_mnist", {"eu": ["1"]})) == (
        "schema.json: channels[0].groupBy.value[1]: group 'na' of channel 'param-channel' has workers of role "
        "'middle-aggregator' but none of role 'trainer' at the other end; give 'trainer' a dataset in this group, or take the "
        "group away from 'middle-aggregator'."
    )


def test_a_data_role_without_datasets(flame_folder: Flame) -> None:
    sentence = "dataSpec.json: role 'trainer' consumes data but has no dataset; give it some in dataSpec."
    assert refused(flame_folder(dataSpec__json=[], dataset1__json=None)) == sentence
    empty = [{"role": "trainer", "datasetGroups": {"us": []}}]
    assert refused(flame_folder(dataSpec__json=empty, dataset1__json=None)) == sentence


def test_datasets_for_a_role_that_takes_none(flame_folder: Flame) -> None:
    spec = [{"role": "trainer", "datasetGroups": {"us": ["1"]}}, {"role": "aggregator", "datasetGroups": {"us": ["1"]}}]
    assert refused(flame_folder(dataSpec__json=spec)) == (
        "dataSpec.json: [1].role: role 'aggregator' consumes no data; remove its datasets, or set its isDataConsumer to true."
    )


def test_datasets_for_a_role_that_is_not_there(flame_folder: Flame) -> None:
    spec = [{"role": "trianer", "datasetGroups": {"us": ["1"]}}]
    assert (
        refused(flame_folder(dataSpec__json=spec))
        == "dataSpec.json: [0].role: unknown role 'trianer'; did you mean 'trainer'?"
    )


def test_two_entries_for_a_role(flame_folder: Flame) -> None:
    spec = [{"role": "trainer", "datasetGroups": {"us": ["1"]}}] * 2
    assert refused(flame_folder(dataSpec__json=spec)) == (
        "dataSpec.json: [1]: role 'trainer' has two entries; put their groups into one."
    )


def test_a_group_of_datasets_that_the_role_has_not(flame_folder: Flame) -> None:
    assert refused(flame_folder("hier_mnist", {"eu": ["1"], "nas": ["2"]})) == (
        "dataSpec.json: [0].datasetGroups.nas: role 'trainer' has no groupAssociation with the group 'nas'; did you mean 'na'?"
    )


def test_an_unknown_dataset(flame_folder: Flame) -> None:
    assert refused(flame_folder(dataset1__json=None)) == (
        "dataSpec.json: [0].datasetGroups.us[0]: unknown dataset '64109d853e579ab7ff9fafb9': it is not registered and the job "
        "does not bring it; register it, or add its dataset file to the job."
    )


def test_dataset_ids_whose_count_does_not_agree_with_the_files(flame_folder: Flame) -> None:
    folder = flame_folder(groups={"us": ["a", "b", "c"]}, dataset3__json=None)
    assert refused(folder) == (
        "dataSpec.json: [0].datasetGroups.us[0]: unknown dataset 'a': it is not registered and the job does not bring it; "
        "3 of dataSpec's ids are unknown, but 2 of the job's datasets are free to be matched ('dataset1.json' and "
        "'dataset2.json'): make the counts agree."
    )


def test_an_unknown_dataset_on_a_server(schemas: dict[str, Any], make_job: Callable[..., JobForm]) -> None:
    form = make_job(schemas["mnist"], {"us": ["a"]})
    bad = shape(
        {"name": "j", "designId": "d", "dataSpec": [{"role": "trainer", "datasetGroups": {"us": ["x"]}}]}, JobForm
    )
    with pytest.raises(SpecError) as caught:
        check_job(bad, schema=form.schema, datasets=["a"])
    assert str(caught.value) == (
        "dataSpec[0].datasetGroups.us[0]: unknown dataset 'x': it is not registered and the job does not bring it; "
        "the datasets of the job: there are none."
    )


CHOICES = {
    "optimizer": "modelSpec.json: optimizer.sort: unknown optimizer 'fedavgg'; did you mean 'fedavg'?",
    "selector": "modelSpec.json: selector.sort: unknown selector 'fedavgg'; the selectors are 'default', 'random', 'oort', "
    "'fedbuff', 'async_oort' and 'round_robin'.",
    "datasampler": "modelSpec.json: datasampler.sort: unknown datasampler 'fedavgg'; the datasamplers are 'default' and 'fedbalancer'.",
    "privacy": "modelSpec.json: privacy.sort: unknown privacy 'fedavgg'; the privacies are 'default' and 'dp'.",
    "registry": "modelSpec.json: registry.sort: unknown registry 'fedavgg'; the registries are 'default', 'mlflow', 'local' and 'dummy'.",
}


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_algorithm(key: str, flame_folder: Flame) -> None:
    assert refused(flame_folder(modelSpec__json={key: {"sort": "fedavgg"}})) == CHOICES[key]


def test_an_unknown_backend_or_priority(flame_folder: Flame) -> None:
    job = {"name": "j", "backend": "zmq"}
    assert refused(flame_folder(job__json=job)) == (
        "job.json: backend: unknown backend 'zmq'; the backends are 'inproc', 'p2p' and 'mqtt'."
    )
    job = {"name": "j", "priority": "urgent"}
    assert refused(flame_folder(job__json=job)) == (
        "job.json: priority: unknown priority 'urgent'; the priorities are 'low', 'medium' and 'high'."
    )


@pytest.mark.parametrize("value", [0, -1, "many", 2.5, True, [1]])
def test_rounds_that_are_no_number_of_rounds(value: Any, flame_folder: Flame) -> None:
    sentence = refused(flame_folder(modelSpec__json={"hyperparameters": {"rounds": value}}))
    assert sentence.startswith("modelSpec.json: hyperparameters.rounds: must be a whole number of at least 1, not ")


def test_a_learning_rate_that_is_text(flame_folder: Flame) -> None:
    assert refused(flame_folder(modelSpec__json={"hyperparameters": {"learningRate": "1e-3"}})) == (
        "modelSpec.json: hyperparameters.learningRate: must be a number greater than 0, not the text '1e-3'."
    )


def test_a_run_time_of_nothing(flame_folder: Flame) -> None:
    assert refused(flame_folder(job__json={"name": "j", "maxRunTime": 0})) == (
        "job.json: maxRunTime: must be a number greater than 0, not 0."
    )


def test_a_misspelt_key_of_a_job(flame_folder: Flame) -> None:
    assert refused(flame_folder(job__json={"name": "j", "hyperparametrs": {}})) == (
        "job.json: unknown key 'hyperparametrs'; did you mean 'hyperparameters'?"
    )
    assert "unknown key 'min_trainers'; did you mean 'minTrainers'?" in refused(
        flame_folder(job__json={"name": "j", "policy": {"min_trainers": 2}})
    )


def test_a_key_given_twice(flame_folder: Flame) -> None:
    assert refused(flame_folder(job__json='{"name": "a", "policy": {"minTrainers": 1, "minTrainers": 2}}')) == (
        "job.json: policy: the key 'minTrainers' stands here twice; keep one of them."
    )
    assert refused(
        flame_folder(modelSpec__json="{}", job__json='{"name": "a", "optimizer": "fedavg", "name": "b"}')
    ) == ("job.json: the key 'name' stands here twice; keep one of them.")


def test_the_same_thing_said_in_two_places(flame_folder: Flame) -> None:
    assert refused(flame_folder(job__json={"name": "j", "optimizer": "fedprox"})) == (
        "job.json: optimizer: optimizer is given twice, here and in the modelSpec; keep one."
    )
    assert refused(flame_folder(job__json={"name": "j", "schema": "schema.json", "schemaPath": "schema.json"})) == (
        "job.json: schema and schemaPath say the same thing; keep one of them."
    )


# --- code


def test_a_role_without_code(flame_folder: Flame, tmp_path: Path) -> None:
    folder = flame_folder()
    (folder / "code" / "aggregator" / "main.py").unlink()
    (folder / "code" / "aggregator").rmdir()
    assert refused(folder) == (
        "code: role 'aggregator' has no code: add a folder 'aggregator' with a main.py (it has 'trainer')."
    )


def test_a_role_without_main(flame_folder: Flame) -> None:
    folder = flame_folder()
    (folder / "code" / "trainer" / "main.py").rename(folder / "code" / "trainer" / "train.py")
    assert refused(folder) == "code: trainer: role 'trainer' has no main.py in its folder; add one."


def test_a_job_without_code(folder: Flame, schemas: dict[str, Any]) -> None:
    path = folder.all({"job.yaml": {"name": "j", "datasets": ["https://x.org/a"]}, "schema.json": schemas["mnist"]})  # type: ignore[attr-defined]
    assert refused(path) == (
        "job.yaml: the job has no code: give the roles' folders as a zip, as a folder 'code', or by the key code."
    )


def test_a_job_without_schema(folder: Flame) -> None:
    path = folder.all({"job.yaml": {"name": "j"}})  # type: ignore[attr-defined]
    assert refused(path) == "job.yaml: the job has no schema: give one, or the designId of a registered design."


def test_a_dataset_file_that_is_not_there(folder: Flame, schemas: dict[str, Any]) -> None:
    path = folder.all({"job.yaml": {"name": "j", "schema": schemas["mnist"], "datasets": ["data/a.npz"]}})  # type: ignore[attr-defined]
    assert re.fullmatch(
        r"job.yaml: datasets\[0\]: there is no file 'data/a.npz' in .*; give a path that exists, or a URL.",
        refused(path),
    )


def test_an_overridden_value_names_the_command_line(flame_folder: Flame) -> None:
    assert refused(flame_folder(), "optimizer.sort=fedprx") == (
        "--set optimizer.sort=fedprx: unknown optimizer 'fedprx'; did you mean 'fedprox'?"
    )
    assert refused(flame_folder(), "maxRunTime=soon") == (
        "--set maxRunTime=soon: must be a number greater than 0, not the text 'soon'."
    )
