"""``flame chaos`` on workers that are pods of a real cluster: they come to its moments, it hits them there, and they go on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
from chaoskit import on_private_server, on_running_server, with_this_machine
from engines import kubectl
from jobkit import SHARE
from waiting import blocked_until

IN_PODS = {"trainer": {"realm": "cluster"}, "aggregator": {"realm": "cluster"}}
Chaos = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def computes(tmp_path: Path, namespace: str, kubeconfig: str, image: str) -> Iterator[Path]:
    """A file with this machine and the cluster as computes. No pod may be left in the end."""
    config = {"kubeconfig": kubeconfig, "namespace": namespace, "image": image, "resources": SHARE}
    yield with_this_machine(tmp_path, "cluster", "kubernetes", config)
    blocked_until(lambda: kubectl("get", "pods", "-n", namespace, "-o", "name") == "")


@pytest.fixture
def chaos(tmp_path: Path, computes: Path) -> Chaos:
    """Run the command on a private server with these computes."""

    def run(*words: str, placement: Any = IN_PODS, **more: Any) -> Any:
        return on_private_server(tmp_path, computes, placement, *words, **more)

    return run


def test_workers_in_pods_are_killed_and_stopped_and_the_model_is_the_same(chaos: Chaos) -> None:
    words = ["--kill", "trainer/1@train=2", "--pause", "aggregator@aggregate=3", "3s", "--kill", "flamelet@upload=4"]
    done = chaos(*words, "--compare")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["rounds"], told["sameModel"]) == ("completed", 4, True)
    assert [deed["done"] for deed in told["deeds"]] == [True, True, True], told
    assert all(" in pod flame-" in deed["what"] for deed in told["deeds"]), told
    assert "killed flamelet of" in told["deeds"][1]["what"]


def test_a_job_on_both_sides_has_workers_of_each_hit(chaos: Chaos) -> None:
    placement = {**IN_PODS, "aggregator": {"realm": "here"}}
    done = chaos("--kill", "trainer@start", "--kill", "aggregator@aggregate=3", placement=placement)
    assert done.returncode == 0, done.stderr
    trainer, aggregator = json.loads(done.stdout)["deeds"]
    assert " in pod " in trainer["what"]
    assert " in pod " not in aggregator["what"]


def test_connections_in_pods_are_not_cut_and_the_trial_says_so(chaos: Chaos) -> None:
    done = chaos("--cut", "aggregator@aggregate=2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("in a pod cannot be cut. Kill or pause it instead.\n")


def test_who_may_not_run_commands_in_pods_is_told_what_is_missing(
    chaos: Chaos, computes: Path, namespace: str, kubeconfig: str, tmp_path: Path
) -> None:
    may = ["--verb=get,list,watch,create,delete", "--resource=pods,secrets,pods/log"]
    kubectl("create", "serviceaccount", "modest", "-n", namespace)
    kubectl("create", "role", "modest", "-n", namespace, *may)
    kubectl("create", "rolebinding", "modest", "-n", namespace, "--role=modest", f"--serviceaccount={namespace}:modest")
    theirs = yaml.safe_load(Path(kubeconfig).read_text())
    theirs["users"] = [{"name": "modest", "user": {"token": kubectl("create", "token", "modest", "-n", namespace)}}]
    theirs["contexts"][0]["context"]["user"] = "modest"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(theirs))
    here, cluster = yaml.safe_load(computes.read_text())
    cluster["config"]["kubeconfig"] = str(tmp_path / "kubeconfig")
    computes.write_text(yaml.safe_dump([here, cluster]))
    done = chaos("--kill", "trainer@train=2")
    assert done.returncode == 2, done.stderr
    missing = f"The credentials lack the right to create pods/exec in the namespace {namespace}."
    assert done.stderr.endswith(f"cannot be held at a moment: {missing}\n")


def test_a_trial_that_is_told_to_end_leaves_no_pod(chaos: Chaos) -> None:
    done = chaos("--kill", "trainer@train=2", rounds=1_000_000, end_after="killed ")
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("Interrupted.\n")


def test_a_job_of_a_running_server_is_disturbed_in_its_pods(tmp_path: Path, computes: Path) -> None:
    told = on_running_server(tmp_path, computes, IN_PODS, "--kill", "trainer@train=2")
    assert told["state"] == "completed"
    assert " in pod " in told["deeds"][0]["what"], told
