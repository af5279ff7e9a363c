"""The configuration that a role reads: Flame's file, Flame's attribute names, and errors that name the field."""

import copy
import json
import pickle

import pytest

from flame.errors import SpecError
from flame.sdk.config import Config, load_config
from flame.spec.nouns import TaskConfig

RAW = {
    "taskid": "505f9fc4",
    "backend": "p2p",
    "brokers": [{"host": "localhost", "sort": "mqtt"}, {"host": "localhost:10104", "sort": "p2p"}],
    "groupAssociation": {"param-channel": "west"},
    "channels": [
        {
            "description": "Model updates go both ways",
            "groupBy": {"type": "tag", "value": ["west", "east"]},
            "name": "param-channel",
            "pair": ["trainer", "aggregator"],
            "funcTags": {"aggregator": ["distribute", "aggregate"], "trainer": ["fetch", "upload"]},
        },
        {"name": "other", "pair": ["coordinator", "aggregator"]},
    ],
    "dataset": "https://example.org/mnist.npz",
    "dependencies": ["numpy >= 1.2.0"],
    "hyperparameters": {"batchSize": 32, "learningRate": 0.01, "rounds": 5, "my_own": 7},
    "baseModel": {"name": "", "version": 1},
    "job": {"id": "622a358619ab59012eabeefb", "name": "mnist"},
    "registry": {"sort": "dummy", "uri": ""},
    "selector": {"sort": "default", "kwargs": {}},
    "optimizer": {"sort": "fedadam", "kwargs": {"beta_1": 0.9}},
    "maxRunTime": 300,
    "realm": "default/us/west",
    "role": "trainer",
}


@pytest.fixture
def raw():
    return copy.deepcopy(RAW)


def test_flames_own_file_is_read_with_flames_attribute_names(raw, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    config = load_config(str(path))
    assert (config.task_id, config.role, config.realm) == ("505f9fc4", "trainer", "default/us/west")
    assert (config.job.job_id, config.job.name) == ("622a358619ab59012eabeefb", "mnist")
    assert config.brokers.sort_to_host["p2p"] == "localhost:10104"
    assert list(config.channels) == ["param-channel"]
    assert config.channels["param-channel"].func_tags["trainer"] == ["fetch", "upload"]
    assert config.func_tag_map == {"fetch": "param-channel", "upload": "param-channel"}
    assert config.group("param-channel") == "west"
    assert config.optimizer.kwargs == {"beta_1": 0.9}
    assert (config.registry.sort, config.registry.uri) == ("dummy", "")
    assert config.max_run_time == 300
    assert not config.base_model


def test_hyperparameters_answer_in_both_spellings_and_have_flames_defaults(raw):
    h = Config(raw).hyperparameters
    assert (h.batch_size, h.batchSize, h["batch_size"], h["batchSize"]) == (32, 32, 32, 32)
    assert (h.rounds, h.epochs, h.learning_rate, h.my_own) == (5, 1, 0.01, 7)
    assert h.get("momentum", 0.5) == 0.5
    assert h.aggregation_goal is None
    with pytest.raises(AttributeError, match=r"no hyperparameter 'momentum'; the configuration has .*my_own"):
        _ = h.momentum
    h.rounds = 9
    h.weight_decay = 0.1
    assert h.dict()["rounds"] == 9
    assert h.dict()["weightDecay"] == 0.1
    assert pickle.loads(pickle.dumps(h)).weight_decay == 0.1


def test_a_configuration_by_hand_may_leave_out_most(raw):
    small = {key: raw[key] for key in ("taskid", "role", "job", "channels")}
    config = Config(small)
    assert config.hyperparameters.learning_rate is None
    assert config.optimizer.sort == "fedavg"
    assert config.policy.min_trainers == 1
    assert config.group("param-channel") == "default"


def test_the_control_planes_task_is_read_with_its_policy(raw):
    raw.pop("channels")
    task = TaskConfig(
        taskid="a1",
        role="trainer",
        job={"id": "j", "name": "n"},
        realm="r",
        backend="p2p",
        brokers=[],
        channels=[],
        group_association={"c": "default"},
        dataset="file:///x",
        hyperparameters={"rounds": 3},
        base_model={"name": "m", "version": 2},
        optimizer={"sort": "fedavg", "kwargs": {}},
        selector={"sort": "default", "kwargs": {}},
        registry={"sort": "local", "uri": ""},
        dependencies=[],
        max_run_time=None,
        peers={"c": 4},
        schema="central",
    )
    import msgspec

    document = msgspec.to_builtins(task)
    document["channels"] = [{"name": "c", "pair": ["trainer", "aggregator"]}]
    document["policy"]["minTrainers"] = 3
    config = Config(msgspec.convert(document, TaskConfig))
    assert (config.policy.min_trainers, config.peers, config.schema) == (3, {"c": 4}, "central")
    assert config.base_model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw.pop("role"), "missing required field `role`"),
        (lambda raw: raw.pop("taskid"), "missing required field `taskid`"),
        (lambda raw: raw["job"].pop("id"), r"config.json: job: .*required field `id`"),
        (lambda raw: raw.update(channels=3), "config.json: channels: expected `array`, got `int`"),
        (lambda raw: raw["channels"][0].update(pair=["trainer"]), r"config.json: channels\[0\].pair: "),
        (lambda raw: raw.update(policy={"minTrainers": 0}), "config.json: policy.minTrainers: "),
        (lambda raw: raw.update(role="nobody"), "config.json: channels: no channel has the role 'nobody'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(raw, tmp_path, change, sentence):
    change(raw)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(SpecError, match=sentence):
        Config(path)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere.json: the configuration cannot be read: No such file"):
        Config(tmp_path / "nowhere.json")
    path = tmp_path / "config.json"
    path.write_text('{"taskid": "1",\n oops}')
    with pytest.raises(SpecError, match=r"config.json: line 2: this is not JSON"):
        Config(path)


def test_yaml_and_comments_are_read(raw, tmp_path):
    raw["//"] = "a comment"
    raw["hyperparameters"] = None
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))
    assert Config(path).hyperparameters.rounds == 1
