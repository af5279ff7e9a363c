"""The child's end of the link, over a real socket pair; and its stand-in when a role is run by hand."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading

import pytest

from flame.errors import DeadlineExceeded, WorkerError
from flame.sdk import link as links
from flame.sdk.backends.base import Member
from flame.sdk.link import Link, SocketLink


class Flamelet:
    """The other end of the pair."""

    def __init__(self, tmp_path):
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        self.sock = mine
        self.lines = mine.makefile("rb")
        self.link = SocketLink(theirs, tmp_path / "artifacts")

    def hear(self):
        return json.loads(self.lines.readline())

    def say(self, **message):
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def close(self):
        self.link.close()
        self.lines.close()
        self.sock.close()


@pytest.fixture
def flamelet(tmp_path):
    flamelet = Flamelet(tmp_path)
    yield flamelet
    flamelet.close()


def test_reports_arrive_in_order_as_lines_of_json(flamelet):
    flamelet.link.metrics(1, {"loss": 0.5})
    flamelet.link.round(1, {"accuracy": 0.9}, 0.25)
    flamelet.link.warning("The registry is down.")
    flamelet.link.waiting("Waiting for an aggregator.")
    flamelet.link.waiting("Waiting for an aggregator.")
    flamelet.link.waiting("")
    flamelet.link.model({"name": "m", "version": "3"})
    flamelet.link.failure("It broke.")
    assert [flamelet.hear() for _ in range(7)] == [
        {"type": "metrics", "round": 1, "metrics": {"loss": 0.5}},
        {"type": "round", "round": 1, "metrics": {"accuracy": 0.9}, "seconds": 0.25},
        {"type": "warning", "message": "The registry is down."},
        {"type": "waiting", "message": "Waiting for an aggregator."},
        {"type": "waiting", "message": ""},
        {"type": "model", "name": "m", "version": "3"},
        {"type": "failure", "message": "It broke."},
    ]


def test_a_paused_flamelet_does_not_hold_up_the_role(flamelet):
    # Far more than a socket's buffers take: nobody reads, and yet every call returns.
    padding = "x" * 1000
    for number in range(5000):
        flamelet.link.metrics(number, {padding: 1.0})
    assert not flamelet.link.flush(0.05)
    rounds = [flamelet.hear()["round"] for _ in range(5000)]
    assert rounds == list(range(5000))
    assert flamelet.link.flush(10)


def test_flush_means_that_all_is_written(flamelet):
    for number in range(100):
        flamelet.link.metrics(number, {"a": 1})
    assert flamelet.link.flush(10)
    flamelet.sock.setblocking(False)
    data = flamelet.sock.recv(1 << 20)
    assert data.count(b"\n") == 100


def test_peers_are_told_to_the_channel_that_joined(flamelet):
    told, news = [], threading.Event()

    def change(joined, left):
        told.append((joined, left))
        news.set()

    me = Member(end="t1", role="trainer", dials=True)
    flamelet.link.rendezvous.join("param", "default", me, change)
    assert flamelet.hear() == {
        "type": "join",
        "channel": "param",
        "group": "default",
        "member": {"end": "t1", "role": "trainer", "attempt": 1, "dials": True, "addresses": [], "order": ""},
    }
    other = {"end": "a1", "role": "aggregator", "attempt": 2, "dials": False, "addresses": ["tcp://h:1"], "new": 1}
    flamelet.say(type="peers", channel="another", group="default", joined=[other], left=[])
    flamelet.sock.sendall(b"garbage\n")
    flamelet.say(type="peers", channel="param", group="default", joined=[other], left=["a0"])
    assert news.wait(10)
    assert told == [([Member(end="a1", role="aggregator", attempt=2, addresses=["tcp://h:1"])], ["a0"])]
    flamelet.link.rendezvous.close()
    assert flamelet.hear() == {"type": "leave", "channel": "param", "group": "default"}
    flamelet.link.rendezvous.leave("param", "default")
    flamelet.link.warning("x")
    assert flamelet.hear()["type"] == "warning"


def test_an_artifact_is_in_the_servers_hands_when_the_call_returns(flamelet, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"1")

    def answer(**more):
        message = flamelet.hear()
        assert message == {"type": "artifact", "name": "model.safetensors", "path": str(path)}
        flamelet.say(type="artifact", name="model.safetensors", **more)

    for more in ({"path": "/data/m"}, {"path": "", "error": "the disk is full"}):
        thread = threading.Thread(target=answer, kwargs=more)
        thread.start()
        if more.get("error"):
            with pytest.raises(WorkerError, match="not taken: the disk is full"):
                flamelet.link.artifact("model.safetensors", path, 10)
        else:
            assert flamelet.link.artifact("model.safetensors", path, 10) == "/data/m"
        thread.join()
    with pytest.raises(DeadlineExceeded, match=r"not taken within 0.05 s"):
        flamelet.link.artifact("model.safetensors", path, 0.05)


def test_a_flamelet_that_is_gone_is_noticed_by_who_waits(flamelet, tmp_path):
    threading.Timer(0.05, flamelet.sock.shutdown, [socket.SHUT_RDWR]).start()
    with pytest.raises(WorkerError, match="the flamelet is gone"):
        flamelet.link.artifact("a", tmp_path, 10)
    flamelet.link.warning("nobody hears this")
    assert flamelet.link.flush(10)


def test_by_hand_reports_go_to_the_log_and_artifacts_to_a_folder(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLAME_ARTIFACTS", raising=False)
    link = Link()
    with caplog.at_level(logging.INFO):
        link.round(2, {"accuracy": 0.95}, 0.5)
        link.metrics(2, {"loss": 0.25})
        link.waiting("Waiting for an aggregator.")
        link.waiting("Waiting for an aggregator.")
    assert caplog.messages == [
        "round 2 finished in 0.500 s: accuracy 0.95",
        "round 2: loss 0.25",
        "Waiting for an aggregator.",
    ]
    source = tmp_path / "made"
    source.write_bytes(b"1")
    kept = link.artifact("model.safetensors", source)
    assert kept == str(tmp_path / "artifacts" / "model.safetensors")
    assert link.artifact("model.safetensors", kept) == kept
    with pytest.raises(WorkerError, match=r"The artifact x could not be kept"):
        link.artifact("x", tmp_path / "nowhere")


def test_the_processs_link_comes_from_the_environment_and_is_not_inherited():
    code = """if True:
        import os, subprocess, sys
        from flame.sdk import link
        link.current().warning("hello")
        assert link.current() is link.current()
        assert "FLAME_LINK_FD" not in os.environ
        fd = int(sys.argv[1])
        gone = subprocess.run([sys.executable, "-c", f"import os; os.fstat({fd})"], close_fds=False, capture_output=True)
        assert b"Bad file descriptor" in gone.stderr
        link.current().close()
    """
    mine, theirs = socket.socketpair()
    fd = theirs.fileno()
    with mine, theirs:
        environment = {**os.environ, "FLAME_LINK_FD": str(fd)}
        run = subprocess.run(
            [sys.executable, "-c", code, str(fd)], pass_fds=[fd], env=environment, timeout=60, capture_output=True
        )
        assert run.returncode == 0, run.stderr
        theirs.close()
        mine.settimeout(10)
        assert json.loads(mine.makefile("rb").read()) == {"type": "warning", "message": "hello"}


def test_without_an_environment_the_link_is_the_one_by_hand(monkeypatch):
    monkeypatch.delenv("FLAME_LINK_FD", raising=False)
    links.install(None)
    assert type(links.current()) is Link
    links.install(None)


def test_who_is_left_alone_is_told_before_anybody_can_act_on_it(flamelet):
    seen = []
    flamelet.link.on_lost = lambda: seen.append(flamelet.link._gone)

    def hand_in():
        with pytest.raises(WorkerError, match="gone"):
            flamelet.link.checkpoint(1, flamelet.link.folder / "c")

    waiting = threading.Thread(target=hand_in)
    waiting.start()
    flamelet.hear()
    flamelet.lines.close()
    flamelet.sock.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert seen == [None], "once, and first"


def test_who_closes_the_link_is_not_alone(flamelet):
    seen = []
    flamelet.link.on_lost = lambda: seen.append(True)
    flamelet.link.close()
    assert flamelet.lines.read() == b""
    assert not seen


def test_a_role_ends_at_once_when_its_flamelet_is_gone(tmp_path):
    script = tmp_path / "main.py"
    script.write_text("import threading\nprint('up', flush=True)\nthreading.Event().wait()\n")
    mine, theirs = socket.socketpair()
    with mine, theirs:
        environment = {**os.environ, "FLAME_LINK_FD": str(theirs.fileno()), "FLAME_ARTIFACTS": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "flame.sdk.launch", str(script)],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        with process:
            assert process.stdout.readline() == b"up\n"
            theirs.close()
            mine.close()
            assert process.wait(20) == 1
