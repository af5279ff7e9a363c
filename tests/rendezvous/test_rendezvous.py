"""Workers that are run by hand meet at an address, whoever of them hosts it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import BackendError, SpecError
from flame.sdk.backends import rendezvous, rendezvous_server
from flame.sdk.backends.base import Member
from flame.sdk.backends.hostport import split_hostport
from flame.sdk.backends.rendezvous import TcpRendezvous

KEY = b"k" * 32


class View:
    """What one worker has been told, in a form that a test can wait on."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.left: list[str] = []
        self.calls = 0
        self._changed = threading.Condition()

    def __call__(self, joined: list[Member], left: list[str]) -> None:
        with self._changed:
            self.calls += 1
            self.members.update({member.end: member for member in joined})
            for end in left:
                self.members.pop(end, None)
            self.left += left
            self._changed.notify_all()

    def wait(self, condition: Callable[[View], bool], seconds: float = 20) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), seconds), (self.members, self.left)

    def sees(self, *ends: str) -> None:
        self.wait(lambda view: set(view.members) == set(ends))


class Workers:
    """Makes rendezvous clients and closes them all."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.open: list[TcpRendezvous] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, job: str = "job", key: bytes = KEY, may_host: bool = True) -> TcpRendezvous:
        worker = TcpRendezvous(self.address, job, key, may_host=may_host)
        self.open.append(worker)
        return worker

    def join(
        self, end: str, channel: str = "param", group: str = "default", **kwargs: object
    ) -> tuple[TcpRendezvous, View]:
        worker, view = self.start(**kwargs), View()  # type: ignore[arg-type]
        worker.join(channel, group, member(end), view)
        return worker, view


def member(end: str, attempt: int = 1) -> Member:
    return Member(end=end, role="trainer", attempt=attempt, addresses=[f"tcp://127.0.0.1:{len(end)}"])


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    for worker in reversed(made.open):
        worker.close()


def spawn(address: str, end: str) -> subprocess.Popen[str]:
    """A worker in a process of its own; prints each change as a line."""
    program = """
import sys, json, threading
from flame.sdk.backends.base import Member
from flame.sdk.backends.rendezvous import TcpRendezvous
worker = TcpRendezvous(sys.argv[1], "job", b"k" * 32)
def change(joined, left):
    print(json.dumps([sorted(m.end for m in joined), left, worker.hosting]), flush=True)
worker.join("param", "default", Member(end=sys.argv[2], role="trainer"), change)
sys.stdin.read()
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, address, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def end_process(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait(20)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def test_members_meet_whoever_starts_first(workers: Workers) -> None:
    first, one = workers.join("one")
    second, two = workers.join("two")
    _, three = workers.join("three")
    one.sees("two", "three")
    two.sees("one", "three")
    three.sees("one", "two")
    assert three.members["one"] == member("one")
    assert [first.hosting, second.hosting] == [True, False]


def test_the_first_call_comes_even_when_nobody_is_there(workers: Workers) -> None:
    _, one = workers.join("one")
    one.wait(lambda view: view.calls == 1)
    assert one.members == {}


def test_who_leaves_or_closes_is_reported(workers: Workers) -> None:
    _, one = workers.join("one")
    leaver, _ = workers.join("two")
    closer, _ = workers.join("three")
    one.sees("two", "three")
    leaver.leave("param", "default")
    one.sees("three")
    closer.close()
    one.sees()
    assert one.left == ["two", "three"]


def test_channels_and_groups_are_apart(workers: Workers) -> None:
    _, one = workers.join("one")
    _, two = workers.join("two", group="west")
    _, three = workers.join("three", channel="other")
    _, four = workers.join("four")
    one.sees("four")
    four.sees("one")
    assert two.members == {}
    assert three.members == {}


def test_jobs_share_an_address_and_never_hear_of_each_other(workers: Workers) -> None:
    _, one = workers.join("one")
    hand = rendezvous_server.hand_key("second")
    _, two = workers.join("two", job="second", key=hand)
    _, three = workers.join("three", job="second", key=hand)
    two.sees("three")
    three.sees("two")
    assert one.members == {}


def test_a_stranger_with_another_key_is_turned_away(workers: Workers) -> None:
    _, one = workers.join("one")
    with pytest.raises(BackendError, match="FLAME_JOB_KEY"):
        workers.join("two", key=b"other")
    assert one.members == {}


def test_a_host_that_does_not_hold_the_key_is_not_believed(workers: Workers) -> None:
    with socket.create_server(("127.0.0.1", workers.port)) as impostor:

        def pretend() -> None:
            connection, _ = impostor.accept()
            with connection:
                connection.sendall(b'{"flame": "rendezvous/1", "nonce": "00"}\n')
                connection.recv(4096)
                connection.sendall(b'{"proof": "' + b"0" * 64 + b'"}\n')
                connection.recv(4096)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(BackendError, match="does not hold the job's key"):
            workers.join("one")
        thread.join()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 3000 + b"\n",
        b"x" * 200_000,
        b"[" * 60_000 + b"\n",
        b'{"job": 1}\n',
        b"",
    ],
    ids=["http", "binary", "endless", "deep", "wrong", "nothing"],
)
def test_garbage_is_harmless(workers: Workers, garbage: bytes) -> None:
    _, one = workers.join("one")
    with socket.create_connection(("127.0.0.1", workers.port)) as stranger:
        stranger.settimeout(20)
        try:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
        except OSError as error:  # it hung up on us, which is its right
            if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
                raise
    _, two = workers.join("two")
    one.sees("two")
    two.sees("one")


def test_a_member_of_the_job_cannot_send_nonsense(workers: Workers) -> None:
    """A connection with the right key that then breaks the protocol is closed, and its members with it."""
    _, one = workers.join("one")
    with socket.create_connection(("127.0.0.1", workers.port)) as peer:
        peer.settimeout(20)
        lines = peer.makefile("rb")
        theirs = json.loads(lines.readline())["nonce"]
        shown = rendezvous_server.proof(KEY, "client", "job", theirs, "aa")
        peer.sendall(json.dumps({"job": "job", "nonce": "aa", "proof": shown}).encode() + b"\n")
        assert "proof" in json.loads(lines.readline())
        join = {"type": "join", "channel": "param", "group": "default"}
        peer.sendall(json.dumps(join | {"member": {"end": "two", "role": "trainer"}}).encode() + b"\n")
        one.sees("two")
        peer.sendall(json.dumps(join | {"member": {"end": 7}}).encode() + b"\n")
        one.sees()


def test_a_higher_attempt_replaces_a_member_without_a_leave(workers: Workers) -> None:
    _, one = workers.join("one")
    old, _ = workers.join("two")
    one.sees("two")
    new, view = workers.start(), View()
    new.join("param", "default", member("two", attempt=2), view)
    one.wait(lambda seen: seen.members["two"].attempt == 2)
    old.close()
    _, three = workers.join("three")
    three.sees("one", "two")
    one.sees("two", "three")
    assert one.left == []


def test_an_older_attempt_does_not_come_back(workers: Workers) -> None:
    _, one = workers.join("one")
    new, view = workers.start(), View()
    new.join("param", "default", member("two", attempt=2), view)
    one.sees("two")
    workers.join("two")
    _, three = workers.join("three")
    three.sees("one", "two")
    assert three.members["two"].attempt == 2


def test_when_the_host_goes_another_takes_over(workers: Workers) -> None:
    host, _ = workers.join("one")
    _, two = workers.join("two")
    _, three = workers.join("three")
    two.sees("one", "three")
    host.close()
    _, four = workers.join("four")
    four.sees("two", "three")
    two.wait(lambda view: "four" in view.members)
    two.sees("three", "four")
    three.sees("two", "four")
    assert "three" not in two.left
    assert "two" not in three.left
    assert any(worker.hosting for worker in workers.open[1:])


def test_a_killed_host_is_replaced_and_reported(workers: Workers) -> None:
    host = spawn(workers.address, "one")
    try:
        assert host.stdout is not None
        assert json.loads(host.stdout.readline()) == [[], [], True]
        _, two = workers.join("two")
        _, three = workers.join("three")
        two.sees("one", "three")
    finally:
        end_process(host)
    two.sees("three")
    three.sees("two")
    assert two.left == ["one"]


def test_a_killed_member_is_reported(workers: Workers) -> None:
    _, one = workers.join("one")
    other = spawn(workers.address, "two")
    try:
        one.sees("two")
    finally:
        end_process(other)
    one.sees()


def test_a_worker_that_may_not_host_waits_for_one_that_may(workers: Workers) -> None:
    _, one = workers.join("one", may_host=False)
    _, two = workers.join("two")
    one.sees("two")
    two.sees("one")


def test_it_runs_apart_and_ends_cleanly(workers: Workers) -> None:
    module = "flame.sdk.backends.rendezvous"
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(workers.port)]
    environment = dict(os.environ, FLAME_JOB_KEY=KEY.hex())
    apart = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert apart.stdout is not None
        assert "Workers meet at" in apart.stdout.readline()
        worker, one = workers.join("one")
        _, two = workers.join("two")
        one.sees("two")
        two.sees("one")
        assert not worker.hosting
        again = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        assert again.returncode == 1
        assert "Cannot listen" in again.stderr
    finally:
        end_process(apart, signal.SIGTERM)
    assert apart.returncode == 0


def test_leave_and_close_are_safe_to_repeat(workers: Workers) -> None:
    worker, _ = workers.join("one")
    worker.leave("param", "default")
    worker.leave("param", "default")
    worker.leave("never", "joined")
    worker.close()
    worker.close()
    worker.leave("param", "default")


def test_join_does_not_wait_for_an_address_where_nobody_answers() -> None:
    began = time.monotonic()
    worker = TcpRendezvous("127.0.0.1:9", "job", KEY, may_host=False)
    try:
        worker.join("param", "default", member("one"), View())
        assert time.monotonic() - began < 30
    finally:
        worker.close()


def test_the_key_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAME_JOB_KEY", raising=False)
    assert rendezvous_server.hand_key("a") != rendezvous_server.hand_key("b")
    monkeypatch.setenv("FLAME_JOB_KEY", "ff00")
    assert rendezvous_server.hand_key("a") == b"\xff\x00"
    monkeypatch.setenv("FLAME_JOB_KEY", "no key")
    with pytest.raises(BackendError, match="FLAME_JOB_KEY"):
        rendezvous_server.hand_key("a")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("localhost:10104", ("localhost", 10104)),
        ("mqtt://broker/", ("broker", 1883)),
        ("broker", ("broker", 1883)),
        ("[::1]:7", ("::1", 7)),
        ("[::1]", ("::1", 1883)),
        ("fe80::1", ("fe80::1", 1883)),
    ],
)
def test_addresses_are_read(text: str, wanted: tuple[str, int]) -> None:
    assert split_hostport(text, 1883) == wanted


@pytest.mark.parametrize("text", ["", ":1", "host:", "host:0", "host:65536", "host:x", "host:-1", "host:¹"])
def test_an_address_without_host_or_port_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="host:port"):
        split_hostport(text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        host, port = split_hostport(text)
    except SpecError:
        return
    assert host
    assert 0 < port < 65536


def test_the_module_says_what_it_offers() -> None:
    assert rendezvous.DEFAULT_PORT == 10104
