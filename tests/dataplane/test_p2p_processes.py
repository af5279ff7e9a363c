"""The p2p backend between processes that are killed, stopped, busy, or cut off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from waiting import blocked_until

from flame.sdk.backends import p2p_stream

BIG = 24_000_000


def joined(aggregator, *ends):
    assert aggregator.channel.wait_until(lambda: set(ends) <= set(aggregator.channel.all_ends()), 60)


@pytest.fixture(params=[True, False], ids=["shared", "tcp"])
def same_host(request):
    return request.param


def test_messages_pass_between_processes(aggregator, child, same_host):
    a = aggregator(same_host=same_host)
    ends = ["t1", "t2", "t3"]
    for end in ends:
        child("echo", end, same_host=same_host)
    joined(a, *ends)
    weights = {f"w{i}": np.random.default_rng(i).random(50_000) for i in range(20)}
    for number in range(4):
        assert a.channel.broadcast({"weights": weights, "n": number}, timeout=30) == {}
        for message, _ in a.channel.recv_fifo(ends, timeout=30):
            assert message["n"] == number
            assert all(np.array_equal(message["weights"][k], v) for k, v in weights.items())
            del message
    a.channel.broadcast({"end": True})


def test_a_peer_that_is_killed_in_the_middle_of_a_message_is_noticed_at_once(aggregator, child, same_host):
    a = aggregator(same_host=same_host, window=1)
    victim, other = child("flood", "t1", same_host=same_host, size=BIG), child("echo", "t2", same_host=same_host)
    joined(a, "t1", "t2")
    first, _ = a.channel.recv("t1", timeout=30)  # kept: nothing more is let in, and t1 is stuck in mid-message
    assert first["weights"]["w"].size == BIG // 8
    victim.kill()
    del first
    began = time.monotonic()
    while a.channel.recv("t1", timeout=30)[0] is not None:
        pass  # what it had sent whole still counts
    assert time.monotonic() - began < 20
    blocked_until(lambda: not a.channel.has("t1"))
    a.channel.send("t2", {"x": np.ones(BIG // 8)}, timeout=30)
    assert a.channel.recv("t2", timeout=30)[0]["x"].all()
    blocked_until(lambda: not a.room.window.reading)
    other.kill()


def test_a_peer_that_is_killed_while_it_is_sent_to_does_not_hold_the_others(aggregator, child, same_host):
    a = aggregator(same_host=same_host)
    stopped, other = child("echo", "t1", same_host=same_host), child("echo", "t2", same_host=same_host)
    joined(a, "t1", "t2")
    stopped.signal(signal.SIGSTOP)
    message = {"x": np.ones(BIG // 8)}
    for _ in range(3):  # more than the sockets, or the segments on their way, can take
        a.channel.broadcast(message, ["t2"], timeout=30)
        assert a.channel.recv("t2", timeout=30)[0]["x"].all()
        failed = a.channel.broadcast(message, ["t1"], timeout=0.2)
    assert failed["t1"] in ("did not take a message in time", "is not connected")
    stopped.kill()
    blocked_until(lambda: not a.channel.has("t1"))
    assert a.channel.broadcast(message, timeout=30) == {}
    other.kill()


def test_a_stopped_process_is_not_dead_and_goes_on_where_it_was(aggregator, child, same_host):
    a = aggregator(same_host=same_host)
    sleeper = child("echo", "t1", same_host=same_host)
    joined(a, "t1")
    sleeper.signal(signal.SIGSTOP)
    a.channel.send("t1", {"n": 1})
    assert not a.channel.wait_until(lambda: not a.channel.has("t1"), 2)
    sleeper.signal(signal.SIGCONT)
    assert a.channel.recv("t1", timeout=30)[0]["n"] == 1


def test_a_stopped_sender_does_not_keep_the_others_waiting(aggregator, child, monkeypatch):
    # It is let in, has sent a part, and is stopped: the window would stay full.
    monkeypatch.setattr("flame.sdk.backends.p2p_memory.STALL_SECONDS", 0.2)
    monkeypatch.setattr("flame.sdk.backends.p2p_connection.STALL_SECONDS", 0.2)
    a = aggregator(same_host=False, window=1)
    child("stall", "t1", same_host=False, size=BIG)
    joined(a, "t1")
    blocked_until(lambda: any(r.end == "t1" for r in a.room.window.reading))
    other = child("flood", "t2", same_host=False, size=BIG)
    joined(a, "t2")
    for number in range(3):
        assert a.channel.recv("t2", timeout=30)[0]["n"] == number
    assert a.channel.has("t1")
    other.kill()


def test_a_peer_that_is_busy_in_native_code_is_there_all_the_time(aggregator, child, same_host):
    a = aggregator(same_host=same_host)
    busy = child("busy", "t1", same_host=same_host)
    joined(a, "t1")
    busy.says("joined")
    busy.says("busy")
    message, _ = a.channel.recv("t1", timeout=60)
    assert message["done"]


def test_the_last_message_arrives_although_its_sender_is_gone(aggregator, child, same_host):
    a = aggregator(same_host=same_host, window=1)
    last, one = child("last", "t1", same_host=same_host, size=BIG), child("one", "t2", same_host=same_host, size=BIG)
    joined(a, "t2")
    one.says("joined")
    kept, _ = a.channel.recv("t2", timeout=30)
    last.says("joined")
    blocked_until(lambda: a.channel.heard() or last.process.poll() is not None or not same_host)
    del kept
    assert a.channel.recv("t1", timeout=30)[0]["weights"]["w"].all()
    assert last.process.wait(30) == 0


def test_nothing_is_left_in_shared_memory_when_everyone_is_killed(aggregator, child):
    before = set(os.listdir("/dev/shm"))
    a = aggregator(window=1)
    children = [child("flood", f"t{i}", size=BIG) for i in range(3)]
    joined(a, "t0", "t1", "t2")
    held = [a.channel.recv(f"t{i}", timeout=30)[0] for i in range(3)]
    assert shared_memory() >= BIG
    for each in children:
        each.kill()
    assert all(message["weights"]["w"].size for message in held)  # still readable
    held.clear()
    blocked_until(lambda: not a.channel.all_ends())
    a.channel.drain()
    assert set(os.listdir("/dev/shm")) == before
    blocked_until(lambda: shared_memory() < BIG)


def shared_memory():
    """Bytes of memory files that this process has mapped."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "memfd:flame" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def test_one_segment_serves_all_readers_and_is_used_again(aggregator, child):
    a = aggregator()
    ends = [f"t{i}" for i in range(4)]
    for end in ends:
        child("echo", end)
    joined(a, *ends)
    numbers = set()
    for number in range(6):
        a.channel.broadcast({"x": np.full(500_000, number)}, timeout=30)
        segments = a.backend._segments
        numbers |= {segment.number for segment in segments._all}
        for message, _ in a.channel.recv_fifo(ends, timeout=30):
            assert (message["x"] == number).all()
            del message
    # Two at most: one being read while the next is written.
    assert len(numbers) <= 3
    blocked_until(lambda: len(segments._all) == 1)


def test_a_host_that_vanishes_is_noticed_within_seconds(aggregator, child, monkeypatch):
    """Two network namespaces joined by a cable, which is pulled while a large message is on its way."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("making network namespaces takes root and the program ip")
    number = os.getpid()  # of two runs at once each has its own
    space, plug, socket = f"flame-{number}", f"fl{number}a", f"fl{number}b"
    near, far = f"10.213.{number % 256}.1", f"10.213.{number % 256}.2"
    made = subprocess.run(["ip", "netns", "add", space], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    monkeypatch.setattr(p2p_stream, "DEAD_SECONDS", 2)
    monkeypatch.setattr(p2p_stream, "KEEP_IDLE", 1)
    monkeypatch.setattr(p2p_stream, "KEEP_INTERVAL", 1)
    try:
        ip("link", "add", plug, "type", "veth", "peer", "name", socket, "netns", space)
        ip("addr", "add", f"{near}/24", "dev", plug)
        ip("link", "set", plug, "up")
        ip("-n", space, "addr", "add", f"{far}/24", "dev", socket)
        ip("-n", space, "link", "set", socket, "up")
        a = aggregator(address=f"{near}:10555", host=near)
        inside = ("ip", "netns", "exec", space)
        idle = child("echo", "t1", address=f"{near}:10555", prefix=inside)
        sending = child("echo", "t2", address=f"{near}:10555", prefix=inside)
        joined(a, "t1", "t2")
        assert not a.connection("t1").stream.local
        sending.signal(signal.SIGSTOP)
        results = []
        stuck = threading.Thread(target=lambda: results.append(a.channel.broadcast({"x": np.ones(1_000_000)}, ["t2"])))
        stuck.start()
        # Its window is shut, its host is alive: that is no reason to give it up.
        assert not a.channel.wait_until(lambda: not a.channel.has("t2"), 4)
        ip("link", "set", plug, "down")
        # t1 owes an answer (keepalive); t2's kernel owes one too, but only its counters tell.
        assert a.channel.wait_until(lambda: not a.channel.all_ends(), 60)
        stuck.join(20)
        assert results == [{"t2": "is not reachable any more"}]
        idle.kill()
    finally:
        subprocess.run(["ip", "netns", "del", space], check=False)
        subprocess.run(["ip", "link", "del", plug], check=False, capture_output=True)


def test_a_forked_data_loader_does_not_keep_its_dead_parent_alive(aggregator, child, same_host):
    a = aggregator(same_host=same_host)
    parent = child("fork", "t1", same_host=same_host)
    joined(a, "t1")
    parent.says("joined")
    forked = int(parent.process.stdout.readline())
    try:
        parent.kill()
        assert a.channel.wait_until(lambda: not a.channel.has("t1"), 20)
    finally:
        os.kill(forked, signal.SIGKILL)


def test_the_channel_is_quick_to_import():
    code = "import sys, flame.sdk.channel, flame.sdk.channel_manager; print([m for m in ('numpy','torch','ssl','asyncio') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
