"""The parts of the p2p backend that need no second worker."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.sdk import backends, codec, tensors
from flame.sdk.backends import p2p_address, p2p_stream, shm
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.inproc import InprocBackend
from flame.sdk.backends.p2p_handshake import Hello, Refused, SentAway, Welcome, dial, listen
from flame.sdk.backends.p2p_loop import Loop
from flame.sdk.backends.p2p_memory import SMALL, Pool, Window


def hello():
    return Hello("job", "c", "g", "t1", "trainer", 1, True, "a", b"")


def greet(dial_key, listen_key, *, tamper=lambda n, data: data, answer=lambda h: Welcome("a", "aggregator", 3)):
    """Let both sides talk; gives how each ended. ``tamper(n, data)`` sits on the wire between them."""
    sides = {"dialer": dial(dial_key, hello()), "listener": listen(listen_key, answer)}
    wanted, heard, ends = {}, {"dialer": b"", "listener": b""}, {}
    number = 0

    def step(side, data):
        nonlocal number
        other = "listener" if side == "dialer" else "dialer"
        try:
            out, wanted[side] = next(sides[side]) if data is None else sides[side].send(data)
        except StopIteration as stop:
            ends[side] = stop.value
        except Refused as error:
            ends[side] = error
        else:
            if out:
                number += 1
                heard[other] += tamper(number, out)

    step("dialer", None)
    step("listener", None)
    moved = True
    while moved:
        moved = False
        for side in sides:
            while side not in ends and len(heard[side]) >= wanted[side]:
                data, heard[side] = heard[side][: wanted[side]], heard[side][wanted[side] :]
                step(side, data)
                moved = True
    return ends.get("dialer"), ends.get("listener")


def test_two_who_know_the_key_believe_each_other():
    welcome, heard = greet(b"k", b"k")
    assert (welcome.end, welcome.role, welcome.attempt) == ("a", "aggregator", 3)
    assert (heard.end, heard.channel, heard.to, heard.dials) == ("t1", "c", "a", True)


def test_with_another_key_neither_side_believes_the_other():
    dialer, listener = greet(b"k", b"other")
    assert "does not know the job's key" in str(dialer)
    assert listener is None  # it was not shown a proof, and closes at the deadline


def test_one_who_is_not_wanted_is_told_why():
    def answer(_hello):
        raise SentAway("has left the channel")

    dialer, listener = greet(b"k", b"k", answer=answer)
    assert str(dialer) == "has left the channel"
    assert isinstance(listener, SentAway)


@given(st.integers(1, 3), st.integers(0, 400), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_whatever_is_changed_on_the_way_nobody_is_fooled(message, at, flip):
    def tamper(number, data):
        if number != message:
            return data
        changed = bytearray(data)
        changed[at % len(data)] ^= flip
        return bytes(changed)

    _, listener = greet(b"k", b"k", tamper=tamper)
    assert not isinstance(listener, Hello)


def test_a_proof_cannot_be_sent_back_to_its_maker():
    dialer = dial(b"k", hello())
    said, _ = next(dialer)
    # A stranger that plays the listener by reflecting what it is sent.
    with pytest.raises(Refused):
        dialer.send((said * 2)[:64])


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_ends_the_handshake_with_a_reason(noise):
    side = listen(b"k", lambda h: Welcome("a", "r", 1))
    _, wanted = next(side)
    with pytest.raises(Refused) as caught:
        while True:
            assert wanted <= 4096
            piece, noise = noise[:wanted].ljust(wanted, b"\0"), noise[wanted:]
            _, wanted = side.send(piece)
    assert str(caught.value)


# Memory.


class Reader:
    def __init__(self, end):
        self.end, self.progress, self.told = end, 0.0, 0

    def proceed(self):
        self.told += 1


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 4 * SMALL), st.booleans()), max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_window_lets_in_all_in_the_end_and_never_more_than_it_holds(steps):
    window = Window(3 * SMALL)
    readers = {end: Reader(end) for end in "abcdef"}
    asked, held = {}, []

    def let_in(end):
        held.append(asked.pop(end))
        window.arrived(readers[end])

    def settle():
        window.resume(lambda proceed: let_in(proceed.__self__.end))

    for end, size, give_back in steps:
        if end not in asked:
            asked[end] = size
            if window.enter(readers[end], size):
                let_in(end)
        if give_back and held:
            window.returned.append(held.pop(0))
            settle()
        large = [size for size in held if size > SMALL]
        assert sum(large) <= window.limit or len(large) == 1
        assert sum(size for size in held if size <= SMALL) <= window.limit
    while held:
        window.returned.append(held.pop())
        settle()
    assert not asked
    assert (window.used, window.small) == (0, 0)


def test_one_who_is_waited_for_is_let_in_although_the_window_is_full():
    window = Window(SMALL)
    first, second, third = Reader("a"), Reader("b"), Reader("c")
    assert window.enter(first, 10 * SMALL)
    window.arrived(first)
    assert not window.enter(second, 10 * SMALL)
    assert not window.enter(third, 10 * SMALL)
    assert window.want({"c"})
    told = []
    window.resume(told.append)
    assert told == [third.proceed]
    window.want(())
    window.leave(second, 10 * SMALL)
    window.leave(third, -1)
    window.returned.append(10 * SMALL)
    window.resume(told.append)
    assert (window.used, len(told), list(window.waiting)) == (0, 1, [])


def test_one_who_ends_between_being_let_in_and_hearing_of_it_gives_its_room_back():
    window = Window(SMALL)
    first, second = Reader("a"), Reader("b")
    for size in (10 * SMALL, SMALL):
        assert window.enter(first, size)
        window.arrived(first)
        assert not window.enter(second, size)
        window.returned.append(size)
        window.resume(lambda proceed: None)
        window.leave(second, size)
        window._collect()
        assert (window.used, window.small) == (0, 0)


def test_buffers_are_used_again_and_few_are_kept():
    pool = Pool(1 << 20)
    first = pool.take(10 << 20)
    first[:4] = b"data"
    pool.give(first)
    assert pool.take(9 << 20) is first
    pool.give(first)
    other = pool.take(100 << 10)
    assert other is not first
    pool.give(other)
    assert len(pool._free) == 1


# Segments.


def memory_file(size, seals):
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(("size", "seals"), [(8192, 0), (8192, fcntl.F_SEAL_GROW), (4096, fcntl.F_SEAL_SHRINK)])
def test_a_segment_that_could_shrink_or_is_too_short_is_not_mapped(size, seals):
    fd = memory_file(size, seals)
    with pytest.raises(ValueError, match="sealed, or too short"):
        shm.Mappings().open("owner", 1, fd, 8000)
    os.close(fd)


def test_what_is_no_memory_file_is_not_mapped(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    with open(tmp_path / "file", "rb") as file, pytest.raises(ValueError, match="it is"):
        shm.Mappings().open("owner", 1, file.fileno(), 8000)
    first, second = socket.socketpair()
    with first, second, pytest.raises(ValueError, match="not a memory file"):
        shm.Mappings().open("owner", 1, first.fileno(), 8000)


def test_writing_to_a_received_segment_reaches_nobody_else(monkeypatch):
    fd = memory_file(8192, fcntl.F_SEAL_SHRINK)
    for torch_loaded in (True, False):
        monkeypatch.setitem(sys.modules, "torch", object()) if torch_loaded else monkeypatch.delitem(
            sys.modules, "torch"
        )
        mappings = shm.Mappings()
        view = mappings.open("owner", 1, fd, 8000)
        if torch_loaded:
            view[0] = 7
        else:
            assert view.readonly
        assert os.pread(fd, 1, 0) == b"\0"
    os.close(fd)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("torch_loaded", [False, True])
def test_what_was_dealt_with_need_not_be_resident_and_keeps_its_values(monkeypatch, torch_loaded):
    monkeypatch.setitem(sys.modules, "torch", object()) if torch_loaded else monkeypatch.delitem(
        sys.modules, "torch", False
    )
    size = 40_000_000
    frames = codec.encode({"a": np.arange(100, dtype="f4"), "b": np.arange(size // 4, dtype="f4")})
    segments = shm.Segments()
    segment = segments.write(frames)
    segment.unmap()
    segments.sent(segment)
    message = codec.decode(segments.mappings.open("owner", 1, segment.fd, frames.nbytes), release=lambda: None)
    before, array = resident(), message["b"]
    flat = np.lib.stride_tricks.as_strided(array, shape=(array.size,))
    total = float(flat.sum())
    assert resident() - before > 0.9 * size
    tensors.forget(flat)
    assert resident() - before < 0.1 * size
    assert float(array.sum()) == total
    tensors.forget(array[5:6])
    tensors.forget(message["a"])
    tensors.forget(np.arange(10.0))
    segments.close()


class Reading:
    def __init__(self):
        self.segments = {}


def test_a_segment_is_written_to_again_only_when_all_its_readers_are_done():
    segments = shm.Segments()
    frames = codec.encode({"x": np.arange(3_000_000.0), "y": np.ones(3)})
    one, two = Reading(), Reading()
    first = segments.write(frames)
    data = os.pread(first.fd, frames.nbytes, 0)
    assert codec.decode(data)["x"][2_999_999] == 2_999_999
    segments.use(first, one)
    segments.use(first, two)
    segments.sent(first)
    segments.done(first, one)
    second = segments.write(frames)
    assert second is not first
    segments.use(second, one)
    segments.sent(second)
    segments.done(first, two)
    assert segments.write(frames) is first
    # A reader that was lost may still be looking: not written to again.
    segments.use(first, two)
    segments.sent(first)
    segments.done(first, two, lost=True)
    assert first.fd == -1
    segments.done(second, one)
    segments.close()
    assert second.fd == -1


@pytest.mark.parametrize("receives", [False, True])
def test_a_message_of_any_shape_is_copied_whole(monkeypatch, receives):
    monkeypatch.setattr(shm, "_PARALLEL", 0)
    monkeypatch.setattr(shm, "_STEP", 8192)
    monkeypatch.setattr(shm, "KEEP_MAPPED", 0)
    segments = shm.Segments()
    if receives:
        segments.unmap_idle()
    for sizes in ([1], [4095, 1, 4097], [0, 5], [3_000_000], [1] * 1000, [100_000, 7, 2_000_001]):
        frames = codec.encode({str(i): np.full(n, i % 251, "u1") for i, n in enumerate(sizes)})
        segment = segments.write(frames)
        assert os.pread(segment.fd, frames.nbytes, 0) == frames.head + b"".join(frames.buffers)
        segments.sent(segment)
    segments.close()


# The loop.


def test_calls_from_many_threads_all_happen_in_order_and_faults_end_nothing(caplog):
    loop = Loop("test")
    seen = []

    def work(me):
        for number in range(500):
            loop.call(seen.append, (me, number))

    loop.call(lambda: 1 / 0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loop.run(lambda: None, 20)
    for me in range(4):
        assert [number for who, number in seen if who == me] == list(range(500))
    assert "fault in the p2p backend" in caplog.text
    loop.close()


def test_timers_run_in_their_order_and_can_be_taken_back():
    loop, seen, done = Loop("test"), [], threading.Event()

    def arm():
        loop.later(0.02, lambda: (seen.append("late"), done.set()))
        loop.later(0.0, lambda: seen.append("soon"))
        loop.later(0.01, lambda: seen.append("never")).cancel()

    loop.call(arm)
    assert done.wait(20)
    loop.close()
    assert seen == ["soon", "late"]


# Addresses and sockets.


def test_only_addresses_that_lead_to_the_peer_are_dialled():
    mine = f"unix:{p2p_address.host_id()}/x"
    given = ["tcp://10.0.0.1:5", "unix:other-boot.1/x", mine, "nonsense"]
    assert p2p_address.dialable(given) == [mine, "tcp://10.0.0.1:5"]
    assert p2p_address.dialable(given, same_host=False) == ["tcp://10.0.0.1:5"]
    assert p2p_address.target("tcp://[::1]:80") == (socket.AF_INET6, ("::1", 80))
    assert p2p_address.target("tcp://name:80") is None
    for bad in ("tcp://:80", "tcp://host", "tcp://host:99999", "x"):
        with pytest.raises(ValueError, match=r"."):
            p2p_address.target(bad)


def test_the_advertised_host_follows_the_control_plane(monkeypatch):
    for variable in ("FLAME_SERVER", "FLAME_P2P_HOST", "FLAME_P2P_BIND", "FLAME_P2P_PORT"):
        monkeypatch.delenv(variable, raising=False)
    assert p2p_address.own_host(None) == "127.0.0.1"
    assert p2p_address.own_host("localhost:10104") == "127.0.0.1"
    monkeypatch.setenv("FLAME_SERVER", "http://127.0.0.1:10100")
    assert p2p_address.own_host(None) == "127.0.0.1"
    sock, address = p2p_address.listen_tcp({}, None)
    assert sock.getsockname()[0] == "127.0.0.1"
    sock.close()
    monkeypatch.setenv("FLAME_P2P_HOST", "worker.example")
    sock, address = p2p_address.listen_tcp({}, None)
    assert address == f"tcp://worker.example:{sock.getsockname()[1]}"
    assert sock.getsockname()[0] == "0.0.0.0"
    sock.close()


def test_a_silent_host_is_told_from_a_sleeping_process():
    def info(*, unacked=0, retransmits=0, probes=0, heard_ms=0):
        return struct.pack("<BBBBB3x13I", 1, 0, retransmits, probes, 0, *([0] * 4), unacked, *([0] * 7), heard_ms)

    late = int(1000 * p2p_stream.DEAD_SECONDS)
    assert p2p_stream.host_is_silent(info(unacked=3, retransmits=4, heard_ms=late))
    assert p2p_stream.host_is_silent(info(probes=1, heard_ms=late))
    assert not p2p_stream.host_is_silent(info(heard_ms=10 * late))  # nothing is owed
    assert not p2p_stream.host_is_silent(info(unacked=3, retransmits=1, heard_ms=late))
    assert not p2p_stream.host_is_silent(info(unacked=3, retransmits=9, heard_ms=500))
    assert not p2p_stream.host_is_silent(b"")


def test_large_claims_cost_no_memory_before_they_come_true():
    tracemalloc.start()
    from flame.sdk.backends.p2p_memory import allocate

    memory = allocate(1 << 34)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    memory.close()
    tracemalloc.stop()
    assert isinstance(memory, mmap.mmap)


# Registration.


def test_a_backend_is_one_line_of_registration(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS, "builtin", dict(backends.BACKENDS.builtin))
    backends.register("mine", "flame.sdk.backends.inproc:InprocBackend")
    made = backends.make("mine", BackendContext(job="j", key=b"k", me=Member(end="x", role="r")))
    assert isinstance(made, InprocBackend)
    assert {"inproc", "mine", "mqtt", "p2p"} <= set(backends.BACKENDS.names())
