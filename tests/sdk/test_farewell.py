"""Everybody hears that the work is done: also who has just lost the connection, and who loses it while being told."""

import threading
import time

import pytest

from flame.sdk.backends.base import BackendContext, Member
from flame.sdk.backends.inproc import InprocBackend
from flame.sdk.channel import Channel
from flame.sdk.mode import farewell
from flame.sdk.mode.farewell import say_done
from flame.sdk.mode.message import MessageType


@pytest.fixture
def pair(request):
    channels = []
    for end, role, other in (("a", "aggregator", "trainer"), ("t", "trainer", "aggregator")):
        me = Member(end=end, role=role)
        backend = InprocBackend(BackendContext(job=request.node.name, key=b"k", me=me))
        channel = Channel("param", backend=backend, job="job", me=me, other_role=other)
        channel.join()
        channels.append(channel)
    yield channels
    for channel in channels:
        channel.leave()


def told(trainer):
    message, _ = trainer.recv("a", 10)
    return message is not None and MessageType.EOT in message


def test_who_has_just_lost_the_connection_is_waited_for(pair):
    aggregator, trainer = pair
    member = aggregator.member("t")
    aggregator._inbox.on_leave("t", "closed the connection")
    assert aggregator.strayed(60) == ["t"]
    saying = threading.Thread(target=say_done, args=[aggregator])
    saying.start()
    assert saying.is_alive()
    aggregator._inbox.on_join(member)
    assert told(trainer)
    saying.join(10)
    assert not saying.is_alive()


def test_who_loses_it_while_being_told_is_told_again(pair, monkeypatch):
    aggregator, trainer = pair
    member, broadcast, tries = aggregator.member("t"), aggregator.broadcast, []

    def cut_the_first_time(message, ends, *rest, **more):
        tries.append(ends)
        if len(tries) > 1:
            return broadcast(message, ends, *rest, **more)
        aggregator._inbox.on_leave("t", "closed the connection")
        threading.Thread(target=aggregator._inbox.on_join, args=[member]).start()
        return {}

    monkeypatch.setattr(aggregator, "broadcast", cut_the_first_time)
    say_done(aggregator)
    assert tries == [["t"], ["t"]]
    assert told(trainer)


def test_a_connection_that_is_broken_and_still_looks_whole_is_not_tried_again(pair, monkeypatch):
    aggregator, trainer = pair
    member, broadcast, tries = aggregator.member("t"), aggregator.broadcast, []

    def come_again():
        aggregator._inbox.on_leave("t", "closed the connection")
        aggregator._inbox.on_join(member)

    def fail_the_first_time(message, ends, *rest, **more):
        tries.append(ends)
        if len(tries) > 1:
            return broadcast(message, ends, *rest, **more)
        threading.Timer(0.1, come_again).start()
        return {"t": "closed the connection"}

    monkeypatch.setattr(aggregator, "broadcast", fail_the_first_time)
    say_done(aggregator)
    assert tries == [["t"], ["t"]]
    assert aggregator._inbox.visits == {"t": 2}, "it has come anew before it is told again"
    assert told(trainer)


def test_who_has_left_in_good_order_or_long_ago_is_not_waited_for(pair, monkeypatch):
    aggregator, trainer = pair
    monkeypatch.setattr(farewell, "LATE_SECONDS", 60.0)
    trainer.leave()
    began = time.monotonic()
    say_done(aggregator)
    assert time.monotonic() - began < 30
    assert aggregator.strayed(0.0) == []
