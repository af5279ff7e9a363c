"""The broker is killed and started again in the middle of things: nothing is lost, nothing comes twice."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from mqttkit import Ears, Mosquitto, Workers, send


class Progress:
    """Counts the chunks that arrive, so that a test can act in the middle of a transfer."""

    def __init__(self, worker: object) -> None:
        self.count = 0
        self.changed = threading.Condition()
        client = worker._line._client._paho  # type: ignore[attr-defined]
        inner = client.on_message

        def counted(client: object, data: object, message: object) -> None:
            with self.changed:
                self.count += 1
                self.changed.notify_all()
            inner(client, data, message)

        client.on_message = counted

    def wait(self, more: int) -> None:
        with self.changed:
            goal = self.count + more
            assert self.changed.wait_for(lambda: self.count >= goal, 60)


@pytest.mark.parametrize(("persistence", "size"), [(False, 100 << 20), (True, 40 << 20)], ids=["forgets", "remembers"])
def test_a_model_arrives_although_the_broker_is_killed_twice(tmp_path: Path, persistence: bool, size: int) -> None:
    broker = Mosquitto(tmp_path, persistence=persistence)
    workers = Workers(broker.address)
    try:
        aggregator, ears = workers.join("agg")
        trainers = {f"t{i}": workers.join(f"t{i}") for i in range(4)}
        ears.sees(*trainers)
        progress = Progress(trainers["t0"][0])
        model = os.urandom(1 << 20) * (size >> 20)
        result: list[dict[str, str]] = []
        sending = threading.Thread(target=lambda: result.append(send(aggregator, list(trainers), model)))
        sending.start()
        for _ in range(2):
            progress.wait(40)
            broker.kill()
            assert not result
            broker.start()
        for _, heard in trainers.values():
            end, data = heard.take()
            assert end == "agg"
            assert data[16:] == model
        sending.join()
        assert result == [{}]
        for number, (trainer, _) in enumerate(trainers.values()):
            assert send(trainer, ["agg"], bytes([number])) == {}
        assert sorted(bytes(ears.take()[1][16:]) for _ in trainers) == [b"\0", b"\1", b"\2", b"\3"]
        assert send(aggregator, list(trainers), b"again") == {}
        for _, heard in trainers.values():
            assert bytes(heard.take()[1][16:]) == b"again"
            assert not heard.frames, "nothing came twice"
    finally:
        workers.close()
        broker.kill()


def test_messages_in_both_directions_survive_restarts_in_order(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    workers = Workers(broker.address)
    try:
        one, ears = workers.join("one")
        two, heard = workers.join("two")
        ears.sees("two")
        heard.sees("one")
        sizes = [10, 200_000, 0, 1_000_000] * 25

        def talk(worker: object, to: str) -> None:
            for number, size in enumerate(sizes):
                assert send(worker, [to], number.to_bytes(4, "big") + bytes(size)) == {}  # type: ignore[arg-type]

        threads = [threading.Thread(target=talk, args=each) for each in ((one, "two"), (two, "one"))]
        for thread in threads:
            thread.start()
        for stage in (20, 40, 60):
            heard.wait(lambda ears, stage=stage: len(ears.frames) >= stage)  # type: ignore[misc]
            broker.kill()
            broker.start()
        for thread in threads:
            thread.join()
        for each in (ears, heard):
            each.wait(lambda ears: len(ears.frames) == len(sizes))
            assert [int.from_bytes(data[16:20], "big") for _, data, _ in each.frames] == list(range(len(sizes)))
    finally:
        workers.close()
        broker.kill()


def test_nobody_is_reported_as_left_when_only_the_broker_was_away(workers: Workers, broker: Mosquitto) -> None:
    one, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    broker.kill()
    broker.start()
    assert send(one, ["two"], b"x") == {}
    heard.take()
    _, late = workers.join("three")
    late.sees("one", "two")
    ears.sees("two", "three")
    assert Counter(end for end, _ in ears.left) == {}


@pytest.mark.parametrize("persistence", [False, True], ids=["forgets", "remembers"])
def test_who_dies_while_the_broker_is_away_is_reported(tmp_path: Path, persistence: bool) -> None:
    broker = Mosquitto(tmp_path, persistence=persistence)
    workers = Workers(broker.address, mqtt_lost_seconds=2.0)
    try:
        _, ears = workers.join("one")
        _, heard = workers.join("two")
        dead, _ = workers.join("three")
        ears.sees("two", "three")
        broker.kill()
        dead._line.close()  # type: ignore[union-attr]
        broker.start()
        ears.sees("two")
        heard.sees("one")
        assert ears.left == [("three", "gave no sign of life for 2 s")]
        late = Ears()
        workers.join("four", ears=late)
        late.sees("one", "two")
    finally:
        workers.close()
        broker.kill()


def test_a_worker_may_leave_while_the_broker_is_away(workers: Workers, broker: Mosquitto) -> None:
    one, ears = workers.join("one")
    workers.join("two")
    ears.sees("two")
    broker.kill()
    one.close()
    assert one.send("param", "default", ["two"], None, 1) == {"two": "is not there"}  # type: ignore[arg-type]


def test_a_worker_that_was_out_of_reach_and_its_peers_agree_that_it_was(workers: Workers) -> None:
    """What was on its way is given up on both sides, and both begin anew: nobody waits for what the other has forgotten."""
    one, ears = workers.join("one")
    two, heard = workers.join("two", ears=Ears(window=1, hold=True))
    ears.sees("two")
    heard.sees("one")
    assert send(one, ["two"], bytes(100_000)) == {}
    result: list[dict[str, str]] = []
    blocked = threading.Thread(target=lambda: result.append(send(one, ["two"], bytes(200_000), None)))
    blocked.start()
    client = two._line._client._paho  # type: ignore[union-attr]
    client.reconnect_delay_set(3, 3)  # longer than the broker holds back the will
    client.socket().shutdown(socket.SHUT_RDWR)
    blocked.join(30)
    assert result == [{"two": "lost its connection to the broker"}]
    heard.wait(lambda ears: ears.left == [("one", "lost touch with this worker")])
    heard.sees("one")
    ears.sees("two")
    assert send(two, ["one"], bytes(300_000)) == {}
    assert len(ears.take()[1]) == 300_016
    assert heard.frames[0][2] is not None
    heard.frames[0][2]()
    assert send(one, ["two"], bytes(400_000)) == {}
    assert [len(data) for _, data, _ in heard.frames] == [100_016, 400_016]


def test_a_connection_that_breaks_for_a_moment_is_not_noticed(workers: Workers) -> None:
    one, ears = workers.join("one")
    two, heard = workers.join("two")
    ears.sees("two")
    heard.sees("one")
    for number in range(1, 4):
        two._line._client._paho.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        assert send(one, ["two"], bytes([number]) * 300_000) == {}
        assert heard.take()[1][16] == number
    assert ears.left == heard.left == []
