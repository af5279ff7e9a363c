"""Whoever brings a worker may sit behind a NAT, whatever the job knows of its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flame.sdk import Config
from flame.sdk.channel_manager import ChannelManager


@pytest.mark.parametrize(
    ("dataset", "from_user", "dials"),
    [("", True, True), ("/data", True, True), ("/data", False, True), ("", False, False)],
)
def test_a_participant_s_worker_opens_the_connections(
    tmp_path: Path, dataset: str, from_user: bool, dials: bool
) -> None:
    given = {
        "taskid": "t1",
        "role": "trainer",
        "job": {"id": "j1", "name": "job"},
        "dataset": dataset,
        "fromUser": from_user,
        "channels": [{"name": "param", "pair": ["trainer", "aggregator"]}],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    manager = ChannelManager()
    manager(Config(str(path)))
    try:
        assert manager._me().dials is dials
    finally:
        manager.cleanup()
