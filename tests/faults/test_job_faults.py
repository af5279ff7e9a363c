"""Jobs of real roles in processes, over p2p and mqtt, in which something dies, stands still or lies: each ends as its
policy says. Every trainer adds its number to the model, so the mean tells who took part in a round."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sdk"))
sys.path.insert(0, str(Path(__file__).parent.parent / "mqtt"))
from byhand import Hand, Worker
from mqttkit import Mosquitto

TRAINER = """
import os, signal, sys, threading, time
import numpy as np
from flame.sdk import Config, Trainer

class Site(Trainer):
    dataset_size = 1

    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id[-2:])
        self.fetches = 0
        self.doom = config.hyperparameters.get("doom") or [0, "", 0]

    def initialize(self):
        self.model = {"w": np.zeros(self.config.hyperparameters.get("size") or 1000, np.float32)}

    def doomed(self, phase, round):
        return self.doom == [self.number, phase, round]

    def die(self, phase, round):
        if self.doomed(phase, round):
            print("dies", phase, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def get(self, tag):
        self.fetches += 1
        self.die("fetching", self.fetches)
        if self.doomed("receiving", self.fetches):
            self.die_amid(lambda: super(Site, self).get(tag))
        super().get(tag)

    def train(self):
        self.die("training", self._round)
        self.model["w"] += self.number
    def evaluate(self):
        self.die("evaluating", self._round)

    def put(self, tag):
        if self.doomed("sending", self._round):
            self.die_amid(lambda: super(Site, self).put(tag))
        super().put(tag)
        sys.stdout.write(f"sent {self._round}\\n")
        self.die("sent", self._round)

    def die_amid(self, work):
        # Once it has worked for some milliseconds, or is through.
        before = time.process_time()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and time.process_time() - before < 0.004:
            time.sleep(0.0002)
        os.kill(os.getpid(), signal.SIGKILL)

site = Site(Config("config.json"))
site.compose()
site.run()
"""

AGGREGATOR = """
import sys
import numpy as np
from flame.sdk import Aggregator, Config

class Mean(Aggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(self.config.hyperparameters.get("size") or 1000, np.float32)}

    def evaluate(self):
        wanted = self.config.hyperparameters.get("await") or {}
        channel = self.channel("aggregate")
        count = wanted.get(str(self._round), 0)
        assert channel.wait_until(lambda: len(channel.all_ends()) >= count, 60)
        low, high = float(self.model["w"].min()), float(self.model["w"].max())
        sys.stdout.write(f"mean {self._round} {low} {high} {len(self._tally.folded)}\\n")  # in one piece, unlike print()

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""


class Job:
    """A job by hand over one network, with an aggregator and trainers 1, 2, 4 ..., whose sums are distinct."""

    def __init__(self, folder: Path, network: str, broker: Mosquitto | None, **settings: Any) -> None:
        self.network = network
        self.broker = broker
        folder.mkdir()
        self.scripts = {"trainer": folder / "trainer.py", "aggregator": folder / "aggregator.py"}
        self.scripts["trainer"].write_text(TRAINER)
        self.scripts["aggregator"].write_text(AGGREGATOR)
        self.hyper = settings.pop("hyperparameters", {})
        address = broker.address if broker is not None else None
        self.hand = Hand(folder, backend=network, broker=address, hyperparameters=self.hyper, **settings)

    def trainer(self, number: int, attempt: int = 1, **hyper: Any) -> Worker:
        worker: Worker = self.hand.start(
            "trainer", number, self.scripts["trainer"], attempt, hyperparameters={**self.hyper, **hyper}
        )
        return worker

    def aggregator(self, trainers: int, **hyper: Any) -> Worker:
        worker: Worker = self.hand.start(
            "aggregator",
            0,
            self.scripts["aggregator"],
            hyperparameters={**self.hyper, **hyper},
            peers={"param-channel": trainers},
        )
        return worker


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(network: str, broker_settings: str = "", **settings: Any) -> Job:
        broker = Mosquitto(tmp_path / f"mosquitto-{len(made)}", broker_settings) if network == "mqtt" else None
        made.append(Job(tmp_path / f"job-{len(made)}", network, broker, **settings))
        return made[-1]

    yield make
    for job in made:
        job.hand.stop()
        if job.broker is not None:
            job.broker.kill()


def means(top: Worker) -> list[tuple[int, float, int]]:
    """Round, mean and number of updates, as the aggregator printed them; each number of the model must be the same."""
    rows = [line.split()[1:] for line in top.lines if line.startswith("mean")]
    assert all(low == high for _, low, high, _ in rows), "the model is torn"
    return [(int(number), float(low), int(count)) for number, low, _, count in rows]


def steps(top: Worker) -> list[tuple[float, int]]:
    """What each round added to the model, and how many updates it had."""
    rows = means(top)
    assert [number for number, _, _ in rows] == list(range(1, len(rows) + 1))
    return [
        (after - before, count) for (_, before, _), (_, after, count) in zip([(0, 0.0, 0), *rows], rows, strict=False)
    ]


# p2p's other phases are in tests/sdk/test_by_hand.py.
@pytest.mark.parametrize(
    ("network", "phase"),
    [
        *(("p2p", phase) for phase in ("receiving", "evaluating", "sending")),
        *(("mqtt", phase) for phase in ("fetching", "receiving", "training", "sending", "sent")),
    ],
)
def test_a_trainer_killed_in_a_phase_is_not_waited_for_and_its_successor_takes_part(
    jobs: Callable[..., Job], network: str, phase: str
) -> None:
    """Trainer 4 dies in round 2; the round ends with the others, and round 4 and on have its successor."""
    size = 3_000_000 if phase in ("receiving", "sending") else 1000
    job = jobs(network, hyperparameters={"rounds": 5, "size": size}, policy={"minTrainers": 2})
    top = job.aggregator(3, **{"await": {"3": 3}})
    steady = [job.trainer(number) for number in (1, 2)]
    victim = job.trainer(4, doom=[4, phase, 2])
    assert victim.end() == -signal.SIGKILL, victim.text
    successor = job.trainer(4, attempt=2)
    assert [top.end(), successor.end(), *(worker.end() for worker in steady)] == [0] * 4, top.text
    all_three, without = (pytest.approx(7 / 3), 3), (pytest.approx(1.5), 2)
    got = steps(top)
    # A small message may die with its sender just after send() has returned, or arrive just before.
    assert got[0] in ([all_three, without] if phase == "fetching" else [all_three])
    assert got[1] in ([all_three, without] if phase in ("sending", "sent") or got[0] == without else [without])
    assert got[2] in (without, all_three)
    assert got[3:] == [all_three, all_three]


@pytest.mark.parametrize("network", ["p2p", "mqtt"])
def test_a_round_that_needs_everyone_fails_in_words_when_one_is_killed(jobs: Callable[..., Job], network: str) -> None:
    job = jobs(network, hyperparameters={"rounds": 3}, policy={"minTrainers": 2, "joinDeadline": 3.0})
    top = job.aggregator(2)
    job.trainer(1)
    victim = job.trainer(2, doom=[2, "training", 2])
    assert victim.end() == -signal.SIGKILL
    assert top.end() != 0
    assert len(means(top)) == 1
    assert "minTrainers" in top.text


@pytest.mark.parametrize("network", ["p2p", "mqtt"])
def test_a_trainer_that_stands_still_is_left_behind_at_the_deadline_and_comes_back(
    jobs: Callable[..., Job], network: str
) -> None:
    job = jobs(network, hyperparameters={"rounds": 400}, policy={"minTrainers": 2, "roundDeadline": 2.0})
    top = job.aggregator(3)
    steady = [job.trainer(number) for number in (1, 2)]
    stopped = job.trainer(4)
    stopped.wait_for("sent 5")
    stopped.process.send_signal(signal.SIGSTOP)
    here = len(means(top))
    top.wait_for(f"mean {here + 3} ")
    stopped.process.send_signal(signal.SIGCONT)
    assert [top.end(), stopped.end(), *(worker.end() for worker in steady)] == [0] * 4, top.text
    counts = [count for _, count in steps(top)]
    assert len(counts) == 400
    assert 2 in counts[here : here + 3]
    assert counts[-10:] == [3] * 10, "it takes part again"
    assert {round(step, 2) for step, _ in steps(top)} <= {1.5, 2.33}


def test_an_aggregator_that_is_paused_for_twenty_seconds_goes_on(jobs: Callable[..., Job]) -> None:
    """Over both networks at once, since it takes its time."""
    running = []
    for network in ("p2p", "mqtt"):
        job = jobs(network, hyperparameters={"rounds": 60, "size": 500_000}, policy={"minTrainers": 2})
        running.append((job.aggregator(2), [job.trainer(number) for number in (1, 2)]))
    for top, _ in running:
        top.wait_for("mean 5 ")
        top.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(20)
    for top, _ in running:
        top.process.send_signal(signal.SIGCONT)
    for top, trainers in running:
        assert [top.end(), *(worker.end() for worker in trainers)] == [0] * 3, top.text
        assert steps(top) == [(pytest.approx(1.5), 2)] * 60


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"\xff" * 100_000,
    os.urandom(4096),
    b'{"job": "job", "nonce": "00", "proof": "00"}\n',
    b"",
]


def test_garbage_at_every_port_of_a_job_changes_nothing(jobs: Callable[..., Job]) -> None:
    job = jobs("p2p", hyperparameters={"rounds": 300, "size": 50_000}, policy={"minTrainers": 2})
    top = job.aggregator(2)
    trainers = [job.trainer(number) for number in (1, 2)]
    top.wait_for("mean 5 ")
    open_sockets = []
    found = 0
    for worker in (top, *trainers):
        for connection in psutil.Process(worker.process.pid).net_connections(kind="all"):
            if connection.status != psutil.CONN_LISTEN and connection.family != socket.AF_UNIX:
                continue
            # A unix socket's address is its path, or a name that begins with an at sign in place of a zero.
            address: Any = connection.laddr
            if connection.family == socket.AF_UNIX:
                address = "\0" + address[1:] if str(address).startswith("@") else address
                if not address:
                    continue
            found += 1
            for garbage in GARBAGE * 2:
                sock = socket.socket(connection.family, socket.SOCK_STREAM)
                open_sockets.append(sock)
                try:
                    sock.connect(tuple(address) if isinstance(address, tuple) else address)
                    sock.sendall(garbage)
                except OSError:
                    pass  # hung up on us, as it should
    assert found >= 2
    assert [top.end(), *(worker.end() for worker in trainers)] == [0] * 3, top.text
    for sock in open_sockets:
        sock.close()
    assert steps(top) == [(pytest.approx(1.5), 2)] * 300


def test_a_model_survives_a_broker_that_is_killed_twice_and_forgets(jobs: Callable[..., Job]) -> None:
    """What the mqtt benchmark does with 100 MB, with less."""
    job = jobs("mqtt", hyperparameters={"rounds": 5, "size": 4_000_000}, policy={"minTrainers": 4})
    assert job.broker is not None
    top = job.aggregator(4)
    trainers = [job.trainer(number) for number in (1, 2, 4, 8)]
    for number in (2, 4):
        # The round begins with the end of the one before: its model is on its way, or the first updates are.
        top.wait_for(f"mean {number - 1} ")
        job.broker.kill()
        job.broker.start()
    assert [top.end(), *(worker.end() for worker in trainers)] == [0] * 5, top.text
    assert means(top) == [(number, 3.75 * number, 4) for number in range(1, 6)]


def test_a_trainer_and_the_broker_may_be_killed_together(jobs: Callable[..., Job]) -> None:
    job = jobs(
        "mqtt", hyperparameters={"rounds": 6, "size": 1_000_000}, policy={"minTrainers": 2, "roundDeadline": 3.0}
    )
    assert job.broker is not None
    top = job.aggregator(3)
    steady = [job.trainer(number) for number in (1, 2)]
    victim = job.trainer(4)
    top.wait_for("mean 2 ")
    job.broker.kill()
    assert victim.kill() == -signal.SIGKILL
    job.broker.start()
    assert [top.end(), *(worker.end() for worker in steady)] == [0] * 3, top.text
    assert {count for _, count in steps(top)[3:]} == {2}
