"""Channels made from a configuration, as roles make them."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest

from flame.errors import ChannelError, SpecError
from flame.sdk.channel_manager import ChannelManager
from flame.sdk.config import Config


def config(task, role, *, backend="inproc", dataset="", group="default", brokers=(), channel=None, selector=None):
    return Config(
        {
            "taskid": task,
            "role": role,
            "job": {"id": "622a358619ab59012eabeefb", "name": "job"},
            "backend": backend,
            "brokers": list(brokers),
            "dataset": dataset,
            "selector": selector or {"sort": "default"},
            "groupAssociation": {"param": group},
            "channels": [
                {
                    "name": "param",
                    "pair": ["trainer", "aggregator"],
                    "groupBy": {"type": "tag", "value": ["default", "us", "uk"]},
                    "funcTags": {"trainer": ["fetch", "upload"], "aggregator": ["distribute", "aggregate"]},
                    **(channel or {}),
                }
            ],
        }
    )


@pytest.fixture
def manager():
    made = []

    def make(*args, **settings):
        more = {key: settings.pop(key) for key in ("attempt", "key", "rendezvous", "window") if key in settings}
        cm = ChannelManager(config(*args, **settings), **more)
        made.append(cm)
        cm.join_all()
        return cm

    yield make
    for cm in made:
        cm.cleanup()


def exchange(aggregator, trainer):
    down, up = aggregator.get_by_tag("distribute"), trainer.get_by_tag("fetch")
    assert not up.await_join(20)
    assert not down.await_join(20)
    assert down.broadcast({"weights": {"w": np.arange(5.0)}}, timeout=20) == {}
    message, _ = up.recv(up.one_end(), timeout=20)
    up.send("a", message)
    assert (down.recv("t", timeout=20)[0]["weights"]["w"] == np.arange(5.0)).all()


def test_a_role_gets_its_channels_by_function_tag_and_by_name(manager):
    cm = manager("t", "trainer")
    assert cm.get_by_tag("fetch") is cm.get_by_tag("upload") is cm.get("param")
    assert cm.get_by_tag("distribute") is None
    channel = cm.get("param")
    assert (channel.name(), channel.my_role(), channel.other_role(), channel.group()) == (
        "param",
        "trainer",
        "aggregator",
        "default",
    )
    assert channel.job_id() == "622a358619ab59012eabeefb"
    assert cm.join("param")
    assert cm.is_joined("param")
    cm.leave("param")
    cm.leave("param")
    assert cm.get("param") is None
    with pytest.raises(ChannelError, match="has no channel 'other'; it has param"):
        cm.join("other")


def test_workers_of_one_process_exchange_models(manager):
    exchange(manager("a", "aggregator"), manager("t", "trainer", dataset="file:///x"))


def test_workers_that_are_run_by_hand_meet_at_the_address_in_brokers(manager):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        brokers = [{"sort": "p2p", "host": f"127.0.0.1:{probe.getsockname()[1]}"}]
    exchange(
        manager("a", "aggregator", backend="p2p", brokers=brokers),
        manager("t", "trainer", backend="p2p", brokers=brokers, dataset="file:///x"),
    )


def test_a_channel_may_have_its_own_backend_compression_and_selector(manager):
    own = {"backend": "inproc", "compression": {"sort": "float16"}, "selector": {"sort": "random", "kwargs": {"k": 1}}}
    aggregator = manager("a", "aggregator", backend="p2p", channel=own)
    trainer = manager("t", "trainer", backend="p2p", channel=own, dataset="file:///x")
    manager("u", "trainer", backend="p2p", channel=own, dataset="file:///y")
    channel = aggregator.get("param")
    channel.set_property("round", 1)
    assert len(channel.ends("send")) == 1
    assert len(channel.all_ends()) == 2
    channel.send("t", {"weights": {"w": np.arange(5.0)}, "round": 1}, timeout=20)
    weights = trainer.get("param").recv("a", timeout=20)[0]["weights"]
    assert (np.asarray(weights["w"]) == np.arange(5.0)).all()


def test_groups_do_not_hear_of_each_other(manager):
    aggregator = manager("a", "aggregator", group="us")
    manager("t1", "trainer", group="us")
    manager("t2", "trainer", group="uk")
    assert aggregator.get("param").all_ends() == ["t1"]


def test_p2p_without_a_meeting_point_says_what_to_write():
    cm = ChannelManager(config("t", "trainer", backend="p2p"))
    with pytest.raises(SpecError, match="no meeting point for the p2p backend"):
        cm.join_all()
    cm.cleanup()


def test_an_unknown_backend_is_named():
    cm = ChannelManager(config("t", "trainer", backend="carrier-pigeon"))
    with pytest.raises(SpecError, match="carrier-pigeon"):
        cm.join_all()
    cm.cleanup()


def test_in_the_style_of_flames_library_there_is_one_manager_of_the_process():
    cm = ChannelManager()
    with pytest.raises(ChannelError, match="no configuration yet"):
        cm.join_all()
    cm(config("t", "trainer"))
    cm.join_all()
    assert ChannelManager() is cm
    assert ChannelManager().get("param") is not None
    cm(config("t", "trainer"))
    assert cm.get("param") is None
    cm.cleanup()
    cm.cleanup()


def test_a_forked_process_leaves_nothing_in_its_parents_name(manager):
    aggregator, trainer = manager("a", "aggregator"), manager("t", "trainer", dataset="file:///x")
    forked = os.fork()
    if not forked:
        trainer.cleanup()
        os._exit(0 if trainer.is_joined("param") else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert aggregator.get("param").all_ends() == ["t"]


def test_the_attempt_and_the_key_come_from_the_environment(manager, monkeypatch):
    monkeypatch.setenv("FLAME_ATTEMPT", "3")
    monkeypatch.setenv("FLAME_JOB_KEY", "ab" * 32)
    aggregator = manager("a", "aggregator")
    manager("t", "trainer", dataset="file:///x")
    member = aggregator.get("param").member("t")
    assert (member.attempt, member.dials) == (3, True)
    assert aggregator._job_key() == bytes.fromhex("ab" * 32)
