"""``flame chaos``: what it does to a job, what it says of it, and how it ends."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flame.chaos.server import Server
from flame.client.local import address

sys.path.insert(0, str(Path(__file__).parents[1] / "survival"))
from survivalkit import central


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return central(tmp_path_factory.mktemp("job"), sites=2, restart={"attempts": 5, "backoff": 0.1})


def flame(folder, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
    environment |= {
        "FLAME_DATA_DIR": str(folder / "data"),
        "FLAME_CONFIG": str(folder / "none.yaml"),
        "TMPDIR": str(folder),
    }
    return subprocess.run(
        [sys.executable, "-m", "flame", *words], env=environment, capture_output=True, text=True, timeout=110
    )


def test_a_job_folder_is_disturbed_on_a_server_of_its_own_and_nothing_is_left(job, tmp_path):
    words = ["--kill", "aggregator@round=3", "--kill", "server@upload=2", "--cut", "trainer/1@train=4"]
    done = flame(tmp_path, "chaos", str(job), *words, "--compare", "--seed", "7", "-o", "json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"] == "completed"
    assert told["rounds"] == 5
    assert told["sameModel"] is True
    assert [deed["deed"] for deed in told["deeds"]] == [
        "kill aggregator@distribute=3",
        "kill server@upload=2",
        "cut trainer/1@train=4",
    ]
    assert all(deed["done"] for deed in told["deeds"]), told
    assert "killed server" in done.stderr, "it says what it does as it does it"
    assert not list(tmp_path.iterdir())


def test_a_job_that_does_not_survive_is_said_to_and_the_status_says_so_too(job, tmp_path):
    words = ["--kill", "aggregator@aggregate=2", "--set", "restart.attempts=0"]
    done = flame(tmp_path, "chaos", str(job), *words)
    assert done.returncode == 1, done.stderr
    assert "failed" in done.stdout
    assert "SIGKILL" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kill", "gardener@train"], "has no gardener"),
        (["--kill", "server@lunch"], "no phase 'lunch'"),
        (["--pause", "trainer", "soon"], "no duration"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(job, tmp_path, words, says):
    done = flame(tmp_path, "chaos", str(job), *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_of_a_running_server_is_disturbed_and_the_server_is_started_again_as_it_was(job, tmp_path):
    server = Server(
        tmp_path / "data", {"FLAME_CHAOS": str(tmp_path / "points"), "FLAME_CONFIG": str(tmp_path / "none.yaml")}
    )
    asyncio.run(server.start())
    try:
        created = flame(tmp_path, "job", "create", str(job), "-o", "json")
        assert created.returncode == 0, created.stderr
        words = ["--kill", "server@train=2", "--kill", "flamelet@aggregate=3", "-o", "json"]
        done = flame(tmp_path, "chaos", json.loads(created.stdout)["id"], *words)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert [deed["done"] for deed in told["deeds"]] == [True, True], told
        assert told["rounds"] == 5
        url, pid = address((tmp_path / "data" / "server.json").read_bytes())
        assert (url, pid != server.pid) == (server.url, True)
    finally:
        again = psutil.Process(address((tmp_path / "data" / "server.json").read_bytes())[1])
        again.terminate()
        again.wait(30)
        server.kill()  # it has been; this is what waits for it


def test_a_job_by_its_id_needs_a_server_here(tmp_path):
    done = flame(tmp_path, "chaos", "01abcdef", "--kill", "server@train")
    assert done.returncode == 2
    assert "No server runs" in done.stderr
