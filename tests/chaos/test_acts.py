"""What is done to a process is done to it, and to nothing beside."""

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from flame.chaos import acts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="connections are cut on Linux only")

CHILD = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
one, two = socket.socketpair()
wake = socket.create_server(("127.0.0.1", 0))
mine = socket.create_connection(wake.getsockname())
other, _ = wake.accept()
far = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print(listener.getsockname()[1], flush=True)
assert far.recv(1) == b"", "cut"
mine.sendall(b"x"); assert other.recv(1) == b"x", "what a process tells itself goes on"
one.sendall(b"x"); assert two.recv(1) == b"x", "so does a pair"
listener.accept()
print("whole", flush=True)
"""


@pytest.fixture
def child():
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(server.getsockname()[1])], stdout=subprocess.PIPE, text=True
        )
        connection, _ = server.accept()
        with connection, process:
            yield process, connection, int(process.stdout.readline())
            process.kill()


def test_connections_are_cut_on_both_sides_and_listening_goes_on(child):
    process, connection, port = child
    assert acts.cut(process.pid) == 1
    assert connection.recv(1) == b""
    with socket.create_connection(("127.0.0.1", port)):
        assert process.stdout.readline() == "whole\n"


def test_a_frozen_process_is_there_and_goes_on_when_it_is_thawed(child):
    process, _, _ = child
    acts.freeze(process.pid)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    acts.thaw(process.pid)
    os.waitid(os.P_PID, process.pid, os.WCONTINUED)
    acts.kill(process.pid)
    assert process.wait(10) == -signal.SIGKILL


def test_one_that_is_gone_already_is_no_fault():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for act in (acts.kill, acts.freeze, acts.thaw, acts.cut):
        act(process.pid)
