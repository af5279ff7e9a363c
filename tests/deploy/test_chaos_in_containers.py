"""``flame chaos`` on workers that are containers of a real engine: it hits them there, and they go on as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
import engines
from chaoskit import on_private_server, on_running_server, with_this_machine

from flame.chaos.containers import InContainer
from flame.runners.docker_engine import Engine, Refused

ON_ENGINE = {"trainer": {"realm": "engine"}, "aggregator": {"realm": "engine"}}


@pytest.fixture
def computes(tmp_path):
    """A file with this machine and a Docker engine as computes. No container may be left in the end."""
    config = {"image": engines.docker_image(), "pullPolicy": "never", "labels": {"trial": tmp_path.name}}
    yield with_this_machine(tmp_path, "engine", "docker", config)
    listed = ["docker", "ps", "--all", "--quiet", "--filter", f"label=trial={tmp_path.name}"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""


@pytest.fixture
def chaos(tmp_path, computes):
    """Run the command on a private server with these computes."""

    def run(*words, placement=ON_ENGINE, **more):
        return on_private_server(tmp_path, computes, placement, *words, **more)

    return run


@pytest.mark.timeout(200)
def test_workers_in_containers_are_killed_and_stopped_and_the_model_is_the_same(chaos):
    words = ["--kill", "trainer/1@train=2", "--pause", "aggregator@aggregate=3", "3s", "--kill", "flamelet@upload=4"]
    done = chaos(*words, "--compare")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["state"], told["rounds"], told["sameModel"]) == ("completed", 4, True)
    assert [deed["done"] for deed in told["deeds"]] == [True, True, True], told
    assert all(" in container " in deed["what"] for deed in told["deeds"]), told
    assert "killed flamelet of" in told["deeds"][1]["what"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the connections of another user's process are cut by root alone")
@pytest.mark.timeout(200)
def test_the_connections_of_a_worker_in_a_container_are_cut(chaos):
    done = chaos("--cut", "aggregator@aggregate=2")
    assert done.returncode == 0, done.stderr
    (deed,) = json.loads(done.stdout)["deeds"]
    assert deed["what"].startswith("cut 2 connections of "), deed


@pytest.mark.timeout(200)
def test_a_job_on_both_sides_has_workers_of_each_hit(chaos):
    done = chaos(
        "--kill",
        "trainer@train=2",
        "--kill",
        "aggregator@aggregate=3",
        placement={**ON_ENGINE, "aggregator": {"realm": "here"}},
    )
    assert done.returncode == 0, done.stderr
    trainer, aggregator = json.loads(done.stdout)["deeds"]
    assert " in container " in trainer["what"]
    assert " in container " not in aggregator["what"]


@pytest.mark.timeout(200)
def test_a_trial_that_is_told_to_end_leaves_no_container(chaos):
    done = chaos("--kill", "trainer@train=2", rounds=1_000_000, end_after="killed ")
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("Interrupted.\n")


@pytest.mark.timeout(200)
def test_a_job_of_a_running_server_is_disturbed_in_its_containers(tmp_path, computes):
    told = on_running_server(tmp_path, computes, ON_ENGINE, "--kill", "trainer@train=2")
    assert told["state"] == "completed"
    assert " in container " in told["deeds"][0]["what"], told


class Late(Engine):
    """Each container has ended just before a command in it begins, and the engine says so in one of its ways."""

    code, reason = 0, ""

    async def call(self, method, *arguments, **named):
        if method == "exec_create":
            return {"Id": "command"}
        raise Refused(f"The Docker engine refuses: {self.reason}", self.code, self.reason)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (404, "No such exec instance: command"),
        (409, "container c is not running"),
        (500, "Container c is not running: Exited (0) Less than a second ago"),  # it has not noticed all of it yet
    ],
)
async def test_a_container_that_ends_just_before_it_is_hit_is_gone_like_any_other(code, reason):
    engine = Late()
    engine.code, engine.reason = code, reason
    await InContainer("task", 1, False, 7, engine, "c").kill()
    engine.close()


async def test_an_engine_that_refuses_for_another_reason_is_heard():
    engine = Late()
    engine.code, engine.reason = 500, "no space left on device"
    with pytest.raises(Refused, match="no space left"):
        await InContainer("task", 1, False, 7, engine, "c").kill()
    engine.close()
