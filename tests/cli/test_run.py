"""`flame run`: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest

from flame.spec.records import Job, Model, Round

WAITS = "import signal; print('up', flush=True); signal.pause()"


def read_until(words: str, said: IO[str]) -> None:
    """Read what a process prints until these words are in a line."""
    while words not in (line := said.readline()):
        assert line, "it ended without saying so"


def running(flame: Any, main: str = WAITS) -> subprocess.Popen[str]:
    """The command with a job that runs; its workers all do the same."""
    process: subprocess.Popen[str] = flame.begin("run", flame.job(trainer=main, aggregator=main))
    read_until("job running", process.stdout)
    return process


def test_a_job_is_told_line_by_line_and_ends_with_its_rounds_and_its_model(flame: Any) -> None:
    out = flame("run", flame.job())
    assert re.search(r"^round 2/3  loss 0\.5000  Accuracy 0\.9000  10 ms$", out, re.MULTILINE)
    assert re.search(r"^trainer/\d running$", out, re.MULTILINE)
    table = out[out.index("ROUND") :].splitlines()[:4]
    assert table == [
        "ROUND    loss  Accuracy  SECONDS",
        "    1       1    0.9000    0.010",
        "    2  0.5000    0.9000    0.010",
        "    3  0.3333    0.9000    0.010",
    ]
    assert "/kept/model.safetensors" in out
    assert "safetensors.numpy.load_file" in out
    assert "\x1b" not in out


def test_the_document_is_one_and_nothing_else_is_printed(flame: Any) -> None:
    document = flame.json("run", flame.job())
    assert list(document) == ["job", "state", "rounds", "model"]
    assert document["state"] == "completed"
    assert document["rounds"][1] == {"round": 2, "metrics": {"loss": 0.5, "Accuracy": 0.9}, "seconds": 0.01}
    assert document["model"]["path"] == "/kept/model.safetensors"
    assert flame.err == ""


def test_a_failure_is_told_with_its_cause_and_fails_the_command(flame: Any) -> None:
    fails = "print('about to fail')\nimport sys; sys.exit(7)"
    out = flame("run", flame.job(trainer=fails, aggregator=WAITS), status=1)
    assert re.search(r"^state +failed$", out, re.MULTILINE)
    assert re.search(r"^cause .*exit code 7", out, re.MULTILINE)
    assert re.search(r"^task +trainer \(task [0-9a-f]{40}, attempt 1\)$", out, re.MULTILINE)
    assert re.search(r"^its log +about to fail$", out, re.MULTILINE)
    document = flame.json("run", flame.job(trainer=fails, aggregator=WAITS), status=1)
    assert document["state"] == "failed"
    assert document["failure"]["exitCode"] == 7
    assert document["failure"]["role"] == "trainer"
    assert document["failure"]["log"] == ["about to fail"]


def test_fields_are_set_from_the_command_line(flame: Any) -> None:
    prints = "import json; print(json.load(open('config.json'))['hyperparameters'])"
    flame("run", flame.job(trainer=prints), "--set", "hyperparameters.rounds=5", "--set", "hyperparameters.lr=0.1")
    logs = [path.read_text() for path in (flame.data_dir / "logs").rglob("*.log")]
    assert sum("{'rounds': 5, 'lr': 0.1}" in log for log in logs) == 2


def test_nothing_is_left_of_a_private_server_but_its_data(flame: Any) -> None:
    flame("run", flame.job())
    flame.until(lambda: not (flame.data_dir / "server.json").exists())
    flame.until(lambda: not flame.workers())
    assert (flame.data_dir / "flame.db").exists()


def test_ctrl_c_stops_the_job_and_all_its_workers(flame: Any) -> None:
    process = running(flame)
    assert len(flame.workers()) >= 3
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "Stopping the job" in err
    assert re.search(r"^state +terminated$", out, re.MULTILINE)
    assert "Traceback" not in err
    flame.until(lambda: not flame.workers())


def test_a_second_ctrl_c_leaves_at_once_and_the_job_still_ends(flame: Any) -> None:
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
    process = running(flame, stubborn)
    process.send_signal(signal.SIGINT)
    read_until("Stopping", process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=4)  # the workers' grace is longer
    assert process.returncode == 130
    flame.until(lambda: not flame.workers())


def test_a_killed_command_takes_its_private_server_and_its_job_along(flame: Any) -> None:
    process = running(flame)
    process.kill()
    process.communicate()
    flame.until(lambda: not flame.workers())
    flame.until(lambda: not (flame.data_dir / "server.json").exists())


def bound(one: socket.socket, port: int | None) -> bool:
    """Whether it has got the port, which its owner before may not have let go of yet."""
    with contextlib.suppress(OSError):
        one.bind(("127.0.0.1", port))
        return True
    return False


def private_server(flame: Any) -> int:
    return int(json.loads((flame.data_dir / "server.json").read_text())["pid"])


def test_a_private_server_that_is_killed_is_started_again_and_its_job_goes_on(flame: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    waits = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    process = running(flame, waits)
    for _ in range(2):
        killed = private_server(flame)
        os.kill(killed, signal.SIGKILL)
        flame.until(lambda killed=killed: private_server(flame) != killed)
    gate.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    flame.until(lambda: not (flame.data_dir / "server.json").exists())


def test_a_private_server_that_cannot_be_started_again_is_said_at_once(flame: Any) -> None:
    process = running(flame)
    server = json.loads((flame.data_dir / "server.json").read_text())
    process.send_signal(signal.SIGSTOP)
    os.kill(server["pid"], signal.SIGKILL)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        flame.until(lambda: bound(taken, urlsplit(server["url"]).port))
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # nobody else may have it, and nobody is answered
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "The private server ended in the middle of the job" in err


def test_a_private_server_that_is_told_to_end_takes_its_job_along(flame: Any) -> None:
    process = running(flame)
    os.kill(private_server(flame), signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "job terminated" in out


def test_a_server_that_runs_in_the_data_directory_is_used(flame: Any, server: Any) -> None:
    document = flame.json("run", flame.job())
    assert flame.json("job", "get", document["job"])["state"] == "completed"
    assert not (flame.data_dir / "server.log").exists()
    assert server.process.poll() is None


@pytest.mark.parametrize("how", ["table", "json"])
def test_what_is_refused_is_a_sentence_on_stderr_and_nothing_on_stdout(flame: Any, how: str) -> None:
    assert "no such job folder" in flame.refused("run", "/none", "-o", how, status=2)
    schema = {"name": "s", "roles": [{"name": "trainer"}], "channels": []}
    assert flame.refused("run", flame.job(schema=schema), "-o", how).startswith("Error: job.json: schema")


def test_a_job_that_is_refused_leaves_no_private_server(flame: Any) -> None:
    flame.refused("run", flame.job(unknown=1))
    flame.until(lambda: not (flame.data_dir / "server.json").exists())


def test_a_server_that_is_not_there_is_named(flame: Any, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    assert f"No server answers at {url} (connection refused)" in flame.refused("run", flame.job(), "--server", url)


def test_on_a_terminal_the_view_is_live_and_the_result_stays(flame: Any) -> None:
    master, slave = pty.openpty()
    flame.environment["TERM"] = "xterm"
    process = flame.begin("run", flame.job(), stdout=slave, stderr=slave)
    os.close(slave)
    out = b""
    try:
        while piece := os.read(master, 65536):
            out += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(20) == 0
    text = out.decode()
    assert "workers" in text
    assert "/3" in text
    assert "ROUND" in text
    assert "completed" in text
    assert "\x1b[?25h" in text  # the cursor is there again


def test_many_rounds_are_shortened_in_the_middle_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from flame.cli import result

    result.rounds([Round(round=i, metrics={"loss": 0.5}, seconds=0.1) for i in range(1, 101)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 41 + 1
    assert out[20].split()[0] == "20"
    assert out[21].split() == ["...", "...", "..."]
    assert out[22].split()[0] == "81"
    assert "60 rounds in the middle are left out" in out[-1]


def test_metrics_that_some_rounds_lack_leave_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    from flame.cli import result

    result.rounds([Round(round=1, metrics={"a": 1.0}), Round(round=2, metrics={"b": 2e-7})])
    assert capsys.readouterr().out.splitlines() == [
        "ROUND  a          b  SECONDS",
        "    1  1               0.000",
        "    2     2.000e-07    0.000",
    ]


def test_how_to_load_a_model_fits_where_it_is() -> None:
    from flame.cli import result

    kept = Model(name="m", registry="mlflow", version="3", uri="models:/m/3")
    assert "models:/m/3" in result.how_to_load(kept)
    assert "MLFLOW_TRACKING_URI=sqlite:///x.db" in result.how_to_load(kept, "sqlite:///x.db")
    assert result.how_to_load(Model(name="m", path="/x/weights.bin")) == ""


def test_the_document_of_a_job_without_a_model_says_null(tmp_path: Path) -> None:
    from flame.cli import result
    from flame.spec.nouns import JobForm
    from flame.spec.records import JobState

    job = Job(id="j", name="n", state=JobState.COMPLETED, form=JobForm(name="n"))
    assert json.loads(json.dumps(result.document(job))) == {
        "job": "j",
        "state": "completed",
        "rounds": [],
        "model": None,
    }
