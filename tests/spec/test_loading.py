"""Job folders and job files load, as Flame has them and in the short form, and say what was done with them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from flame.errors import SpecError, UsageError
from flame.spec import bundle
from flame.spec.expand import expand
from flame.spec.load import load_dataset, load_datasets, load_design, load_job, load_schema
from flame.spec.nouns import JobForm

Flame = Callable[..., Path]
MAIN = "print('hello')\n"


def zipped(*roles: str, top: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for role in roles:
            archive.writestr(f"{top}{role}/main.py", MAIN)
    return buffer.getvalue()


# --- Flame's own folders


def test_a_folder_of_flames_files_is_a_job_as_it_stands(flame_folder: Flame) -> None:
    job = load_job(flame_folder())
    form = job.form
    assert (form.name, form.backend, form.priority, form.max_run_time) == ("mnist", "mqtt", "low", 1800)
    assert form.schema is not None
    assert [role.name for role in form.schema.roles] == ["trainer", "aggregator"]
    assert form.model_spec.hyperparameters == {"rounds": 5, "batchSize": 32, "learningRate": 0.01}
    assert form.model_spec.selector.sort == "random"
    assert form.model_spec.selector.kwargs == {"k": 1}
    assert form.model_spec.base_model.version == 1
    assert job.design == "mnist"
    assert form.design_id is None
    assert job.archive is not None
    assert form.code == bundle.digest(job.archive)
    assert bundle.folders(job.archive) == {"aggregator": True, "trainer": True}
    assert [dataset.url for dataset in form.datasets] == ["https://example.org/digits_1.npz"]
    assert msgspec.json.decode(msgspec.json.encode(form), type=JobForm) == form


def test_unknown_dataset_ids_are_matched_in_natural_order_and_the_note_says_so(flame_folder: Flame) -> None:
    ids = [f"629a40{number:02x}22f4715eabf99c5b" for number in range(11)]
    job = load_job(flame_folder(groups={"us": ids}))
    assert [(dataset.id, dataset.url[-6:]) for dataset in job.form.datasets][:3] == [
        (ids[0], "_1.npz"),
        (ids[1], "_2.npz"),
        (ids[2], "_3.npz"),
    ]
    assert job.form.datasets[9].url.endswith("digits_10.npz")
    (note,) = job.notes
    assert note.startswith(
        "No server knows the dataset ids of dataSpec; matched in order with the job's own datasets: "
    )
    assert f"{ids[9]} is dataset10.json" in note


def test_groups_are_matched_in_sorted_order(flame_folder: Flame) -> None:
    folder = flame_folder("hier_mnist", {"na": ["id-na"], "eu": ["id-eu"]})
    for name, number in (("dataset_eu_uk.json", 1), ("dataset_na_us.json", 2)):
        (folder / f"dataset{number}.json").rename(folder / name)
    job = load_job(folder)
    assert {dataset.id: dataset.url[-5] for dataset in job.form.datasets} == {"id-eu": "1", "id-na": "2"}


def test_ids_that_the_server_knows_are_left_alone(flame_folder: Flame) -> None:
    job = load_job(flame_folder(groups={"us": ["known"]}), registered=["known"])
    assert job.form.datasets == []
    assert job.notes == ("Not used, because dataSpec does not name them: 'dataset1.json'.",)
    job = load_job(flame_folder(groups={"us": ["known", "new"]}, dataset2__json=None), registered=["known"])
    assert [dataset.id for dataset in job.form.datasets] == ["new"]


def test_datasets_are_found_by_id_name_or_file_name(flame_folder: Flame) -> None:
    folder = flame_folder(groups={"us": ["dataset2", "my own", "the id"]})
    for number, change in ((1, {"id": "the id"}), (3, {"name": "my own"})):
        path = folder / f"dataset{number}.json"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}).replace("'", '"'))
        path.rename(path.with_suffix(".yaml"))
    form = load_job(folder).form
    assert {dataset.id: dataset.url[-5] for dataset in form.datasets} == {"dataset2": "2", "my own": "3", "the id": "1"}
    assert len(expand(form, None, {}, "0" * 24)) == 4


def test_an_ambiguous_name_is_refused(flame_folder: Flame) -> None:
    folder = flame_folder(groups={"us": ["the digits", "other"]})
    with pytest.raises(SpecError, match=r"2 datasets are called 'the digits' \('dataset1.json' and 'dataset2.json'\)"):
        load_job(folder)


def test_a_zip_with_a_folder_around_the_roles_is_unwrapped(flame_folder: Flame) -> None:
    folder = flame_folder()
    plain = load_job(flame_folder()).form.code
    for path in sorted((folder / "code").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "code").rmdir()
    (folder / "mnist.zip").write_bytes(zipped("trainer", "aggregator", top="mnist/"))
    wrapped = load_job(folder)
    assert wrapped.archive is not None
    assert bundle.folders(wrapped.archive) == {"aggregator": True, "trainer": True}
    assert wrapped.form.code != plain
    (folder / "mnist.zip").write_bytes(zipped("aggregator", "trainer"))
    assert load_job(folder).form.code == wrapped.form.code


def test_two_zips_need_a_word(flame_folder: Flame) -> None:
    folder = flame_folder(**{"a.zip": zipped("trainer", "aggregator"), "b.zip": zipped("trainer", "aggregator")})
    with pytest.raises(SpecError, match=r"several zips \('a.zip' and 'b.zip'\); say which by the key code"):
        load_job(folder)
    assert load_job(folder, [f"code={folder / 'b.zip'}"]).archive


def test_a_registered_design_needs_neither_schema_nor_code(folder: Flame) -> None:
    path = folder.all(
        {"job.json": {"designId": "mnist", "dataSpec": [{"role": "trainer", "datasetGroups": {"us": ["a"]}}]}}
    )  # type: ignore[attr-defined]
    job = load_job(path, registered=["a"])
    assert (job.form.design_id, job.form.schema, job.form.code, job.archive) == ("mnist", None, None, None)
    assert job.form.name == "mnist"


OLDER_JOBS: dict[str, dict[str, Any]] = {
    "with versions": {"designId": "mnist", "schemaVersion": "1", "codeVersion": "1", "userId": "john"},
    "with file keys": {"designId": "mnist", "dataSpecFile": "dataSpec.json", "modelSpecFile": "modelSpec.json"},
    "with no paths": {"designId": "mnist", "maxRunTime": 300},
}


@pytest.mark.parametrize("what", OLDER_JOBS)
def test_older_job_files_load(what: str, flame_folder: Flame) -> None:
    job = load_job(flame_folder(job__json=OLDER_JOBS[what]))
    assert job.form.name == "mnist"
    assert job.form.model_spec.hyperparameters["rounds"] == 5
    dropped = [note for note in job.notes if "mean nothing here any more" in note]
    assert dropped == (
        ["job.json: userId, schemaVersion, codeVersion mean nothing here any more; left out."]
        if "versions" in what
        else []
    )


def test_the_oldest_job_file_has_everything_at_its_top_level(flame_folder: Flame) -> None:
    job = {
        "designId": "medmnist",
        "dataSpec": {"fromUser": {"default": 0}, "fromSystem": ["61e0c1e86bdf29b562de7c22"]},
        "backend": "mqtt",
        "baseModel": {"name": "", "version": 0},
        "hyperparameters": {"rounds": 5, "epochs": 2},
        "dependencies": ["numpy >= 1.2.0"],
        "selector": {"sort": "random", "kwargs": {"k": 1}},
    }
    form = load_job(flame_folder(job__json=job, modelSpec__json=None, dataSpec__json=None)).form
    assert form.data_spec[0].dataset_groups == {"us": ["61e0c1e86bdf29b562de7c22"]}
    assert form.model_spec.hyperparameters == {"rounds": 5, "epochs": 2}
    assert form.model_spec.selector.kwargs == {"k": 1}


@pytest.mark.parametrize(
    "system", [["a"], {"us": ["a"]}, {"trainer": {"us": ["a"]}}, {"0": ["a"]}], ids=["list", "group", "role", "number"]
)
def test_earlier_forms_of_a_data_spec_load(system: Any, flame_folder: Flame) -> None:
    spec = {"fromUser": {"default": 0}, "fromSystem": system}
    job = load_job(flame_folder(dataSpec__json=spec))
    assert [(entry.role, entry.dataset_groups) for entry in job.form.data_spec] == [("trainer", {"us": ["a"]})]
    assert any("go to 'us', the only group" in note for note in job.notes) is (system == {"0": ["a"]})


@pytest.mark.parametrize("users", [{"default": 2}, {"us": 2}, {"trainer": {"us": 2}}], ids=["only", "group", "role"])
@pytest.mark.parametrize("system", [{}, {"us": ["a"]}], ids=["none", "hybrid"])
def test_workers_that_participants_bring_are_counted_by_group(
    users: dict[str, Any], system: dict[str, Any], flame_folder: Flame
) -> None:
    form = load_job(flame_folder(dataSpec__json={"fromUser": users, "fromSystem": system})).form
    assert [(one.role, one.dataset_groups, one.from_user) for one in form.data_spec] == [("trainer", system, {"us": 2})]
    today = [{"role": "trainer", "datasetGroups": system, "fromUser": {"us": 2}}]
    assert load_job(flame_folder(dataSpec__json=today)).form.data_spec == form.data_spec


def test_a_wrong_count_of_participants_is_refused_with_its_place(flame_folder: Flame) -> None:
    with pytest.raises(SpecError, match=r"^dataSpec.json: fromUser.us: must be a whole number"):
        load_job(flame_folder(dataSpec__json={"fromUser": {"us": "two"}, "fromSystem": {}}))
    with pytest.raises(SpecError, match=r"^dataSpec.json: fromUser.mars: role 'trainer' has no groupAssociation"):
        load_job(flame_folder(dataSpec__json={"fromUser": {"mars": 1}, "fromSystem": {}}))
    with pytest.raises(SpecError, match=r"^dataSpec.json: fromUser: must be counts by group"):
        load_job(flame_folder(dataSpec__json={"fromUser": 2, "fromSystem": {}}))


def test_older_schemas_load(flame_folder: Flame, schemas: dict[str, Any]) -> None:
    schema = schemas["mnist"] | {"version": "1.0", "connectors": [], "defaultBackend": "mqtt"}
    for role in schema["roles"]:
        role["groupAssociation"] = None
        del role["replica"]
    schema["channels"][0] |= {"isBidirectional": True, "groupBy": {"type": "", "value": []}, "brokerHost": "x"}
    job = load_job(flame_folder(groups={"default": ["a"]}, schema__json=schema))
    assert job.form.schema is not None
    (channel,) = job.form.schema.channels
    assert (channel.backend, channel.group_by.type, channel.group_by.value) == ("mqtt", "tag", ["default"])
    assert job.notes[:2] == (
        "schema.json: version, connectors mean nothing here any more; left out.",
        "schema.json: channel 'param-channel': isBidirectional, brokerHost mean nothing here any more; left out.",
    )


def test_a_registry_in_the_model_spec_is_the_jobs(flame_folder: Flame) -> None:
    spec = {"registry": {"sort": "dummy", "uri": ""}, "optimizer": {}, "selector": {"sort": "", "kwargs": None}}
    form = load_job(flame_folder(modelSpec__json=spec)).form
    assert form.registry.sort == "dummy"
    assert (form.model_spec.optimizer.sort, form.model_spec.selector.sort) == ("fedavg", "default")
    form = load_job(flame_folder(modelSpec__json={"registry": {"sort": "", "uri": ""}})).form
    assert form.registry.sort == "default"


def test_comments_are_dropped_at_any_depth(flame_folder: Flame, schemas: dict[str, Any]) -> None:
    schema = schemas["mnist"]
    schema["//"] = "one"
    schema["roles"][0]["groupAssociation"][0]["//"] = "two"
    schema["channels"][0]["funcTags"]["//"] = "three"
    text = msgspec.json.encode(schema).decode().replace('"name":', '"//": 1, "//": 2, "name":')
    plain = load_job(flame_folder()).form
    assert load_job(flame_folder(schema__json=text, modelSpec__json=None)).form.schema == plain.schema


# --- the short form

SHORT = """
name: digits
schema:
  name: two tiers
  roles: [{name: trainer, isDataConsumer: true}, {name: aggregator}]
  channels:
    - name: param-channel
      pair: [trainer, aggregator]
      funcTags: {trainer: [fetch, upload], aggregator: [distribute, aggregate]}
code: workers
datasets:
  - data/one.npz
  - https://example.org/two.npz
  - {name: three, url: data/three.json, realm: default/us}
  - four.yaml
hyperparameters: {rounds: 3, learningRate: 1e-3}
optimizer: FedAdam
selector: {sort: random, kwargs: {k: 2}}
registry: local
policy: {minTrainers: 2, roundDeadline: 5}
"""


@pytest.fixture
def short(folder: Flame) -> Path:
    path: Path = folder.all(  # type: ignore[attr-defined]
        {
            "job.yaml": SHORT,
            "workers/trainer/main.py": MAIN,
            "workers/aggregator/main.py": MAIN,
            "data/one.npz": b"1",
            "data/three.json": "[1, 2]",
            "four.yaml": "name: fourth\nurl: data/one.npz\n",
        }
    )
    return path


def test_one_short_file_says_everything(short: Path) -> None:
    job = load_job(short / "job.yaml")
    assert job.form == load_job(short).form
    form = job.form
    assert {dataset.id: dataset.url for dataset in form.datasets} == {
        "one": str(short / "data/one.npz"),
        "two": "https://example.org/two.npz",
        "three": str(short / "data/three.json"),
        "fourth": str(short / "data/one.npz"),
    }
    assert [(entry.role, entry.dataset_groups) for entry in form.data_spec] == [
        ("trainer", {"default": ["one", "two", "three", "fourth"]})
    ]
    assert form.model_spec.optimizer.sort == "fedadam"
    assert form.model_spec.selector.kwargs == {"k": 2}
    assert form.model_spec.hyperparameters == {"rounds": 3, "learningRate": 0.001}
    assert form.registry.sort == "local"
    assert form.policy.min_trainers == 2
    assert job.notes == ()
    assert job.design is None


def test_datasets_by_group_or_by_role(folder: Flame, schemas: dict[str, Any]) -> None:
    files = {"job.yaml": "", "schema.yaml": schemas["hier_mnist"]}
    files |= {f"{role['name']}/main.py": MAIN for role in schemas["hier_mnist"]["roles"]}
    for datasets in (
        {"na": ["https://x.org/a"], "eu": ["https://x.org/b"]},
        {"trainer": {"eu": ["https://x.org/b"], "na": ["https://x.org/a"]}},
    ):
        files["job.yaml"] = {"name": "j", "datasets": datasets}
        form = load_job(folder.all(files)).form  # type: ignore[attr-defined]
        assert form.data_spec[0].dataset_groups == {"eu": ["b"], "na": ["a"]}
    files["job.yaml"] = {"name": "j", "datasets": ["https://x.org/a"]}
    with pytest.raises(SpecError, match=r"job.yaml: datasets: role 'trainer' has several groups \('eu' and 'na'\)"):
        load_job(folder.all(files))  # type: ignore[attr-defined]


def test_datasets_with_the_same_file_name_are_told_apart(folder: Flame, schemas: dict[str, Any]) -> None:
    urls = ["https://a.org/data.npz", "https://b.org/data.npz", "https://a.org/data.npz"]
    files = {"job.yaml": {"name": "j", "schema": schemas["mnist"], "datasets": urls}}
    files |= {f"{role}/main.py": MAIN for role in ("trainer", "aggregator")}
    form = load_job(folder.all(files)).form  # type: ignore[attr-defined]
    assert [task.dataset for task in expand(form, None, {}, "0" * 24) if task.dataset] == urls
    assert len({dataset.id for dataset in form.datasets}) == 2


def test_a_data_spec_beside_a_list_of_datasets_calls_them_by_name(short: Path) -> None:
    text = SHORT + "dataSpec: [{role: trainer, datasetGroups: {default: [fourth, 'data/one.npz', three]}}]\n"
    (short / "job.yaml").write_text(text)
    job = load_job(short)
    assert job.form.data_spec[0].dataset_groups == {"default": ["fourth", "data/one.npz", "three"]}
    assert {dataset.id for dataset in job.form.datasets} == {"fourth", "data/one.npz", "three"}
    assert job.notes == ("Not used, because dataSpec does not name them: 'https://example.org/two.npz'.",)


def test_hyperparameters_in_the_job_go_before_those_in_the_model_spec(flame_folder: Flame) -> None:
    job = {"name": "j", "hyperparameters": {"rounds": 2, "seed": 1}}
    assert load_job(flame_folder(job__json=job)).form.model_spec.hyperparameters == {
        "rounds": 2,
        "batchSize": 32,
        "learningRate": 0.01,
        "seed": 1,
    }


def test_only_the_folders_of_roles_are_packed(short: Path) -> None:
    before = load_job(short).form.code
    (short / "workers" / "notes").mkdir()
    (short / "workers" / "notes" / "big.bin").write_bytes(b"0" * 1000)
    (short / "workers" / "trainer" / "__pycache__").mkdir()
    (short / "workers" / "trainer" / "__pycache__" / "main.pyc").write_bytes(b"0")
    (short / "workers" / ".git").mkdir()
    assert load_job(short).form.code == before
    (short / "workers" / "trainer" / "model.py").write_text("x = 1\n")
    assert load_job(short).form.code != before


# --- overrides


def test_values_are_overridden(flame_folder: Flame) -> None:
    form = load_job(
        flame_folder("hier_mnist", {"eu": ["1"], "na": ["2"]}),
        [
            "hyperparameters.rounds=7",
            "modelSpec.hyperparameters.learningRate=1e-2",
            "optimizer.sort=fedprox",
            "optimizer.kwargs.mu=0.1",
            "selector=default",
            "schema.roles[2].replica=2",
            "schema.roles[middle-aggregator].replica=3",
            "schema.channels.global-channel.backend=p2p",
            "schema.channels[0].compression=int8",
            "name=1",
            "maxRunTime=60",
            "policy.deterministic=true",
            "brokers=[{sort: mqtt, host: 'localhost:1883'}]",
            "registry.uri=http://x.org",
        ],
    ).form
    assert form.schema is not None
    assert form.model_spec.hyperparameters["rounds"] == 7
    assert form.model_spec.hyperparameters["learningRate"] == 0.01
    assert msgspec.to_builtins(form.model_spec.optimizer) == {"sort": "fedprox", "kwargs": {"mu": 0.1}}
    assert msgspec.to_builtins(form.model_spec.selector) == {"sort": "default", "kwargs": {}}
    assert [role.replica for role in form.schema.roles] == [1, 3, 2]
    assert form.schema.channels[1].backend == "p2p"
    assert form.schema.channels[0].compression is not None
    assert (form.name, form.max_run_time, form.policy.deterministic) == ("1", 60, True)
    assert form.brokers[0].host == "localhost:1883"
    assert form.registry.uri == "http://x.org"


def test_a_new_hyperparameter_is_taken_and_mentioned(flame_folder: Flame) -> None:
    job = load_job(flame_folder(), ["hyperparameters.seed=3"])
    assert job.form.model_spec.hyperparameters["seed"] == 3
    assert job.notes[-1] == (
        "--set hyperparameters.seed=3: modelSpec.hyperparameters.seed is new; "
        "there were 'rounds', 'batchSize' and 'learningRate'."
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rounds=5", "there is no 'rounds'; the keys there are 'name', "),
        ("polcy.minTrainers=5", "there is no 'polcy'; did you mean 'policy'?"),
        ("optimiser=fedavg", "there is no 'optimiser'; did you mean 'optimizer'?"),
        ("schema.roles[0].replicas=5", "there is no 'replicas' in schema.roles[0]; did you mean 'replica'?"),
        ("schema.roles[5].replica=5", "no entry '5' in schema.roles; it has 2 entries, 'trainer' and 'aggregator'."),
        (
            "schema.roles[boss].replica=5",
            "no entry 'boss' in schema.roles; it has 2 entries, 'trainer' and 'aggregator'.",
        ),
        ("brokers[0].host=x", "there is no entry '0' in brokers; it is empty."),
        (
            "hyperparameters.rounds.many=5",
            "modelSpec.hyperparameters.rounds is a single value; there is no 'many' in it.",
        ),
        ("hyperparameters.rounds", "write it as path=value"),
        ("=5", "the path before the = is missing"),
        (".a=5", "'.a' is no path"),
        ("a..b=5", "'a..b' is no path"),
        ("schema.roles[0=5", "is no path"),
    ],
)
def test_an_override_that_leads_nowhere_lists_what_is_there(override: str, sentence: str, flame_folder: Flame) -> None:
    with pytest.raises(UsageError) as caught:
        load_job(flame_folder(), [override])
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"--set {override}: ")


def test_whole_parts_are_exchanged_by_file(
    flame_folder: Flame, schemas: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = flame_folder()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring.yaml").write_text(yaml.safe_dump(schemas["distributed_training"]))
    form = load_job(folder, ["schema=ring.yaml", "schema.roles.trainer.description=alone"]).form
    assert form.schema is not None
    assert [(role.name, role.description) for role in form.schema.roles] == [("trainer", "alone")]
    with pytest.raises(UsageError, match=r"/nothing.yaml cannot be read: No such file"):
        load_job(folder, ["modelSpec=nothing.yaml"])


# --- what is not a job


def test_what_is_no_job_says_so(tmp_path: Path, flame_folder: Flame) -> None:
    with pytest.raises(UsageError, match=r"nothing: there is no such job folder or job file"):
        load_job(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"there is no job.yaml or job.json in this folder"):
        load_job(tmp_path)
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(SpecError, match=r"list.yaml: a job is an object with keys such as name and schema, not a list"):
        load_job(tmp_path / "list.yaml")
    folder = flame_folder()
    (folder / "job.yaml").write_text("name: other")
    with pytest.raises(UsageError, match=r"there are 'job.json' and 'job.yaml'; name the one that is meant"):
        load_job(folder)
    assert load_job(folder / "job.json").form.name == "mnist"


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "~nobody-of-this-name/x", "loop"])
def test_a_path_that_cannot_be_one_is_a_sentence(path: str, short: Path) -> None:
    (short / "loop").symlink_to(short / "loop")
    where = (short / path) if path == "loop" else path
    with pytest.raises((SpecError, UsageError)):
        load_job(where)
    for key in ("schema", "code", "modelSpec", "dataSpec"):
        document = yaml.safe_load(SHORT) | {key: path}
        (short / "job.yaml").write_text(json.dumps(document))
        with pytest.raises((SpecError, UsageError)):
            load_job(short)
    (short / "job.yaml").write_text(json.dumps(yaml.safe_load(SHORT) | {"datasets": [path]}))
    with pytest.raises(SpecError, match=r"^job.yaml: datasets\[0\]: "):
        load_job(short)


# --- single nouns


def test_single_nouns_load_from_files_folders_and_standard_input(
    flame_folder: Flame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = flame_folder(groups={"us": ["a", "b"]})
    assert load_schema(folder / "schema.json").name == "two tiers"
    assert [dataset.url[-5] for dataset in load_datasets(folder)] == ["1", "2"]
    assert load_dataset(folder / "dataset2.json").url[-5] == "2"
    (folder / "several.yaml").write_text("[{name: a, url: several.yaml}, {name: b, url: 'https://x.org'}]")
    assert [dataset.url for dataset in load_datasets(folder / "several.yaml")] == [
        str(folder / "several.yaml"),
        "https://x.org",
    ]
    with pytest.raises(SpecError, match="one dataset is expected here; there are 2"):
        load_dataset(folder / "several.yaml")
    (folder / "design.yaml").write_text("{id: x, name: mnist, description: digits}")
    assert load_design(folder / "design.yaml").description == "digits"
    with pytest.raises(UsageError, match=r"no dataset\*.json or dataset\*.yaml in this folder"):
        load_datasets(folder / "code")

    class Stdin:
        buffer = io.BytesIO(b"name: from standard input\nurl: https://x.org")

    monkeypatch.setattr("sys.stdin", Stdin)
    assert load_dataset("-").name == "from standard input"
    (folder / "empty.yaml").write_text("{name: a, url: ' '}")
    with pytest.raises(SpecError, match=r"empty.yaml: url: the url of a dataset must not be empty"):
        load_dataset(folder / "empty.yaml")
