"""What a case leaves behind is found, whatever it is, and never taken for another lane's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from leftovers import Leftovers, own_mounts

from flame.sdk.backends.shm import available

JOB = "01a22852e3e701c8b46de9bc"
TASK = "f86edd283289fc71a90860f2b61cfe47c72e79a2"


@pytest.fixture
def lane(tmp_path):
    return make(tmp_path / "lane")


def make(home):
    (home / "data").mkdir(parents=True)
    return Leftovers(home, home / "data", home / "chaos")


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


class Worker:
    """A process of a lane that runs some code and then waits."""

    def __init__(self, lane, code, **environment):
        self.process = subprocess.Popen(
            [*lane.through, sys.executable, "-c", f"{code}\nprint(flush=True)\ninput()"],
            env={**os.environ, **lane.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process.stdout.readline()

    def __enter__(self):
        return self.process.pid

    def __exit__(self, *_):
        self.process.communicate("\n")
        assert self.process.returncode == 0


def test_files_of_the_kinds_that_an_undisturbed_job_leaves_are_none_left_behind(lane, tmp_path):
    data = tmp_path / "lane" / "data"
    write(data / "checkpoints" / JOB / TASK / "0000000004")
    lane.learn()
    write(data / "checkpoints" / JOB[::-1] / TASK[::-1] / "0000000005")
    write(data / "logs" / JOB / f"{TASK}.2.log")
    assert lane.of(JOB) == []


@pytest.mark.parametrize(
    "name",
    [
        f"checkpoints/{JOB}/{TASK}/.partial-0000000005.77",
        "bundles/partial/tmpq1x",
        "server.json.77",
        "flame.db-journal",
    ],
)
def test_a_file_that_an_undisturbed_job_does_not_leave_is_one(lane, tmp_path, name):
    write(tmp_path / "lane" / "data" / "server.json")
    lane.learn()
    write(tmp_path / "lane" / "data" / name)
    (said,) = lane.of(JOB)
    assert name in said


def test_a_working_directory_is_left_behind(lane, tmp_path):
    lane.learn()
    (tmp_path / "lane" / "data" / "workers" / f"{TASK}.1").mkdir(parents=True)
    assert [said.split()[:2] for said in lane.of(JOB)] == [["working", "directory"]]


def test_a_process_is_found_by_its_job_and_a_temporary_file_by_its_lane(lane, tmp_path):
    other = make(tmp_path / "other")
    with Worker(
        lane, "import tempfile; tempfile.mkstemp(prefix='mine-')", FLAME_WORKER=f"server/{JOB}/{TASK}/1"
    ) as pid:
        process, file = lane.of(JOB)
        assert process.startswith(f"process {pid} ")
        assert "/mine-" in file
        assert [said.split()[0] for said in lane.of("another")] == ["temporary"]
        assert other.of("another") == []
    assert lane.of(JOB) == [file]


@pytest.mark.skipif(own_mounts() is None, reason="this system lets nobody have mounts of their own")
def test_a_named_segment_of_shared_memory_is_found_by_its_lane(lane, tmp_path):
    other = make(tmp_path / "other")
    before = os.listdir("/dev/shm")
    with Worker(lane, "open('/dev/shm/flame-segment', 'w')"):
        assert lane.of(JOB) == ["shared memory flame-segment"]
    assert lane.of(JOB) == ["shared memory flame-segment"], "it outlives who has made it"
    assert other.of(JOB) == []
    assert os.listdir("/dev/shm") == before


@pytest.mark.skipif(not available(), reason="this system has no sealed memory files")
@pytest.mark.parametrize(
    "code", ["kept = Segment(1, 4096)", "kept = Segment(1, 4096)\nmemory = kept.map()\nimport os; os.close(kept.fd)"]
)
def test_a_segment_without_a_name_is_found_while_somebody_of_the_lane_holds_it(lane, tmp_path, code):
    other = make(tmp_path / "other")
    with Worker(lane, f"from flame.sdk.backends.shm import Segment\n{code}") as pid:
        (said,) = lane.of(JOB)
        assert said.startswith(f"shared memory held by {pid} ")
        assert other.of(JOB) == []
    assert lane.of(JOB) == []
