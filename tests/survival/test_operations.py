"""What operators and users do with jobs that run: pause and resume them, set them back, drain the server, kill it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import blocked_until

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import bits, central, finish, load_file, rounds


class Server:
    """``flame serve`` in a folder, and commands to it."""

    def __init__(self, folder, *options):
        self.folder = folder
        self.data = folder / "data"
        self.chaos = folder / "chaos"
        self.chaos.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        self.environment |= {
            "FLAME_DATA_DIR": str(self.data),
            "FLAME_CONFIG": str(folder / "config.yaml"),
            "FLAME_CHAOS": str(self.chaos),
        }
        self.options = options
        self.start()

    def start(self):
        self.process = self.popen("serve", "--port", "0", *self.options)
        blocked_until(self._listens)
        self.environment["FLAME_SERVER"] = self.told()["url"]

    def _listens(self):
        assert self.process.poll() is None
        return self.told()["pid"] == self.process.pid

    def told(self):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.data / "server.json").read_text())
        return {"pid": None}

    def popen(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "flame", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words, code=0):
        process = self.popen(*words, "-o", "json")
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, err
        return json.loads(out) if code == 0 else err

    def wish(self, name):
        (self.chaos / name).touch()

    def until(self, found):
        deadline = time.monotonic() + 60
        while not found():
            assert time.monotonic() < deadline, list(self.chaos.iterdir())
            time.sleep(0.01)

    def taken(self, name):
        self.until(lambda: [path for path in self.chaos.iterdir() if path.name.startswith(f"{name}.taken")])

    def release(self):
        for path in self.chaos.iterdir():
            path.unlink()

    def state(self, job, state):
        deadline = time.monotonic() + 60
        while (found := self.call("job", "get", job))["state"] != state and found["state"] != "failed":
            assert time.monotonic() < deadline, (found["state"], found.get("failure"), found["warnings"])
        assert found["state"] == state, (found.get("failure"), found["warnings"])
        return found

    def model(self, job):
        return {path.name: load_file(path) for path in self.data.glob(f"artifacts/{job}/*.safetensors")}

    def completes(self, job, expected):
        """Wait for a job to end as if nothing had been: with each round once, and with the undisturbed one's model."""
        assert rounds(self.state(job, "completed")) == [1, 2, 3, 4, 5]
        assert bits(self.model(job)) == expected

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.release()
    if one.process.poll() is None:
        for job in one.call("job", "list"):
            if job["state"] not in ("completed", "failed", "terminated", "ready"):
                one.call("job", "stop", job["id"], "--wait")
        one.process.send_signal(signal.SIGTERM)
        one.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return central(tmp_path_factory.mktemp("job"), sites=2, policy={"checkpoint": {"every": 1, "keep": 4}})


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    return bits(finish(tmp_path_factory.mktemp("undisturbed"), job)[1])


def test_a_job_is_paused_resumed_and_set_back_and_its_model_stays_the_same(server, job, expected):
    server.wish("aggregator@distribute@4.hold")
    mine = server.call("job", "create", str(job), "--start")["id"]
    server.taken("aggregator@distribute@4.hold")
    server.call("job", "pause", mine)
    paused = server.state(mine, "paused")
    assert rounds(paused) == [1, 2, 3]
    server.release()
    kept = server.call("job", "checkpoints", mine)
    assert {one["round"] for one in kept if one["role"] == "aggregator"} == {1, 2, 3}
    assert "rounds 1, 2, 3" in server.call("job", "restart", mine, "--from-round", "9", code=1)
    server.call("job", "restart", mine, "--from-round", "1")
    server.completes(mine, expected)
    again = server.call("job", "restart", mine, "--from-round", "3")
    assert again["id"] != mine
    assert rounds(server.state(again["id"], "completed")) == [4, 5], "it has done these alone"
    assert bits(server.model(again["id"])) == expected


def test_a_killed_server_finds_the_job_at_work_and_an_aggregator_that_died_meanwhile_is_replaced(server, job, expected):
    server.wish("aggregator@aggregate@3.hold")
    mine = server.call("job", "create", str(job), "--start")["id"]
    server.taken("aggregator@aggregate@3.hold")
    server.kill()
    for path in server.chaos.iterdir():
        os.kill(int(path.name.rpartition("-")[2]), signal.SIGKILL)
    server.start()
    server.completes(mine, expected)


@pytest.fixture
def restarting(server, job):
    """A job that was told to restart behind its first round and cannot yet, as one of its workers does not end; and who asks for that."""
    server.wish("aggregator@distribute@4.hold")
    server.wish("trainer@train@3.stop")
    mine = server.call("job", "create", str(job), "--start")["id"]
    server.taken("trainer@train@3.stop")
    asking = server.popen("job", "restart", mine, "--from-round", "1")
    server.until(lambda: server.call("job", "get", mine)["state"] == "pausing")
    yield server, mine, asking
    asking.kill()
    asking.communicate()


def test_a_job_restarts_though_who_asked_for_it_hangs_up(restarting, expected):
    server, mine, asking = restarting
    asking.kill()
    asking.communicate()
    server.release()
    server.completes(mine, expected)


def test_a_job_restarts_though_its_server_is_killed_meanwhile(restarting, expected):
    server, mine, _ = restarting
    server.kill()
    server.release()
    server.start()
    server.completes(mine, expected)


def test_a_drained_server_ends_when_the_jobs_that_run_have_ended(server, job):
    server.wish("aggregator@distribute@2.hold")
    mine = server.call("job", "create", str(job), "--start")["id"]
    server.taken("aggregator@distribute@2.hold")
    draining = server.popen("serve", "--drain")
    deadline = time.monotonic() + 60
    refused = ""
    while "about to end" not in refused:
        assert time.monotonic() < deadline
        process = server.popen("job", "create", str(job), "--start")
        refused = process.communicate(timeout=60)[1]
    assert draining.poll() is None
    server.release()
    assert draining.wait(60) == 0
    server.process.communicate(timeout=20)
    assert server.process.returncode == 0
    draining.communicate()
    server.start()
    assert server.call("job", "get", mine)["state"] == "completed"
