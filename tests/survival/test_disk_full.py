"""A server whose disk is full says so, keeps its state whole, and goes on when there is room again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import central, rounds
from test_operations import Server


@pytest.fixture
def small(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small file system takes root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_job_goes_through_when_the_disk_was_full_for_a_while(small, tmp_path):
    job = central(tmp_path / "job", sites=2)
    server = Server(small)
    try:
        server.wish("aggregator@distribute@3.hold")
        mine = server.call("job", "create", str(job), "--start")["id"]
        server.taken("aggregator@distribute@3.hold")
        filler = small / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError as error:
                assert error.errno == 28  # noqa: PT017 - what else it may be matters
        for path in server.chaos.iterdir():
            path.unlink()
        refused = server.call("job", "create", str(job), code=1)
        assert "full" in refused or "space" in refused, "it says why"
        assert server.process.poll() is None, "it lives"
        filler.unlink()
        done = server.state(mine, "completed")
        assert rounds(done) == [1, 2, 3, 4, 5]
        again = server.call("job", "create", str(job), "--start")["id"]
        assert rounds(server.state(again, "completed")) == [1, 2, 3, 4, 5]
        server.kill()
        server.start()
        assert [one["state"] for one in server.call("job", "list")] == ["completed", "completed"], "nothing is torn"
    finally:
        server.process.terminate()
        server.process.communicate(timeout=30)
