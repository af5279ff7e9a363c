"""``flame chaos`` on workers that are pods of a real cluster: they come to its moments, it hits them there, and they go on as if nothing had been."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "survival"))
from engines import kubectl
from jobkit import SHARE, our_address
from survivalkit import central
from waiting import blocked_until

from flame.chaos.server import Server

IN_PODS = {"trainer": {"realm": "cluster"}, "aggregator": {"realm": "cluster"}}
RESTART = {"attempts": 5, "backoff": 0.1}
Chaos = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def computes(tmp_path: Path, namespace: str, kubeconfig: str, image: str) -> Iterator[Path]:
    """A file with this machine and the cluster as computes. No pod may be left in the end."""
    config = {"kubeconfig": kubeconfig, "namespace": namespace, "image": image, "resources": SHARE}
    path = tmp_path / "computes.yaml"
    here = {"name": "here", "kind": "local"}
    path.write_text(yaml.safe_dump([here, {"name": "cluster", "kind": "kubernetes", "config": config}]))
    yield path
    blocked_until(lambda: kubectl("get", "pods", "-n", namespace, "-o", "name") == "")


@pytest.fixture
def chaos(tmp_path: Path, computes: Path) -> Chaos:
    """Run the command on a job of two sites, with the cluster as a compute of its private server."""

    def run(*words: str, placement: Any = IN_PODS, rounds: int = 4, end_after: str | None = None) -> Any:
        job = central(tmp_path / "job", sites=2, placement=placement, restart=RESTART, rounds=rounds)
        (tmp_path / "temporary").mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "flame", "chaos", str(job), "--computes", str(computes), *words, "-o", "json"],
            env={**environment, "FLAME_CONFIG": str(tmp_path / "none"), "TMPDIR": str(tmp_path / "temporary")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = ""
        if end_after is not None:
            while end_after not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.terminate()
        out, err = process.communicate(timeout=170)
        assert not list((tmp_path / "temporary").iterdir())
        return subprocess.CompletedProcess(process.args, process.returncode, out, said + err)

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
    settings = {"FLAME_CONFIG": str(tmp_path / "none"), "FLAME_TOKEN": "of-the-test"}
    points = {"FLAME_CHAOS": str(tmp_path / "points")}
    options = ["--computes", str(computes), "--host", our_address(), "--insecure-plain-http"]
    server = Server(tmp_path / "data", {**settings, **points}, options)
    asyncio.run(server.start())

    def flame(*words: str) -> Any:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        environment |= {**settings, "FLAME_DATA_DIR": str(tmp_path / "data"), "FLAME_SERVER": server.url}
        command = [sys.executable, "-m", "flame", *words, "-o", "json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        job = central(tmp_path / "job", sites=2, placement=IN_PODS, restart=RESTART)
        created = flame("job", "create", str(job))
        told = flame("chaos", created["id"], "--kill", "trainer@train=2")
    finally:
        asyncio.run(server.end())
    assert told["state"] == "completed"
    assert " in pod " in told["deeds"][0]["what"], told
    assert list((tmp_path / "points").iterdir()) == []
