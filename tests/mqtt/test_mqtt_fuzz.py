"""Topics of the mqtt backend under fire: real payloads, meddled with. ``FLAME_FUZZ_ROUNDS`` says how many (40)."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "dataplane"))

from mqttkit import KEY, Mosquitto, Workers, send
from mutants import mutant

from flame.sdk.backends.mqtt_wire import TAG_BYTES, Seal

ECHO = "flame/echo"
ROUNDS = int(os.environ.get("FLAME_FUZZ_ROUNDS", "40"))


class Spy:
    """A client of the broker that hears everything and can say anything."""

    def __init__(self, broker: Mosquitto) -> None:
        import paho.mqtt.client as paho

        self.heard: list[tuple[str, bytes]] = []
        self._echo = threading.Event()
        subscribed = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = lambda _client, _data, said: self._hear(said.topic, said.payload)
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        self.client.subscribe("flame/#")
        assert subscribed.wait(20)

    def say(self, topic: str, payload: bytes) -> None:
        self.last = self.client.publish(topic, payload, 1)

    def _hear(self, topic: str, payload: bytes) -> None:
        if topic == ECHO:
            self._echo.set()
        else:
            self.heard.append((topic, payload))

    def captured(self) -> list[tuple[str, bytes]]:
        """All that the broker was told until now: it repeats things in the order in which it heard them."""
        self.say(ECHO, b"")
        assert self._echo.wait(20)
        return [(topic, payload) for topic, payload in self.heard if payload]

    def flush(self) -> None:
        self.last.wait_for_publish(20)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def spy(broker: Mosquitto) -> Iterator[Spy]:
    one = Spy(broker)
    yield one
    one.close()


def test_who_may_publish_and_has_no_key_changes_nothing(workers: Workers, spy: Spy) -> None:
    sender, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    heard.sees("one")
    send(sender, ["two"], b"small")
    send(sender, ["two"], os.urandom(200_000))  # goes in chunks, with offers and answers
    heard.take()
    heard.take()
    captured = spy.captured()
    topics, payloads = sorted({topic for topic, _ in captured}), [payload for _, payload in captured]
    chance = random.Random(3)
    for number in range(ROUNDS):
        for _ in range(5):
            spy.say(chance.choice(topics), mutant(chance, payloads))
        if number % 10 == 0:
            spy.flush()
        send(sender, ["two"], f"genuine {number}".encode())
        assert bytes(heard.take()[1][16:]) == f"genuine {number}".encode()
    spy.flush()
    assert not heard.frames
    assert (set(ears.members), set(heard.members)) == ({"two"}, {"one"})
    assert not ears.left
    assert not heard.left


def test_a_worker_that_goes_mad_does_not_take_the_others_down(
    workers: Workers, spy: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds the job's key, so it can pose as any of them; it must not be able to end their threads."""
    sender, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    heard.sees("one")
    send(sender, ["two"], b"small")
    send(sender, ["two"], os.urandom(200_000))
    heard.take()
    heard.take()
    captured = spy.captured()
    topics, payloads = sorted({topic for topic, _ in captured}), [payload[TAG_BYTES:] for _, payload in captured]
    chance, seal = random.Random(5), Seal(KEY)
    before = threading.active_count()
    for _ in range(ROUNDS * 5):
        topic, said = chance.choice(topics), mutant(chance, payloads)
        spy.say(topic, seal._tag(topic, b"", [said]) + said)
    spy.flush()
    # It may well have taken the places of both; who comes now finds each other all the same.
    late, ears_of_late = workers.join("late")
    _, ears_of_last = workers.join("last")
    ears_of_late.wait(lambda ears: "last" in ears.members)
    ears_of_last.wait(lambda ears: "late" in ears.members)
    send(late, ["last"], b"after")
    ears_of_last.wait(lambda ears: any(end == "late" and bytes(data[16:]) == b"after" for end, data, _ in ears.frames))
    assert "Something went wrong" not in caplog.text
    assert threading.active_count() >= before
