"""The protocol between workers, without a broker: whatever the network loses, repeats or delays, each message
arrives once and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from flame.sdk.backends import mqtt_send
from flame.sdk.backends.mqtt_receive import CHUNKS_LEAST, Intake
from flame.sdk.backends.mqtt_send import Outbox, Sending
from flame.sdk.backends.mqtt_wire import Ack, Chunk, Offer, Said, Small, Status

CHUNK = 8
SENDER, EPOCH = "agg", 7


class Receiver:
    """A receiver, the queue that the broker keeps for it, and what it has been given."""

    def __init__(self, net: Network, end: str, epoch: int, window: int = 1 << 30) -> None:
        self.net = net
        self.end = end
        self.epoch = epoch
        self.queue: deque[tuple[Said, bytes]] = deque()
        self.got: list[bytes] = []
        self.unreleased: list[int] = []
        self.topics: set[str] = set()
        self.intake = Intake(end, epoch, window=window, put=self.put, deliver=self.deliver, subscribe=self.subscribe)
        self.intake.meet(SENDER, EPOCH)

    def put(self, topic: str, end: str, said: Said, body: Sequence[memoryview]) -> None:
        assert (topic, end) == ("", SENDER)
        self.net.back.append((self.end, said))

    def deliver(self, end: str, data: memoryview | bytes) -> None:
        assert end == SENDER
        self.got.append(bytes(data))
        self.unreleased.append(len(data))

    def subscribe(self, end: str, topic: str) -> None:
        self.topics.add(topic)
        self.intake.subscribed(end, topic)

    def step(self) -> None:
        said, body = self.queue.popleft()
        if isinstance(said, Small):
            self.intake.on_small(said, memoryview(body))
        elif isinstance(said, Chunk):
            self.intake.on_chunk(said, memoryview(body))
        elif isinstance(said, Offer):
            self.intake.on_offer(said)

    def release(self) -> None:
        if self.unreleased:
            self.intake.released(self.unreleased.pop(0))


class Network:
    """A sender, receivers, and a broker between them that does what a test says."""

    def __init__(self, ends: Sequence[str], window: int = 1 << 30) -> None:
        self.now = 0.0
        self.back: deque[tuple[str, Said]] = deque()
        self.published: list[tuple[str, str, Said]] = []
        self.outbox = Outbox(SENDER, EPOCH, self.put)
        self.receivers = {end: Receiver(self, end, 100 + i, window) for i, end in enumerate(ends)}
        for end, receiver in self.receivers.items():
            self.outbox.meet(end, receiver.epoch)
        self.sendings: list[Sending] = []
        self.chunk = CHUNK

    def put(self, topic: str, end: str, said: Said, body: Sequence[memoryview]) -> None:
        self.published.append((topic, end, said))
        joined = b"".join(body)
        for receiver in self.receivers.values():
            if receiver.end == end or (topic and topic in receiver.topics):
                receiver.queue.append((said, joined))

    def send(self, data: bytes, ends: Sequence[str] | None = None) -> Sending:
        sending = Sending([memoryview(data)], self.chunk, len(data) <= self.chunk, lambda: None)
        self.sendings.append(sending)
        self.outbox.submit(sending, list(self.receivers if ends is None else ends), self.now)
        return sending

    def pump(self, room: int = 1000) -> None:
        self.outbox.pump(self.now, room)

    def answer(self) -> None:
        end, said = self.back.popleft()
        if isinstance(said, Ack):
            self.outbox.on_ack(end, said, self.now)
        elif isinstance(said, Status):
            self.outbox.on_status(end, said, self.now)

    def flow(self, release: bool = True) -> None:
        """Deliver all that is on its way, without the clock moving."""
        while True:
            self.pump()
            if not self.back and not any(each.queue for each in self.receivers.values()):
                return
            while self.back:
                self.answer()
            for receiver in self.receivers.values():
                if receiver.queue:
                    receiver.step()
                if release:
                    receiver.release()

    def settle(self) -> None:
        """Let time pass and everything flow until all is delivered."""
        for _ in range(200):
            self.flow()
            if self.outbox.idle:
                return
            self.now = max(self.now, self.outbox.deadline() or self.now)
        raise AssertionError("it never ends")

    def lose_everything(self) -> None:
        """The broker was killed and has forgotten."""
        self.back.clear()
        for receiver in self.receivers.values():
            receiver.queue.clear()


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, int, int]]]:
    ends = [f"t{i}" for i in range(draw(st.integers(1, 4)))]
    names = [
        "send",
        "pump",
        "step",
        "drop",
        "repeat",
        "answer",
        "lose answer",
        "wait",
        "restart",
        "release",
        "swap",
        "smaller",
    ]
    step = st.tuples(st.sampled_from(names), st.integers(0, 3), st.integers(0, 300))
    return ends, draw(st.lists(step, max_size=80))


@given(histories(), st.sampled_from([20, 1 << 30]))
@settings(max_examples=250, deadline=None)
def test_every_message_arrives_once_and_in_order(
    history: tuple[list[str], list[tuple[str, int, int]]], window: int
) -> None:
    ends, steps = history
    net = Network(ends, window)
    sent: dict[str, list[bytes]] = {end: [] for end in ends}
    for number, (what, which, amount) in enumerate(steps):
        end = ends[which % len(ends)]
        receiver = net.receivers[end]
        if what == "send":
            data = bytes([number % 256]) * (amount + 1)
            chosen = ends if amount % 3 else ends[: which % len(ends) + 1]
            net.send(data, chosen)
            for each in chosen:
                sent[each].append(data)
        elif what == "pump":
            net.pump(amount % 20)
        elif what == "step" and receiver.queue:
            receiver.step()
        elif what == "drop" and receiver.queue:
            receiver.queue.popleft()
        elif what == "repeat" and receiver.queue:
            receiver.queue.append(receiver.queue[0])
        elif what == "swap":
            receiver.queue.rotate(1)
        elif what == "answer" and net.back:
            net.answer()
        elif what == "lose answer" and net.back:
            net.back.popleft()
        elif what == "wait":
            net.now += amount / 100
        elif what == "restart":
            net.lose_everything()
            net.outbox.reconnected(net.now)
        elif what == "release":
            receiver.release()
        elif what == "smaller":
            net.chunk = 3
            net.outbox.cut_smaller(3, net.now)
    net.settle()
    for end in ends:
        assert net.receivers[end].got == sent[end]
    assert all(not sending.failures for sending in net.sendings)


@given(st.lists(st.binary(min_size=0, max_size=30), min_size=1, max_size=6), st.integers(1, 40))
def test_pieces_are_the_message(parts: list[bytes], chunk: int) -> None:
    sending = Sending([memoryview(part) for part in parts], chunk, False, lambda: None)
    joined = b"".join(parts)
    pieces = [b"".join(sending.piece(index)) for index in range(sending.count)]
    assert b"".join(pieces) == joined
    assert all(len(piece) == chunk for piece in pieces[:-1])


def test_a_broadcast_publishes_each_chunk_once() -> None:
    net = Network(["a", "b", "c"])
    net.send(bytes(range(100)))
    net.settle()
    chunks = [said.index for _, _, said in net.published if isinstance(said, Chunk)]
    assert chunks == list(range(13))
    assert all(receiver.got == [bytes(range(100))] for receiver in net.receivers.values())


def test_a_slow_end_does_not_hold_up_the_others() -> None:
    net = Network(["a", "b", "slow"])
    data = bytes(CHUNK * 200)
    sending = net.send(data)
    stuck = net.receivers["slow"]
    for _ in range(2000):
        net.pump()
        while net.back:
            net.answer()
        for end in ("a", "b"):
            if net.receivers[end].queue:
                net.receivers[end].step()
        if not stuck.topics and stuck.queue:
            stuck.step()  # it hears of the message, and stops then
        net.now += 0.01
    assert net.receivers["a"].got == net.receivers["b"].got == [data]
    assert stuck.got == []
    assert list(sending.deliveries) == ["slow"]
    assert len(stuck.queue) < 60, "what waits for it at the broker is bounded"
    net.settle()
    assert stuck.got == [data]


def test_an_end_that_leaves_is_reported_and_not_waited_for() -> None:
    net = Network(["a", "b"])
    sending = net.send(bytes(1000))
    net.pump()
    net.outbox.part("b", "closed")
    net.receivers.pop("b")
    net.settle()
    assert sending.failures == {"b": "closed"}
    assert net.receivers["a"].got == [bytes(1000)]
    assert net.send(b"x", ["b", "nobody"]).failures == {"b": "is not there", "nobody": "is not there"}


def test_a_new_life_of_an_end_begins_afresh() -> None:
    net = Network(["a"])
    net.send(b"one")
    net.settle()
    lost = net.send(bytes(100))
    net.pump()
    net.receivers["a"] = again = Receiver(net, "a", 999)
    net.outbox.meet("a", 999)
    assert lost.failures == {"a": "was started anew"}
    net.send(b"two")
    net.send(bytes(200))
    net.settle()
    assert again.got == [b"two", bytes(200)]


def test_what_is_given_up_is_passed_over() -> None:
    net = Network(["a"])
    net.send(b"one")
    given_up = net.send(bytes(400))
    net.pump()
    net.receivers["a"].queue.clear()
    net.outbox.cancel(given_up, "too slow")
    net.send(b"two")
    net.settle()
    assert net.receivers["a"].got == [b"one", b"two"]
    assert given_up.failures == {"a": "too slow"}


def test_a_message_is_let_in_when_there_is_room() -> None:
    net = Network(["a"], window=100)
    receiver = net.receivers["a"]
    for _ in range(3):
        net.send(bytes(80))
    net.flow(release=False)
    assert len(receiver.got) == 1
    receiver.release()
    net.flow(release=False)
    assert len(receiver.got) == 2
    receiver.intake.want(["a", SENDER])
    net.flow(release=False)
    assert len(receiver.got) == 3


def test_lost_chunks_shorten_what_is_on_its_way() -> None:
    net = Network(["a"])
    receiver = net.receivers["a"]
    net.send(bytes(CHUNK * 400))
    most = []
    for _ in range(3000):
        net.pump()
        while net.back:
            net.answer()
        while len(receiver.queue) > 4:  # a broker with a short queue
            receiver.queue.pop()
        for _ in range(2):
            if receiver.queue:
                receiver.step()
        if net.outbox.idle:
            break
        if not receiver.queue:
            net.now += 0.5
        most.append(len(receiver.queue))
    assert receiver.got == [bytes(CHUNK * 400)]
    assert receiver.intake._chunks < mqtt_send.EAGER
    assert receiver.intake._chunks >= CHUNKS_LEAST


def test_an_impossible_message_is_refused_and_reported() -> None:
    net = Network(["a"])
    sending = Sending([memoryview(bytes(100))], CHUNK, False, lambda: None)
    sending.nbytes = 1 << 62
    net.outbox.submit(sending, ["a"], net.now)
    net.settle()
    assert "cannot take a message" in sending.failures["a"]
