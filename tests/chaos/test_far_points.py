"""The folder of a place that sees no files of a trial: what is put there and taken there, and that nothing is left."""

import inspect
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from waiting import blocked_until

from flame.chaos import far_points
from flame.sdk.chaospoints import Points


@pytest.fixture
def far(tmp_path):
    command = [sys.executable, "-I", "-c", inspect.getsource(far_points), str(tmp_path / "points")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def say(process, *lines):
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()


def test_a_wish_is_put_and_taken_and_its_taker_let_go(far, tmp_path):
    folder = tmp_path / "points"
    say(far, "put trainer@train@2.hold", "put trainer@upload@*.hold")
    blocked_until(lambda: folder.is_dir() and len(list(folder.iterdir())) == 2)
    worker = threading.Thread(target=Points(folder, {"trainer"}, "t1.1").reach, args=("train", 2))
    worker.start()
    taken = far.stdout.readline().strip()
    assert taken.startswith("trainer@train@2.hold.taken-t1.1-")
    assert worker.is_alive()
    say(far, f"remove {taken}", "remove trainer@upload@*.hold", "remove what@never@was.hold")
    worker.join(20)
    assert not worker.is_alive()
    blocked_until(lambda: not list(folder.iterdir()))


def test_whoever_is_held_goes_on_when_the_pipe_ends(far, tmp_path):
    folder = tmp_path / "points"
    say(far, "put *@train@*.hold")
    blocked_until(lambda: folder.is_dir() and list(folder.iterdir()))
    worker = threading.Thread(target=Points(folder, {"trainer"}, "t1.1").reach, args=("train", 1))
    worker.start()
    assert ".taken-t1.1-" in far.stdout.readline()
    far.stdin.close()
    worker.join(20)
    assert not worker.is_alive()
    assert far.wait(20) == 0
    assert not list(folder.iterdir())
