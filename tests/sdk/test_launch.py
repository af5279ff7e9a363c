"""How a role's script is run, and how its end reaches the user: status, sentence, log."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from waiting import blocked_until


class Launched:
    """A child as a flamelet starts it; this process is the flamelet."""

    def __init__(self, folder, source, *arguments, parent=None, environment=None):
        (folder / "main.py").write_text(source)
        self.link, theirs = socket.socketpair()
        self.link.settimeout(60)
        self.lines = self.link.makefile("rb")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLAME_", "OMP_"))}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flame.sdk.launch", "main.py", *arguments],
                cwd=folder,
                env={
                    **clean,
                    "FLAME_LINK_FD": str(theirs.fileno()),
                    "FLAME_PARENT_PID": str(parent or os.getpid()),
                    "FLAME_TASK": "t",
                    **(environment or {}),
                },
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                process_group=0,
            )

    def hear(self):
        return json.loads(self.lines.readline())

    def end(self):
        """Status, what it printed, what it complained, and what it said on the link."""
        out, err = self.process.communicate(timeout=60)
        said = [json.loads(line) for line in self.lines]
        self.lines.close()
        self.link.close()
        return self.process.returncode, out.decode(), err.decode(), said


@pytest.fixture
def launch(tmp_path):
    launched = []

    def start(source, *arguments, **more):
        launched.append(Launched(tmp_path, source, *arguments, **more))
        return launched[-1]

    yield start
    for one in launched:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        one.process.stderr.close()
        one.lines.close()
        one.link.close()


def test_a_script_runs_as_main_with_its_folder_and_arguments(launch, tmp_path):
    (tmp_path / "helper.py").write_text("VALUE = 7")
    source = """if True:
        import sys, os, pickle, helper
        class Net: pass
        print(__name__, sys.argv, helper.VALUE, Net.__module__, os.path.basename(__file__))
        assert type(pickle.loads(pickle.dumps(Net()))) is Net
        print(os.environ["OMP_NUM_THREADS"], "FLAME_LINK_FD" in os.environ, "FLAME_PARENT_PID" in os.environ)
        from flame.config import Config
        if __name__ == "__main__": print("done")
    """
    status, out, err, said = launch(source, "config.json", environment={"OMP_NUM_THREADS": "3"}).end()
    assert (status, err, said) == (0, "", [])
    assert out.splitlines() == ["__main__ ['main.py', 'config.json'] 7 __main__ main.py", "3 False False", "done"]


def test_what_is_printed_is_in_the_log_at_once(launch):
    child = launch("import sys\nprint('first')\nsys.stdin.read()\nimport time\ntime.sleep(60)")
    assert child.process.stdout.readline() == b"first\n"
    child.process.kill()


def test_flames_errors_are_said_as_their_sentence_without_a_traceback(launch):
    source = "from flame.errors import RoundFailed\nraise RoundFailed('Round 1 has 0 of at least 1 updates.')"
    status, _, err, said = launch(source).end()
    assert status == 1
    assert err == "RoundFailed: Round 1 has 0 of at least 1 updates.\n"
    assert said == [{"type": "failure", "message": "Round 1 has 0 of at least 1 updates."}]


def test_other_errors_leave_their_traceback_in_the_log_and_say_their_last_line(launch):
    source = "import json\n\ndef train():\n    json.loads('{')\n\ntrain()\n"
    status, _, err, said = launch(source).end()
    assert status == 1
    assert err.startswith("Traceback (most recent call last):\n  File ")
    assert "launch.py" not in err
    (failure,) = said
    assert failure["message"].startswith("json.decoder.JSONDecodeError: Expecting property name")
    assert failure["message"].endswith("(main.py:4, in train)")


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("import sys; sys.exit(7)", 7, None),
        ("import sys; sys.exit()", 0, None),
        ("raise SystemExit('no data here')", 1, "no data here"),
        ("raise KeyboardInterrupt", 130, None),
        ("def broken(:", 1, "SyntaxError: invalid syntax (main.py:1)"),
    ],
)
def test_exit_statuses_are_those_of_the_script(launch, source, status, message):
    got, _, _, said = launch(source).end()
    assert got == status
    assert [line["message"] for line in said] == ([message] if message else [])


def test_a_script_that_is_missing_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flame.sdk.launch", "nowhere.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "The script nowhere.py cannot be read: No such file or directory." in done.stderr


def test_reports_are_out_before_the_process_ends(launch):
    source = "from flame.sdk import link\nfor i in range(1000): link.current().metrics(i, {'a': 1.0})\n"
    child = launch(source)
    rounds = [child.hear()["round"] for _ in range(1000)]
    assert rounds == list(range(1000))
    assert child.end()[0] == 0


def test_a_worker_that_is_asked_to_end_unwinds(launch):
    source = """if True:
        import threading
        try:
            print("ready", flush=True)
            threading.Event().wait(60)
        finally:
            print("left the channels")
    """
    child = launch(source)
    assert child.process.stdout.readline() == b"ready\n"
    child.process.send_signal(signal.SIGTERM)
    status, out, _, said = child.end()
    assert (status, out, said) == (143, "left the channels\n", [])


def test_a_failed_worker_ends_although_a_thread_of_the_users_hangs(launch):
    source = """if True:
        import threading
        from flame.sdk import launch
        launch.LINGER_SECONDS = 0.2
        threading.Thread(target=threading.Event().wait).start()
        raise RuntimeError("boom")
    """
    status, _, err, said = launch(source).end()
    assert status == 1
    assert said[0]["message"].startswith("RuntimeError: boom")
    assert "Ending hard" in err


def test_a_worker_dies_with_its_flamelet(tmp_path):
    """The flamelet is a process between this one and the child; it is killed with SIGKILL."""
    (tmp_path / "main.py").write_text(
        "import os, threading\nprint(os.getpid(), flush=True)\nthreading.Event().wait(60)\n"
    )
    code = """if True:
        import os, subprocess, sys
        subprocess.Popen(
            [sys.executable, "-m", "flame.sdk.launch", "main.py"],
            env={**os.environ, "FLAME_PARENT_PID": str(os.getpid())}, process_group=0
        ).wait()
    """
    flamelet = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    child = int(flamelet.stdout.readline())
    flamelet.kill()
    flamelet.communicate()
    blocked_until(lambda: not alive(child))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_whose_flamelet_is_gone_already_does_not_begin(launch):
    status, out, _, _ = launch("print('begun')", parent=1).end()
    assert (status, out) == (1, "")
