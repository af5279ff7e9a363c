"""A clock that is set forwards or back in the middle of a job, at the server, at its workers, or at both, costs no worker and no round."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from survivalkit import bits, central, finish, rounds
from test_operations import Server

HOUR = 3600
LEASE = 2.0


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    """What gives a process another time of day."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("giving a process another time of day takes Linux and a C compiler")
    built = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).parent / "clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(source), "-ldl"], check=True)
    return built


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    settings = {"maxRunTime": 600, "restart": {"attempts": 3, "backoff": 0.1}}
    return central(tmp_path_factory.mktemp("job"), sites=2, **settings)


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    return bits(finish(tmp_path_factory.mktemp("undisturbed"), job)[1])


class Clocks:
    """A server, and the clocks of it and of its workers."""

    def __init__(self, folder, preload):
        self.folder = folder / "clocks"
        self.folder.mkdir()
        self.set(0)
        os.environ["LD_PRELOAD"], os.environ["CLOCK_FOLDER"] = str(preload), str(self.folder)
        try:
            self.server = Server(folder, "--lease", f"{LEASE:g}", "--p2p-tls")
        finally:
            del os.environ["LD_PRELOAD"], os.environ["CLOCK_FOLDER"]

    def set(self, seconds, whose=("server", "worker")):
        for each in whose:
            part = self.folder / f".{each}"
            part.write_text(str(seconds))
            part.rename(self.folder / each)

    def let_leases_run_out(self):
        """Longer than a lease: who is not taken for alive by now is replaced."""
        begun = time.monotonic()
        self.server.until(lambda: time.monotonic() > begun + 2 * LEASE)

    def begin(self, job, wishes):
        for wish in wishes:
            self.server.wish(wish)
        return self.server.call("job", "create", str(job), "--start")["id"]

    def go_on(self, wish):
        for path in self.server.chaos.glob(f"{wish}.taken-*"):
            path.unlink()


@pytest.fixture
def clocks(tmp_path, preload):
    one = Clocks(tmp_path, preload)
    yield one
    one.server.release()
    one.server.process.terminate()
    one.server.process.communicate(timeout=30)


@pytest.mark.parametrize("whose", [("server", "worker"), ("server",), ("worker",)], ids="+".join)
@pytest.mark.parametrize("step", [HOUR, -2 * HOUR])
def test_nobody_is_lost_when_the_clock_is_set(clocks, job, expected, step, whose):
    first, second = "aggregator@distribute@2.hold", "aggregator@distribute@4.hold"
    mine = clocks.begin(job, [first, second])
    clocks.server.taken(first)
    clocks.set(step, whose)
    clocks.let_leases_run_out()
    clocks.go_on(first)
    clocks.server.taken(second)
    clocks.set(0, whose)
    clocks.let_leases_run_out()
    clocks.go_on(second)
    done = clocks.server.state(mine, "completed")
    assert rounds(done) == [1, 2, 3, 4, 5]
    assert [task["attempt"] for task in clocks.server.call("task", "list", mine)] == [1, 1, 1]
    assert bits(clocks.server.model(mine)) == expected


@pytest.mark.parametrize("step", [HOUR, -2 * HOUR])
def test_a_server_and_an_aggregator_that_are_killed_when_the_clock_was_set_are_replaced(clocks, job, expected, step):
    held = "aggregator@aggregate@3.hold"
    mine = clocks.begin(job, [held, "trainer@train@4.kill"])
    clocks.server.taken(held)
    clocks.server.kill()
    clocks.set(step)
    clocks.server.start()
    clocks.let_leases_run_out()
    assert clocks.server.call("job", "get", mine)["state"] == "running", "its time is not up"
    clocks.go_on(held)
    done = clocks.server.state(mine, "completed")
    assert rounds(done) == [1, 2, 3, 4, 5]
    assert sorted(task["attempt"] for task in clocks.server.call("task", "list", mine)) == [1, 1, 2]
    assert bits(clocks.server.model(mine)) == expected
