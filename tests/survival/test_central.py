"""A synchronous job whose workers are killed at every point ends by itself, with the model of the undisturbed run to the bit."""

import json
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import Run, bits, central, finish, parallel, rounds


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return central(
        tmp_path_factory.mktemp("job"),
        modelSpec={"optimizer": {"sort": "fedadam"}},
        restart={"attempts": 10, "backoff": 0.1},
    )


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    document, models = finish(tmp_path_factory.mktemp("undisturbed"), job)
    assert rounds(document) == [1, 2, 3, 4, 5]
    return document, models


@pytest.mark.parametrize(
    "wishes",
    [
        [
            "aggregator@start@0.kill",
            "trainer@start@0.kill",
            "aggregator@internal_init@1.kill",
            "aggregator@distribute@1.kill",
            "trainer@train@2.kill",
        ],
        [
            "trainer@upload@2.kill",
            "aggregator@distribute+@3.kill",
            "trainer@train+@4.kill",
            "aggregator@aggregate+@4.kill",
        ],
        [
            "trainer@fetch+@2.kill",
            "aggregator@checkpoint@3.kill",
            "trainer@upload+@4.kill",
            "aggregator@checkpoint+@4.kill",
        ],
        ["aggregator@inform_end_of_training@6.kill", "aggregator@save_model+@6.kill"],
        ["aggregator@inform_end_of_training+@6.kill"],
    ],
    ids=" ".join,
)
def test_the_model_is_that_of_the_undisturbed_run_whoever_is_killed(job, undisturbed, tmp_path, wishes):
    document, models = finish(tmp_path, job, wishes)
    assert rounds(document) == [1, 2, 3, 4, 5]
    assert [entry["metrics"] for entry in document["rounds"]] == [e["metrics"] for e in undisturbed[0]["rounds"]]
    assert bits(models) == bits(undisturbed[1])


REMEMBERED = {
    "topk and scaffold": (
        {"sort": "topk", "kwargs": {"k": 0.1}},
        {"optimizer": {"sort": "scaffold"}, "selector": {"sort": "round_robin", "kwargs": {"k": 2}}},
    ),
    "int8 and feddyn": (
        {"sort": "int8", "kwargs": {"rounding": "stochastic"}},
        {"optimizer": {"sort": "feddyn", "kwargs": {"alpha": 0.1}}, "selector": {"sort": "random", "kwargs": {"k": 3}}},
    ),
    "topk and noise": (
        {"sort": "topk", "kwargs": {"k": 0.1}},
        {
            "optimizer": {"sort": "fedyogi"},
            "privacy": {"sort": "dp", "kwargs": {"clip_threshold": 1.0, "noise_factor": 0.1, "seed": 3}},
        },
    ),
}


@pytest.mark.parametrize("name", REMEMBERED)
def test_what_is_remembered_beside_the_model_is_that_of_the_undisturbed_run(tmp_path, name):
    compression, model = REMEMBERED[name]
    settings = {"modelSpec": model, "compression": compression, "restart": {"attempts": 10, "backoff": 0.1}}
    job = central(tmp_path / "job", sites=4, **settings)
    document, models = finish(tmp_path, job)
    wishes = [
        "trainer@train@1.kill",
        "trainer@upload+@2.kill",
        "aggregator@aggregate@3.kill",
        "trainer@train+@4.kill",
        "aggregator@checkpoint+@4.kill",
    ]
    again, found = finish(tmp_path, job, wishes, "disturbed")
    assert [entry["metrics"] for entry in again["rounds"]] == [entry["metrics"] for entry in document["rounds"]]
    assert bits(found) == bits(models)


DEAF = """
from flame.sdk.mode.message import MessageType
from pathlib import Path

class Deaf(Site):
    \"\"\"The word that the work is done is lost on its way to it.\"\"\"

    def _newest(self, channel):
        message = super()._newest(channel)
        if MessageType.EOT in message and not Path("lost").exists():
            Path("lost").touch()
            message = super()._newest(channel)
        return message

Site = Deaf
site = """


def trainers_completed(run):
    """How many trainers of the run's one job have completed, as its server says."""
    url = json.loads((run.data / "server.json").read_text())["url"]
    with urllib.request.urlopen(f"{url}/v1/jobs") as answer:
        job = json.load(answer)["items"][0]["id"]
    with urllib.request.urlopen(f"{url}/v1/jobs/{job}/tasks") as answer:
        tasks = json.load(answer)["items"]
    return sum(task["role"] == "trainer" and task["state"] == "completed" for task in tasks)


@pytest.mark.parametrize("groups", [1, 2])
def test_who_has_not_heard_that_the_work_is_done_does_not_wait_for_those_who_have_done_it(tmp_path, groups):
    job = parallel(tmp_path / "job") if groups == 2 else central(tmp_path / "job")
    script = job / "code" / "trainer" / "main.py"
    script.write_text(script.read_text().replace("\nsite = ", DEAF))
    described = json.loads((job / "job.json").read_text())
    described["policy"]["joinDeadline"] = 600
    (job / "job.json").write_text(json.dumps(described))
    wishes = ["aggregator@distribute@2.hold"] if groups == 2 else []
    with Run(tmp_path, job, wishes) as run:
        if groups == 2:
            # The trainer of the other group comes to its end while one aggregator has not even begun its second round.
            run.taken(wishes[0])
            run.until(lambda: trainers_completed(run) == 1)
            run.release(wishes[0])
        document, models, err = run.result()
    assert document["state"] == "completed", (document.get("failure"), err)
    assert not document.get("warnings")
    assert len(models) == groups
