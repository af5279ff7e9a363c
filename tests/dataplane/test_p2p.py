"""The p2p backend: real sockets, several workers in this process."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import struct
import subprocess
import threading
import time

import numpy as np
import pytest
from dataplanekit import KEY
from waiting import blocked_until

from flame.errors import BackendError, EndLeft
from flame.sdk.backends import p2p_handshake, p2p_peer
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.p2p import P2pBackend
from flame.sdk.backends.p2p_greeting import Doorkeeper


def authority(folder):
    """A CA and a certificate of it, as the backend's options."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(*new, "-x509", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-subj", "/CN=worker", "-keyout", "worker.key", "-out", "worker.csr")
    sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl("x509", "-req", "-in", "worker.csr", *sign, "-out", "worker.pem")
    return {
        name: str(folder / file)
        for name, file in (("tls_cert", "worker.pem"), ("tls_key", "worker.key"), ("tls_ca", "ca.pem"))
    }


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["shared", "tcp", "tls"])
def transport(request):
    if request.param == "tls":
        return request.getfixturevalue("tls")
    return {"same_host": request.param == "shared"}


def model(size, seed=0):
    generator = np.random.default_rng(seed)
    return {"a": generator.integers(0, 255, size // 2, "u1"), "b": generator.random(size // 16)}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def pair(worker, **options):
    aggregator = worker("a", "aggregator", "trainer", **options)
    trainer = worker("t1", **options)
    assert not trainer.channel.await_join(20)
    assert not aggregator.channel.await_join(20)
    return aggregator, trainer


def met(aggregator, *trainers):
    """Wait until all see each other: which of two sees the other one first is left to chance."""
    assert aggregator.channel.wait_until(lambda: len(aggregator.channel.all_ends()) == len(trainers), 20)
    for trainer in trainers:
        assert not trainer.channel.await_join(20)


@pytest.mark.parametrize("size", [0, 1000, 60_000, 70_000, 600_000, 9_000_000])
def test_messages_of_every_size_arrive_whole_in_both_directions(worker, transport, size):
    aggregator, trainer = pair(worker, **transport)
    weights = model(size)
    for _ in range(3):
        assert aggregator.channel.broadcast({"weights": weights}, timeout=20) == {}
        message, _ = trainer.channel.recv("a", timeout=20)
        trainer.channel.send("a", message, timeout=20)
        assert equal(message["weights"], weights)
        del message
        message, _ = aggregator.channel.recv("t1", timeout=20)
        assert equal(message["weights"], weights)
        del message


def test_many_small_messages_keep_their_order_beside_large_ones(worker, transport):
    aggregator = worker("a", "aggregator", "trainer", **transport)
    trainers = [worker(f"t{i}", **transport) for i in range(4)]
    sizes = [random.Random(i).choice([0, 100, 5_000, 100_000, 700_000]) for i in range(60)]

    def send(trainer):
        trainer.channel.await_join(20)
        for number, size in enumerate(sizes):
            trainer.channel.send("a", {"n": number, "x": np.full(size, number % 250, "u1")}, timeout=30)

    threads = [threading.Thread(target=send, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    assert aggregator.channel.wait_until(lambda: len(aggregator.channel.all_ends()) == 4, 20)
    for number, size in enumerate(sizes):
        for message, _ in aggregator.channel.recv_fifo([f"t{i}" for i in range(4)], timeout=30):
            assert message["n"] == number
            assert len(message["x"]) == size
            assert (message["x"] == number % 250).all()
            del message
    for thread in threads:
        thread.join()


def test_several_threads_may_send_to_one_end(worker, transport):
    aggregator, trainer = pair(worker, **transport)
    seen = {}

    def send(sender):
        for number in range(20):
            weights = np.full(400_000, sender, "u1") if number % 5 == 0 else np.zeros(1)
            trainer.channel.send("a", {"from": sender, "n": number, "x": weights}, timeout=30)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(80):
        message, _ = aggregator.channel.recv("t1", timeout=30)
        assert message["n"] == seen.get(message["from"], -1) + 1
        seen[message["from"]] = message["n"]
        assert message["n"] % 5 or (message["x"] == message["from"]).all()
        del message
    for thread in threads:
        thread.join()


def test_what_was_sent_before_leaving_arrives(worker, transport):
    aggregator, trainer = pair(worker, **transport)
    weights = model(3_000_000)
    trainer.channel.send("a", {"weights": weights})
    trainer.channel.send("a", {"last": True})
    threading.Thread(target=trainer.channel.leave).start()
    assert equal(aggregator.channel.recv("t1", timeout=20)[0]["weights"], weights)
    assert aggregator.channel.recv("t1", timeout=20)[0]["last"]
    assert aggregator.channel.recv("t1", timeout=20)[0] is None
    with pytest.raises(EndLeft, match="left the channel"):
        aggregator.channel.send("t1", {})


def test_workers_on_one_host_find_that_out_and_use_no_tcp(worker):
    aggregator, trainer = pair(worker)
    assert aggregator.connection("t1").stream.local
    assert trainer.connection("a").stream.local
    other = worker("t2", same_host=False)
    assert not other.channel.await_join(20)
    assert not other.connection("a").stream.local


def test_peers_of_one_role_are_connected_only_where_the_channel_links_them(worker):
    aggregator = worker("a", "aggregator", "trainer")
    first, second = worker("t1"), worker("t2")
    met(aggregator, first, second)
    assert set(first.room.peers) == set(second.room.peers) == {"a"}


def test_equals_meet_whoever_comes_first(worker):
    workers = [worker(f"w{i}", "trainer", "trainer", dials=True) for i in (2, 0, 3, 1)]
    for each in workers:
        assert each.channel.wait_until(lambda each=each: len(each.channel.all_ends()) == 3, 20)
    assert len({each.channel.ends_digest() for each in workers}) == 1


def test_the_window_bounds_what_is_held_however_many_send(worker):
    window = 3_000_000
    aggregator = worker("a", "aggregator", "trainer", window=window, same_host=False)
    trainers = [worker(f"t{i}", same_host=False) for i in range(6)]
    met(aggregator, *trainers)
    threads = [threading.Thread(target=t.channel.send, args=("a", {"x": np.ones(1_400_000, "u1")})) for t in trainers]
    for thread in threads:
        thread.start()
    held = aggregator.room.window
    blocked_until(lambda: len(held.waiting) >= 4)
    assert 0 < held.used <= window
    for message, _ in aggregator.channel.recv_fifo(aggregator.channel.ends(), timeout=30):
        assert message["x"].all()
        assert held.used <= window
        del message
    for thread in threads:
        thread.join()
    blocked_until(lambda: not held.waiting)


def test_small_messages_pass_while_a_large_one_is_held(worker):
    aggregator = worker("a", "aggregator", "trainer", window=1_000_000)
    first, second = worker("t1"), worker("t2")
    met(aggregator, first, second)
    first.channel.send("a", {"x": np.ones(5_000_000, "u1")})
    kept, _ = aggregator.channel.recv("t1", timeout=20)
    second.channel.send("a", {"small": True})
    assert aggregator.channel.recv("t2", timeout=20)[0]["small"]
    assert kept["x"].all()


def test_one_who_is_waited_for_is_heard_though_small_messages_of_another_fill_the_window(worker):
    aggregator = worker("a", "aggregator", "trainer", dials=False, window=300_000)
    loud, quiet = worker("t1"), worker("t2")
    met(aggregator, loud, quiet)
    for number in range(12):
        loud.channel.send("a", {"x": np.full(40_000, number, "u1")}, timeout=20)
    blocked_until(lambda: aggregator.connection("t1").held)
    for number in range(3):
        quiet.channel.send("a", {"x": np.full(40_000, number, "u1")}, timeout=20)
        assert aggregator.channel.recv("t2", timeout=20)[0]["x"][0] == number
    for number in range(12):
        assert aggregator.channel.recv("t1", timeout=20)[0]["x"][0] == number


def test_one_who_keeps_an_old_message_still_gets_the_next(worker, transport):
    # A trainer may well hold on to the last global model while it waits for the next one.
    aggregator, trainer = pair(worker, **transport)
    trainer_window = trainer.room.window
    trainer_window.limit = 100_000
    kept = []
    for number in range(5):
        aggregator.channel.broadcast({"x": np.full(2_000_000, number, "u1")}, timeout=20)
        kept.append(trainer.channel.recv("a", timeout=20)[0])
    assert [int(message["x"][-1]) for message in kept] == [0, 1, 2, 3, 4]


def test_a_connection_that_is_cut_comes_back_by_itself(worker, transport):
    aggregator, trainer = pair(worker, **transport)
    for _ in range(3):
        old = trainer.connection("a")
        old.fail("was cut")
        assert trainer.channel.wait_until(lambda old=old: trainer.room.connections.get("a") not in (None, old), 20)
        blocked_until(lambda: aggregator.channel.has("t1"))
        blocked_until(lambda: not aggregator.channel.broadcast({"x": 1}, timeout=5))
        assert trainer.channel.recv("a", timeout=20)[0] is not None
        trainer.channel.drain()


def test_a_newer_attempt_takes_the_place_and_an_older_one_is_sent_away(worker, meeting):
    aggregator, _ = pair(worker)
    newer = worker("t1", attempt=2)
    assert not newer.channel.await_join(20)
    blocked_until(lambda: aggregator.channel.member("t1") and aggregator.channel.member("t1").attempt == 2)
    assert aggregator.connection("t1").member.attempt == 2
    older = worker("t1", attempt=1)
    assert older.channel.await_join(0.3)
    assert aggregator.connection("t1").member.attempt == 2
    assert aggregator.channel.broadcast({"x": 1}, timeout=5) == {}
    assert newer.channel.recv("a", timeout=5)[0]["x"] == 1


@pytest.mark.parametrize("wrong", [{"key": b"other" * 8}, {"job": "other"}])
def test_a_worker_with_the_wrong_key_or_job_never_gets_in(worker, wrong, caplog):
    aggregator, _trainer = pair(worker)
    stranger = worker("t9", **wrong)
    assert stranger.channel.await_join(0.3)
    assert aggregator.channel.all_ends() == ["t1"]
    assert aggregator.channel.broadcast({"x": 1}, timeout=5) == {}


def raw(aggregator):
    return socket.create_connection(("127.0.0.1", aggregator.tcp_port()))


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + bytes(500),
        random.Random(1).randbytes(5000),
        p2p_handshake._HEAD.pack(p2p_handshake.MAGIC, 9, 100),
        p2p_handshake._HEAD.pack(p2p_handshake.MAGIC, 1, 65535) + bytes(5000),
        p2p_handshake._HEAD.pack(p2p_handshake.MAGIC, 1, 100) + b"\xdd\xff\xff\xff\xff" * 20,
    ],
)
def test_garbage_is_turned_away_and_harms_nobody(worker, noise, caplog):
    aggregator, trainer = pair(worker, same_host=False)
    with raw(aggregator) as stranger:
        stranger.sendall(noise)
        stranger.settimeout(20)
        with_reset = b""
        try:
            while stranger.recv(1000):
                pass
        except ConnectionResetError:
            pass
        assert with_reset == b""
    blocked_until(lambda: aggregator.backend.turned_away == 1)
    blocked_until(lambda: "Turned away somebody who connected" in caplog.text)  # counted first, then said
    trainer.channel.send("a", {"x": 1})
    assert aggregator.channel.recv("t1", timeout=5)[0]["x"] == 1


def test_who_connects_and_says_nothing_is_turned_away_in_time(worker, monkeypatch):
    monkeypatch.setattr("flame.sdk.backends.p2p_greeting.SECONDS", 0.3)
    aggregator, trainer = pair(worker, same_host=False)
    with raw(aggregator) as silent, raw(aggregator) as slow:
        slow.sendall(p2p_handshake.MAGIC)
        for stranger in (silent, slow):
            stranger.settimeout(20)
            assert stranger.recv(1) == b""
    blocked_until(lambda: aggregator.backend.turned_away >= 2)
    trainer.channel.send("a", {"x": 1})
    assert aggregator.channel.recv("t1", timeout=5)[0]["x"] == 1


def test_strangers_in_crowds_push_each_other_out_not_the_workers(worker, monkeypatch, caplog):
    monkeypatch.setattr(Doorkeeper, "LIMIT", 8)
    aggregator, trainer = pair(worker, same_host=False)
    crowd = [raw(aggregator) for _ in range(30)]
    blocked_until(lambda: aggregator.backend.turned_away == 22)
    assert caplog.text.count("Turned away") <= 6
    late = worker("t2", same_host=False)
    assert not late.channel.await_join(20)
    trainer.channel.send("a", {"x": 1})
    assert aggregator.channel.recv("t1", timeout=5)[0]["x"] == 1
    for each in crowd:
        each.close()


@pytest.mark.parametrize("evil", [bytes(16), b"\xff" * 40, struct.pack("<BBHIQ", 1, 0, 0x464C, 0, 1 << 50)])
def test_a_worker_that_goes_mad_is_cut_off_without_allocating_what_it_claims(worker, evil):
    aggregator, trainer = pair(worker, same_host=False)
    before, old = _resident(), aggregator.connection("t1")
    trainer.connection("a").stream.sock.send(evil)
    blocked_until(lambda: old.broken is not None)
    blocked_until(lambda: aggregator.channel.has("t1"))  # it comes back
    assert _resident() - before < 50 << 20


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_thousand_connections_leave_no_descriptor_behind(worker):
    aggregator, trainer = pair(worker, same_host=False)
    blocked_until(lambda: True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        with raw(aggregator) as stranger:
            stranger.sendall(b"x" * 10)
    blocked_until(lambda: aggregator.backend.turned_away == 1000)
    for _ in range(30):
        old = trainer.connection("a")
        old.fail("was cut")
        assert trainer.channel.wait_until(lambda old=old: trainer.room.connections.get("a") not in (None, old), 20)
    blocked_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


def test_joining_and_leaving_again_and_again_leaves_nothing_behind(worker, meeting):
    from dataplanekit import Worker

    aggregator = worker("a", "aggregator", "trainer")
    before = None
    for number in range(12):
        trainer = Worker("t1", "trainer", "aggregator", meeting.seat(), dials=True)
        assert not trainer.channel.await_join(20)
        trainer.channel.send("a", {"x": np.ones(2_000_000, "u1")})
        assert not aggregator.channel.await_join(20)
        assert aggregator.channel.recv("t1", timeout=20)[0]["x"].all()
        trainer.close()
        blocked_until(lambda: not aggregator.channel.has("t1"))
        if number == 3:
            before = len(os.listdir("/proc/self/fd")), threading.active_count()
    blocked_until(lambda: len(os.listdir("/proc/self/fd")) <= before[0])
    assert threading.active_count() <= before[1]


def test_a_send_that_is_not_taken_in_time_cuts_off_only_the_slow_one(worker):
    aggregator = worker("a", "aggregator", "trainer", same_host=False)
    quick, slow = worker("t1", same_host=False), worker("t2", same_host=False, window=1)
    assert aggregator.channel.wait_until(lambda: len(aggregator.channel.all_ends()) == 2, 20)
    # The slow one holds a message and does not read: the second one stays in the socket.
    aggregator.channel.send("t2", {"x": np.ones(1_000_000, "u1")}, timeout=20)
    message = {"x": np.ones(30_000_000, "u1")}
    began = time.monotonic()
    failed = aggregator.channel.broadcast(message, timeout=1.0)
    assert failed == {"t2": "did not take a message in time"}
    assert time.monotonic() - began < 15
    assert quick.channel.recv("a", timeout=20)[0]["x"].all()
    blocked_until(lambda: slow.channel.has("a"))
    assert not aggregator.channel.wait_until(lambda: False, 0)


def test_the_backend_needs_a_rendezvous_and_sound_tls_files(tmp_path, meeting):
    me = Member(end="x", role="r")
    with pytest.raises(BackendError, match="rendezvous"):
        P2pBackend(BackendContext(job="j", key=b"k", me=me))
    for options in ({"tls_cert": "c"}, {"tls_cert": str(tmp_path / "no"), "tls_ca": str(tmp_path / "no")}):
        with pytest.raises(BackendError, match="TLS"):
            P2pBackend(BackendContext(job="j", key=b"k", me=me, rendezvous=meeting.seat(), options=options))
    with pytest.raises(BackendError, match="cannot listen"):
        P2pBackend(BackendContext(job="j", key=b"k", me=me, rendezvous=meeting.seat(), options={"bind": "203.0.113.7"}))


def test_with_tls_a_plain_worker_is_turned_away(worker, tls):
    aggregator = worker("a", "aggregator", "trainer", **tls)
    plain = worker("t1", same_host=False)
    secure = worker("t2", **tls)
    assert not secure.channel.await_join(20)
    assert plain.channel.await_join(0.2)
    assert aggregator.channel.all_ends() == ["t2"]


def test_with_tls_whoever_shows_no_certificate_of_the_authority_is_turned_away(worker, tls, tmp_path):
    """Though they know the job's key, and on either side: neither do they get in, nor does anybody talk to them."""
    theirs = authority(tmp_path)
    impostor = worker("a", "aggregator", "trainer", **theirs)
    trainer = worker("t1", **tls)
    assert trainer.channel.await_join(1)
    assert not trainer.channel.all_ends()
    assert not impostor.channel.all_ends()
    blocked_until(lambda: impostor.backend.turned_away)

    aggregator = worker("b", "aggregator", "trainer", **tls)
    stranger = worker("t2", **theirs)
    met(aggregator, trainer)
    blocked_until(lambda: aggregator.backend.turned_away)
    assert aggregator.channel.all_ends() == ["t1"]
    assert "b" not in stranger.channel.all_ends()

    before = aggregator.backend.turned_away
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(tls["tls_ca"])
    hello = p2p_handshake.Hello("job", "c", "default", "t3", "trainer", 1, True, "b", b"")
    place = ("127.0.0.1", aggregator.tcp_port())
    with (
        socket.create_connection(place, timeout=20) as plain,
        bare.wrap_socket(plain) as connection,
        contextlib.suppress(ssl.SSLError, ConnectionError),  # the alert that it wants a certificate, or just the end
    ):
        connection.sendall(next(p2p_handshake.dial(KEY, hello))[0])
        assert connection.recv(1) == b""
    blocked_until(lambda: aggregator.backend.turned_away > before)


def test_a_peer_that_is_not_there_yet_is_tried_again(worker, meeting, monkeypatch):
    monkeypatch.setattr(p2p_peer, "BACKOFF_SECONDS", (0.01, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ghost = Member(end="a", role="aggregator", addresses=[f"tcp://127.0.0.1:{port}"])
    trainer = worker("t1", same_host=False)
    trainer.backend.loop.call(trainer.room.update, [ghost], [])
    assert trainer.channel.await_join(0.2)
    worker("a", "aggregator", "trainer", same_host=False, port=port)
    assert not trainer.channel.await_join(20)


def test_a_peer_is_found_by_its_name_too(worker):
    aggregator = worker("a", "aggregator", "trainer", same_host=False, host="localhost")
    assert aggregator.backend.me.addresses[0].startswith("tcp://localhost:")
    assert not worker("t1", same_host=False).channel.await_join(20)


def test_one_who_leaves_by_the_rendezvous_alone_is_let_go(worker, monkeypatch):
    monkeypatch.setattr(p2p_peer, "FAREWELL_SECONDS", 0.05)
    aggregator, trainer = pair(worker)
    aggregator.backend.loop.call(aggregator.room.update, [], ["t1"])
    # t1 dials again, since to its knowledge the aggregator is there, and is let in: it knows the key.
    assert aggregator.channel.wait_until(lambda: not aggregator.channel.has("t1"), 20)
    assert trainer.channel.has("a") or not trainer.channel.await_join(20)
