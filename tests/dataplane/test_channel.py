"""Channels, over the inproc backend."""

from __future__ import annotations

import enum
import threading
import time

import numpy as np
import pytest

from flame.errors import ChannelError, DeadlineExceeded, EndLeft
from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.inproc import InprocBackend
from flame.sdk.channel import Channel


class Kind(enum.Enum):
    WEIGHTS = 1
    ROUND = 4


@pytest.fixture
def make(request):
    """Makes joined channels; all are left at the end."""
    made = []

    def make(end, role="trainer", other="aggregator", attempt=1, group="default", **settings):
        me = Member(end=end, role=role, attempt=attempt)
        backend = InprocBackend(BackendContext(job=request.node.name, key=b"k", me=me))
        channel = Channel("param", backend=backend, job="job", me=me, other_role=other, group=group, **settings)
        channel.join()
        made.append(channel)
        return channel

    yield make
    for channel in made:
        channel.leave()


@pytest.fixture
def pair(make):
    return make("a", "aggregator", "trainer"), make("t1")


def test_a_message_arrives_with_its_tensors(pair):
    aggregator, trainer = pair
    trainer.set_property("round", 3)
    trainer.send("a", {Kind.WEIGHTS: {"w": np.arange(4.0)}, Kind.ROUND: 3}, kind="update", metadata={"loss": 0.5})
    message, when = aggregator.recv("t1", timeout=5)
    assert Kind.WEIGHTS in message
    assert message[Kind.ROUND] == message["round"] == 3
    assert (message["weights"]["w"] == np.arange(4.0)).all()
    assert (message.sender, message.round, message.kind, message.metadata) == ("t1", 3, "update", {"loss": 0.5})
    assert abs(when.timestamp() - time.time()) < 60


def test_only_the_other_role_and_the_own_group_are_ends(make):
    aggregator = make("a", "aggregator", "trainer", group="west")
    make("t1", group="west")
    make("t2", group="east")
    assert aggregator.all_ends() == ["t1"]
    assert make("t3", group="west").all_ends() == ["a"]


def test_a_role_linked_with_itself_meets_its_peers_but_not_itself(make):
    first, second = make("t1", other="trainer"), make("t2", other="trainer")
    assert (first.all_ends(), second.all_ends()) == (["t2"], ["t1"])
    assert first.ends_digest() == second.ends_digest() != ""


def test_messages_come_in_the_order_in_which_they_arrive(make):
    aggregator = make("a", "aggregator", "trainer")
    trainers = [make(f"t{i}") for i in range(5)]
    for trainer in (trainers[i] for i in (3, 0, 4, 1, 2)):
        trainer.send("a", {"from": trainer.get_backend_id()})
    got = [(message["from"], end) for message, (end, _) in aggregator.recv_fifo(aggregator.ends(), timeout=5)]
    assert got == [(f"t{i}", f"t{i}") for i in (3, 0, 4, 1, 2)]


def test_messages_that_arrive_while_waiting_come_in_order_too(make):
    aggregator = make("a", "aggregator", "trainer")
    trainers = [make(f"t{i}") for i in range(4)]
    stream = aggregator.recv_fifo(aggregator.ends(), timeout=20)
    for i in (2, 0, 3, 1):
        threading.Thread(target=trainers[i].send, args=("a", {"i": i})).start()
        assert next(stream)[0]["i"] == i


def test_first_k_leaves_the_others_for_later(make):
    aggregator = make("a", "aggregator", "trainer")
    for i in range(3):
        make(f"t{i}").send("a", {"i": i})
    first = [end for _, (end, _) in aggregator.recv_fifo(aggregator.ends(), first_k=2, timeout=5)]
    assert first == ["t0", "t1"]
    assert not aggregator.is_rxq_empty("t2")
    assert aggregator.recv("t2", timeout=5)[0]["i"] == 2


def test_one_message_of_each_end_is_taken_in_a_round(pair):
    aggregator, trainer = pair
    for i in range(3):
        trainer.send("a", {"i": i})
    assert [m["i"] for m, _ in aggregator.recv_fifo(["t1"], timeout=5)] == [0]
    assert [aggregator.recv("t1", timeout=5)[0]["i"] for _ in range(2)] == [1, 2]


def test_an_end_that_leaves_is_reported_not_waited_for(make):
    aggregator = make("a", "aggregator", "trainer")
    stays, leaves = make("t1"), make("t2")
    leaves.send("a", {"i": 2})
    leaves.leave()
    got = {}
    stream = aggregator.recv_fifo(["t1", "t2", "nobody"], timeout=20)
    for _ in range(2):
        message, (end, _) = next(stream)
        got[end] = message
    # What it sent before leaving still counts.
    assert got["t2"]["i"] == 2
    assert got["nobody"] is None
    threading.Thread(target=stays.leave).start()
    assert next(stream)[:1] == (None,)
    assert aggregator.recv("t1", timeout=20) is not None
    assert aggregator.empty()


def test_sending_to_an_end_that_left_says_so(pair):
    aggregator, trainer = pair
    trainer.leave()
    with pytest.raises(EndLeft, match="t1 is not there on channel param: it left the channel") as caught:
        aggregator.send("t1", {"x": 1})
    assert caught.value.end == "t1"
    assert aggregator.broadcast({"x": 1}, ["t1", "t9"]) == {"t1": "left the channel", "t9": "is not there"}


def test_a_wait_ends_at_its_deadline_and_names_who_is_missing(pair):
    aggregator, _ = pair
    with pytest.raises(DeadlineExceeded, match=r"from t1 within 0\.01 s"):
        aggregator.recv("t1", timeout=0.01)
    # Nobody is registered as waiting any more: the next message is not lost.
    pair[1].send("a", {"x": 1})
    assert aggregator.recv("t1", timeout=5)[0]["x"] == 1


def test_await_join_says_whether_the_time_ran_out(make):
    aggregator = make("a", "aggregator", "trainer")
    assert aggregator.await_join(timeout=0.01) is True
    threading.Thread(target=make, args=("t1",)).start()
    assert aggregator.await_join(timeout=20) is False
    assert aggregator.wait_until(lambda: aggregator.has("t1"), timeout=20)


def test_an_end_that_comes_back_is_an_end_again(make):
    aggregator = make("a", "aggregator", "trainer")
    make("t1").leave()
    again = make("t1", attempt=2)
    assert aggregator.member("t1").attempt == 2
    aggregator.broadcast({"x": 1})
    assert again.recv("a", timeout=5)[0]["x"] == 1


def test_who_has_come_anew_since_it_was_asked_has_left_to_whoever_waits_for_its_answer(make):
    aggregator = make("a", "aggregator", "trainer")
    one, other = make("t1"), make("t2")
    asked = aggregator.visits()
    one.send("a", {"x": 1})
    for trainer in (one, other):
        trainer.leave()
        trainer.join()
    assert aggregator.recv("t1", 5, asked)[0]["x"] == 1  # it came before the break
    assert aggregator.recv("t1", 5, asked)[0] is None
    assert [end for _, (end, _) in aggregator.recv_fifo(["t2"], timeout=5, visits=asked)] == ["t2"]
    with pytest.raises(DeadlineExceeded):
        aggregator.recv("t2", 0.01, aggregator.visits())


def test_peek_leaves_the_message_and_drain_drops_it(pair):
    aggregator, trainer = pair
    assert aggregator.peek("t1") == (None, None)
    trainer.send("a", {"x": 1})
    trainer.send("a", {"x": 2})
    assert aggregator.peek("t1")[0]["x"] == aggregator.peek("t1")[0]["x"] == 1
    assert aggregator.recv("t1", timeout=5)[0]["x"] == 1
    assert aggregator.drain() == 1
    assert aggregator.is_rxq_empty("t1")


def test_a_selector_chooses_the_ends_and_sees_what_was_noted(make):
    class Odd:
        def select(self, ends, properties):
            assert properties["round"] == 2
            return {e: ("seen", True) for e, end in ends.items() if end.get_property("odd")}

    aggregator = make("a", "aggregator", "trainer", selector=Odd())
    for i in range(4):
        make(f"t{i}")
        aggregator.set_end_property(f"t{i}", "odd", i % 2 == 1)
    aggregator.set_property("round", 2)
    assert aggregator.ends("send") == ["t1", "t3"]
    assert aggregator.properties["state"] == "send"
    assert aggregator.get_end_property("t1", "seen")
    assert aggregator.one_end() == "t1"
    assert len(aggregator.all_ends()) == 4


def test_a_message_that_cannot_be_read_counts_as_none(pair, caplog):
    aggregator, _ = pair
    aggregator._inbox.on_frames("t1", b"garbage" * 10)
    assert aggregator.recv("t1", timeout=5)[0] is None
    assert "cannot be read" in caplog.text


def test_a_channel_that_was_not_joined_cannot_send(make):
    channel = make("t1")
    make("a", "aggregator", "trainer")
    channel.leave()
    with pytest.raises(ChannelError, match="has not joined"):
        channel._inbox.on_join(Member(end="a", role="aggregator"))
        channel.send("a", {})
    with pytest.raises(ChannelError, match="Nobody is there"):
        make("t2", other="nobody").one_end()


def test_the_window_is_free_once_the_arrays_are_dropped(pair):
    aggregator, _ = pair
    from flame.sdk import codec

    frames = codec.encode({"weights": {"w": np.arange(1000.0)}})
    freed = threading.Event()
    aggregator._inbox.on_frames("t1", bytearray(frames.head + b"".join(frames.buffers)), freed.set)
    message, _ = aggregator.recv("t1", timeout=5)
    part = message["weights"]["w"][10:20].reshape(2, 5)
    del message
    assert not freed.is_set()
    assert part[0, 0] == 10.0
    del part
    assert freed.is_set()
