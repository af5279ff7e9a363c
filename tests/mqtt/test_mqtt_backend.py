"""The mqtt backend on a real Mosquitto: presence, order, credentials, limits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mqttkit import KEY, Ears, Mosquitto, Workers, frames, free_port, send

from flame.errors import BackendError, MissingExtra
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.mqtt import MqttBackend
from flame.sdk.backends.mqtt_wire import Epoch, Presence, Seal, Topics, presence_topic, quote


def payload(size: int, seed: int = 0) -> bytes:
    return (seed.to_bytes(8, "big") + os.urandom(56)) * (size // 64)


def test_members_see_each_other_and_who_leaves(workers: Workers) -> None:
    one, ears = workers.join("one")
    two, others = workers.join("two")
    three, _ = workers.join("three")
    ears.sees("two", "three")
    others.sees("one", "three")
    assert ears.members["two"] == Member(end="two", role="trainer")
    two.leave("param", "default")
    ears.sees("three")
    three.close()
    ears.sees()
    assert ears.left == [("two", "left the channel"), ("three", "left the channel")]
    assert one.send("param", "default", ["two"], frames(b"x"), 1) == {"two": "is not there"}


def test_jobs_channels_and_groups_are_apart(workers: Workers) -> None:
    _, ears = workers.join("one")
    workers.join("two", job="other")
    far = Ears()
    workers.make("three").join("param", "west", far)
    workers.make("four").join("global", "default", far)
    workers.join("five")
    ears.sees("five")
    assert far.members == {}


def test_a_model_reaches_four_receivers(workers: Workers) -> None:
    model = payload(100 << 20)
    aggregator, ears = workers.join("agg")
    trainers = {f"t{i}": workers.join(f"t{i}") for i in range(4)}
    ears.sees(*trainers)
    assert send(aggregator, list(trainers), model) == {}
    for _, heard in trainers.values():
        end, data = heard.take()
        assert end == "agg"
        assert data[16:] == model


def test_several_send_to_one(workers: Workers) -> None:
    _, ears = workers.join("agg")
    trainers = {f"t{i}": workers.join(f"t{i}")[0] for i in range(4)}
    ears.sees(*trainers)
    models = {end: payload(8 << 20, seed) for seed, end in enumerate(trainers)}
    threads = [threading.Thread(target=send, args=(trainers[end], ["agg"], models[end])) for end in trainers]
    for _, heard in [(t, t.start()) for t in threads]:
        assert heard is None
    got = dict(ears.take() for _ in trainers)
    for thread in threads:
        thread.join()
    assert {end: bytes(data[16:]) for end, data in got.items()} == models


def test_messages_of_a_sender_stay_in_order(workers: Workers) -> None:
    sender, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    sizes = [10, 70_000, 100, 300_000, 0, 5, 65_000, 1_000_000] * 12
    for number, size in enumerate(sizes):
        assert send(sender, ["two"], number.to_bytes(4, "big") + bytes(size)) == {}
    got = [heard.take()[1] for _ in sizes]
    assert [int.from_bytes(data[16:20], "big") for data in got] == list(range(len(sizes)))
    assert [len(data) - 20 for data in got] == sizes


def test_what_was_sent_is_delivered_before_the_end_leaves(workers: Workers) -> None:
    sender, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    for number in range(40):
        send(sender, ["two"], bytes([number]))
    sender.close()
    heard.sees()
    assert [data[16] for _, data, _ in heard.frames] == list(range(40))


def test_a_receiver_that_does_not_consume_holds_its_sender_back(workers: Workers) -> None:
    sender, ears = workers.join("one")
    receiver, heard = workers.join("two", ears=Ears(window=1 << 20, hold=True))
    ears.sees("two")
    assert send(sender, ["two"], payload(4 << 20)) == {}
    assert send(sender, ["two"], payload(2 << 20), timeout=1.0) == {"two": "did not take the message within 1 s"}
    result: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: result.append(send(sender, ["two"], payload(3 << 20))))
    thread.start()
    receiver.want("param", "default", ["one"])
    heard.wait(lambda ears: len(ears.frames) == 2)
    thread.join()
    assert result == [{}]
    for _, _, release in heard.frames:
        assert release is not None
        release()
    assert send(sender, ["two"], payload(5 << 20)) == {}
    assert [len(data) >> 20 for _, data, _ in heard.frames] == [4, 3, 5]


def test_a_restarted_worker_with_a_higher_attempt_takes_over(workers: Workers) -> None:
    one, ears = workers.join("one")
    old, old_ears = workers.join("two")
    ears.sees("two")
    new, new_ears = workers.join("two", attempt=2)
    ears.wait(lambda ears: "two" in ears.members and ears.members["two"].attempt == 2)
    old_ears.wait(lambda ears: bool(ears.left))
    assert "replaced by another start" in old_ears.left[0][1]
    assert "replaced" in old.send("param", "default", ["one"], frames(b"stale"), 1)["one"]
    with pytest.raises(BackendError, match="replaced by another start"):
        old.join("other", "default", Ears())
    old.close()
    send(one, ["two"], b"for the new one")
    assert bytes(new_ears.take()[1][16:]) == b"for the new one"
    send(new, ["one"], b"and back")
    assert bytes(ears.take()[1][16:]) == b"and back"
    _, late = workers.join("late")
    late.sees("one", "two")


def test_a_worker_started_again_by_hand_takes_over(workers: Workers) -> None:
    """Both are attempt 1; the broker ends the older connection."""
    one, ears = workers.join("one")
    _, old_ears = workers.join("two")
    ears.sees("two")
    _, new_ears = workers.join("two")
    old_ears.wait(lambda ears: bool(ears.left))
    new_ears.sees("one")
    ears.sees("two")
    ears.wait(lambda ears: len(ears.joins) >= 2)
    assert send(one, ["two"], payload(1 << 20)) == {}
    assert len(new_ears.take()[1]) == (1 << 20) + 16
    assert not old_ears.frames


def test_a_killed_worker_is_reported_by_its_will(workers: Workers, broker: Mosquitto) -> None:
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from mqttkit import Workers
Workers(sys.argv[2]).join("two")
print("there", flush=True)
sys.stdin.read()
"""
    _, ears = workers.join("one")
    command = [sys.executable, "-c", program, str(Path(__file__).parent), broker.address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            ears.sees("two")
        finally:
            process.kill()
            process.wait()
        ears.sees(seconds=20)
    assert ears.left == [("two", "lost its connection to the broker")]
    _, late = workers.join("late")
    late.sees("one")


def test_strangers_are_ignored(workers: Workers, broker: Mosquitto) -> None:
    """Whoever can publish at the broker, and even knows the job's id and the form of messages, gets nothing in."""
    import paho.mqtt.client as paho

    sender, ears = workers.join("one")
    _, heard = workers.join("two")
    spy = Ears()
    workers.join("stranger", ears=spy, key=b"another key")
    ears.sees("two")
    topics = Topics("job", "param", "default")
    captured: list[tuple[str, bytes]] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    heard_it = threading.Event()

    def listen(client: object, data: object, message: paho.MQTTMessage) -> None:
        captured.append((message.topic, message.payload))
        if message.topic == topics.inbox("two"):
            heard_it.set()

    subscribed = threading.Event()
    client.on_subscribe = lambda *args: subscribed.set()
    client.on_message = listen
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.subscribe("flame/#")
    assert subscribed.wait(20)
    send(sender, ["two"], b"genuine")
    heard.take()
    assert heard_it.wait(20)
    presence = next(said for topic, said in captured if topic == presence_topic("job", "two"))
    opened = Seal(KEY).open(presence_topic("job", "two"), presence)
    assert opened is not None
    forged = Seal(b"guess").seal(presence_topic("job", "ghost"), opened[0])
    for topic, body in [
        *captured,
        (topics.inbox("two"), b""),
        (topics.inbox("two"), os.urandom(500)),
        (topics.inbox("two"), captured[-1][1][:-1]),
        (topics.inbox("one"), next(data for name, data in captured if name == topics.inbox("two"))),
        (presence_topic("job", "ghost"), forged),
        (presence_topic("job", "ghost"), presence),
        (presence_topic("job", "two"), b""),
        (presence_topic("job", "two"), b"\xff" * 40),
    ]:
        client.publish(topic, body, 1).wait_for_publish(20)
    client.disconnect()
    client.loop_stop()
    send(sender, ["two"], b"after")
    assert bytes(heard.take()[1][16:]) == b"after"
    assert not heard.frames
    assert set(ears.members) == {"two"}
    assert set(heard.members) == {"one"}
    assert spy.members == {}


@pytest.mark.parametrize(
    "limits",
    [
        "max_packet_size 20000",
        "max_queued_messages 4\nmax_inflight_messages 2",
        "max_inflight_messages 1",
        "message_size_limit 300000",
        "message_size_limit 100000",  # which the broker does not announce
        "memory_limit 200000000",
    ],
)
def test_tight_limits_of_the_broker_are_kept(tmp_path: Path, limits: str) -> None:
    broker = Mosquitto(tmp_path, limits)
    workers = Workers(broker.address)
    try:
        sender, ears = workers.join("one")
        receivers = {end: workers.join(end)[1] for end in ("two", "three")}
        ears.sees("two", "three")
        model = payload(3 << 20)
        for _ in range(2):
            assert send(sender, ["two", "three"], model) == {}
        for number in range(30):
            send(sender, ["two", "three"], bytes([number]))
        for heard in receivers.values():
            got = [bytes(heard.take()[1][16:]) for _ in range(32)]
            assert got == [model, model, *(bytes([number]) for number in range(30))]
    finally:
        workers.close()
        broker.kill()


def test_sets_of_receivers_may_change_each_round(workers: Workers) -> None:
    sender, ears = workers.join("agg")
    trainers = {f"t{i}": workers.join(f"t{i}")[1] for i in range(4)}
    ears.sees(*trainers)
    wanted: dict[str, list[int]] = {end: [] for end in trainers}
    for number in range(1, 16):
        chosen = [end for i, end in enumerate(trainers) if number >> i & 1]
        assert send(sender, chosen, payload(1 << 20, number)) == {}
        for end in chosen:
            wanted[end].append(number)
    for end, numbers in wanted.items():
        got = [int.from_bytes(trainers[end].take()[1][16:24], "big") for _ in numbers]
        assert got == numbers


def test_nothing_is_left_at_the_broker(workers: Workers, broker: Mosquitto) -> None:
    import paho.mqtt.client as paho

    _, ears = workers.join("one")
    _, heard = workers.join("two")
    ears.sees("two")
    heard.sees("one")
    workers.close()
    seen: list[str] = []
    done = threading.Event()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.on_message = lambda client, data, message: (
        done.set() if message.topic == "done" else seen.append(message.topic)
    )
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.subscribe([("flame/#", paho.SubscribeOptions(qos=1)), ("done", paho.SubscribeOptions(qos=1))])
    client.publish("done", b"", 1)
    assert done.wait(20)
    client.disconnect()
    client.loop_stop()
    assert seen == []


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test ca",
        "-keyout", "ca.key", "-out", "ca.pem",
    )  # fmt: skip
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
        openssl(
            "x509", "-req", "-in", "csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "ext", "-out", f"{name}.pem",
        )  # fmt: skip
    return folder


def test_tls_and_password(tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "flame", "secret"], check=True, capture_output=True)
    broker = Mosquitto(
        tmp_path,
        f"allow_anonymous false\npassword_file {passwords}",
        f"cafile {certificates}/ca.pem\ncertfile {certificates}/server.pem\nkeyfile {certificates}/server.key\n"
        "require_certificate true",
    )
    workers = Workers(broker.address)
    try:
        monkeypatch.setenv("FLAME_MQTT_CA", str(certificates / "ca.pem"))
        monkeypatch.setenv("FLAME_MQTT_CERT", str(certificates / "client.pem"))
        monkeypatch.setenv("FLAME_MQTT_KEY", str(certificates / "client.key"))
        monkeypatch.setenv("FLAME_MQTT_USERNAME", "flame")
        monkeypatch.setenv("FLAME_MQTT_PASSWORD", "secret")
        sender, ears = workers.join("one")
        _, heard = workers.join("two")
        ears.sees("two")
        assert send(sender, ["two"], payload(4 << 20)) == {}
        assert len(heard.take()[1]) == (4 << 20) + 16
        monkeypatch.setenv("FLAME_MQTT_PASSWORD", "wrong")
        with pytest.raises(BackendError, match=r"refuses this worker: Not authorized.*FLAME_MQTT_PASSWORD"):
            workers.join("three")
        monkeypatch.setenv("FLAME_MQTT_CA", str(tmp_path / "nowhere.pem"))
        with pytest.raises(BackendError, match=r"nowhere\.pem"):
            workers.join("four")
    finally:
        workers.close()
        broker.kill()


def test_a_channel_that_the_access_list_forbids_is_an_error(tmp_path: Path) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite flame/job/param/#\ntopic read flame/job/presence/+\n")
    broker = Mosquitto(tmp_path, f"acl_file {rules}")
    workers = Workers(broker.address)
    try:
        with pytest.raises(BackendError, match=r"does not let this worker use channel param: .*[Nn]ot authori[sz]ed"):
            workers.join("one")
    finally:
        workers.close()
        broker.kill()


def test_a_broker_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame.sdk.backends.mqtt_client.CONNECT_SECONDS", 1.0)
    port = free_port()
    workers = Workers(f"127.0.0.1:{port}")
    with pytest.raises(BackendError, match=f"127.0.0.1:{port} cannot be reached.*brokers"):
        workers.join("one")
    workers.close()


def test_without_a_broker_in_the_configuration_it_says_so() -> None:
    me = Member(end="one", role="trainer")
    with pytest.raises(BackendError, match=r"add \{sort: mqtt, host: HOST:PORT\} to brokers"):
        MqttBackend(BackendContext(job="job", key=KEY, me=me))


def test_without_paho_it_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    with pytest.raises(MissingExtra, match=r"flame\[mqtt\]"):
        Workers("127.0.0.1:1").join("one")


def test_importing_the_backend_does_not_import_paho() -> None:
    code = "import sys, flame.sdk.backends.mqtt; sys.exit(any(name.startswith('paho') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a/b", "+", "#", "$SYS", "ü", "", "a b", "%2F", "x" * 200])
def test_any_name_is_one_level_of_a_topic(name: str) -> None:
    assert not set(quote(name)) & set("+#/\0")
    assert quote(name)
    assert len({quote(each) for each in (name, name + "/", name + "%2F", name + "+")}) == 4


def test_a_payload_cannot_be_moved_to_another_topic() -> None:
    seal = Seal(KEY)
    said = Presence(Member(end="one", role="r"), Epoch(1, 2, 3), 1, 1, [])
    sealed = seal.seal("a", said, [b"body"])
    opened = seal.open("a", sealed)
    assert opened is not None
    assert (opened[0], bytes(opened[1])) == (said, b"body")
    assert seal.open("b", sealed) is None
    assert Seal(b"other").open("a", sealed) is None
    for place in range(len(sealed)):
        assert seal.open("a", sealed[:place]) is None
        changed = bytearray(sealed)
        changed[place] ^= 1
        assert seal.open("a", bytes(changed)) is None
