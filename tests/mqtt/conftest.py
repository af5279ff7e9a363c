"""A broker and workers for each test that asks for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mqttkit import Mosquitto, Workers


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    mosquitto = Mosquitto(tmp_path / "mosquitto")
    yield mosquitto
    mosquitto.kill()


@pytest.fixture
def workers(broker: Mosquitto) -> Iterator[Workers]:
    made = Workers(broker.address)
    yield made
    made.close()
