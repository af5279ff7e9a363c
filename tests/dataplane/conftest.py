"""Fixtures that make workers, in this process and in others, and close them."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from dataplanekit import KEY, Child, Meeting, Worker

from flame.sdk.backends.rendezvous import TcpRendezvous


@pytest.fixture
def meeting():
    return Meeting()


@pytest.fixture
def worker(meeting):
    """Makes workers in this process that meet in memory; all are closed at the end."""
    made = []

    def make(end, role="trainer", other="aggregator", **settings):
        settings.setdefault("dials", role == "trainer")
        made.append(Worker(end, role, other, meeting.seat(), **settings))
        return made[-1]

    yield make
    for each in reversed(made):
        each.close()


@pytest.fixture
def address():
    """Where workers in several processes meet."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def child(address):
    """Starts trainers in processes of their own; all are killed at the end."""
    made = []

    def make(what, end, **options):
        made.append(Child(what, end, options.pop("address", address), **options))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
def aggregator(address):
    """Makes the one aggregator that children meet."""
    made = []

    def make(**settings):
        rendezvous = TcpRendezvous(settings.pop("address", address), "job", KEY)
        made.append(Worker("a", "aggregator", "trainer", rendezvous, dials=False, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
