"""A port of the p2p backend under fire: real handshakes and frames, meddled with. ``FLAME_FUZZ_ROUNDS`` says how many (40)."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from waiting import blocked_until

sys.path.insert(0, str(Path(__file__).parent))

from mutants import mutant

from flame.sdk.backends.p2p_greeting import Doorkeeper
from flame.sdk.backends.p2p_stream import Stream

ROUNDS = int(os.environ.get("FLAME_FUZZ_ROUNDS", "40"))
#: An array that is large enough to be framed by itself, and little things.
MESSAGE = {"x": np.arange(5000.0), "name": "trainer", "round": 7}


@pytest.fixture
def traffic(monkeypatch):
    """What workers of this process say to each other, as it goes out."""
    said = []
    for name in ("send", "send_waiting"):
        plain = getattr(Stream, name)

        def listening(self, buffers, *arguments, _plain=plain, **more):
            count = _plain(self, buffers, *arguments, **more)
            said.append(b"".join(bytes(memoryview(each).cast("B")) for each in buffers)[:count])
            return count

        monkeypatch.setattr(Stream, name, listening)
    return said


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def three(worker, **options):
    aggregator = worker("a", "aggregator", "trainer", **options)
    trainers = [worker(end, **options) for end in ("t1", "t2")]
    for each in (aggregator, *trainers):
        assert not each.channel.await_join(20)
    blocked_until(lambda: set(aggregator.channel.all_ends()) == {"t1", "t2"})
    return aggregator, *trainers


def test_handshakes_that_are_meddled_with_let_nobody_in_and_harm_nobody(worker, traffic, monkeypatch):
    monkeypatch.setattr("flame.sdk.backends.p2p_greeting.SECONDS", 2.0)
    aggregator, trainer, _ = three(worker, same_host=False)
    samples = [data for data in traffic if data]
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    chance = random.Random(7)
    for number in range(ROUNDS):
        with socket.create_connection(("127.0.0.1", aggregator.tcp_port())) as stranger:
            try:
                stranger.sendall(mutant(chance, samples))
                if chance.random() < 0.5:
                    stranger.shutdown(socket.SHUT_WR)
                    stranger.settimeout(20)
                    while stranger.recv(4096):
                        pass
            except OSError as error:  # it was turned away in the middle, which is not to be left waiting
                if isinstance(error, TimeoutError):
                    raise
        if number % 10 == 0:
            trainer.channel.send("a", {"number": number})
            assert aggregator.channel.recv("t1", timeout=20)[0]["number"] == number
    assert set(aggregator.channel.all_ends()) == {"t1", "t2"}
    assert aggregator.backend.turned_away > 0
    assert threading.active_count() == threads
    blocked_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + Doorkeeper.LIMIT // 8)


def test_frames_that_are_meddled_with_harm_no_other_worker(worker, traffic):
    aggregator, mad, bystander = three(worker, same_host=False)
    traffic.clear()
    mad.channel.send("a", MESSAGE)
    assert aggregator.channel.recv("t1", timeout=20)[0]["round"] == 7
    samples = [data for data in traffic if data]
    assert samples
    traffic.clear()
    threads, before = threading.active_count(), resident()
    chance = random.Random(11)
    for number in range(ROUNDS):
        blocked_until(lambda: aggregator.channel.has("t1") and mad.channel.has("a"))
        try:
            broken, line = aggregator.connection("t1"), mad.connection("a").stream
            line.sock.sendall(mutant(chance, samples))
        except (OSError, KeyError):
            continue  # the line was cut a moment ago; it comes back
        bystander.channel.send("a", {**MESSAGE, "number": number})
        got = aggregator.channel.recv("t2", timeout=20)[0]
        assert got["number"] == number
        assert np.array_equal(got["x"], MESSAGE["x"])
        line.abort()  # what is half a frame would wait for its other half
        blocked_until(lambda broken=broken: broken.broken is not None)
        traffic.clear()
    assert aggregator.channel.has("t2")
    assert threading.active_count() <= threads
    assert resident() - before < 64 << 20
