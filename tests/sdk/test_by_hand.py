"""Roles as processes without a control plane: scripts in the style of Flame's library, and workers that die."""

import signal
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "mqtt"))
from byhand import Hand
from mqttkit import Mosquitto

# Scripts as people wrote them for Flame's library: its imports, no call of the parent's __init__, argparse at the end.

FLAME_TRAINER = """
import argparse
import logging

import torch
import torch.nn as nn
import torch.optim as optim
from flame.config import Config
from flame.mode.horizontal.trainer import Trainer

logger = logging.getLogger(__name__)
torch.set_num_threads(1)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(x)


class LineTrainer(Trainer):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.dataset_size = 0
        self.model = None
        self.device = None
        self.epochs = self.config.hyperparameters.epochs
        self.batch_size = self.config.hyperparameters.batch_size or 16

    def initialize(self) -> None:
        self.device = torch.device("cpu")
        self.model = Line().to(self.device)

    def load_data(self) -> None:
        self.x = torch.linspace(-1, 1, self.batch_size).unsqueeze(1)
        self.y = 3 * self.x + 1

    def train(self) -> None:
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.5)
        for _ in range(self.epochs):
            self.optimizer.zero_grad()
            loss = ((self.model(self.x) - self.y) ** 2).mean()
            loss.backward()
            self.optimizer.step()
        self.dataset_size = len(self.x)

    def evaluate(self) -> None:
        pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="")
    parser.add_argument("config", nargs="?", default="./config.json")
    args = parser.parse_args()
    t = LineTrainer(Config(args.config))
    t.compose()
    t.run()
"""

FLAME_AGGREGATOR = """
import argparse
import logging

import numpy as np
import torch
import torch.nn as nn
from flame.config import Config, load_config
from flame.dataset import Dataset
from flame.mode.composer import CloneComposer
from flame.mode.horizontal.top_aggregator import TopAggregator
from flame.mode.tasklet import Tasklet

logger = logging.getLogger(__name__)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(x)


class LineAggregator(TopAggregator):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = None
        self.dataset: Dataset = None

    def initialize(self):
        torch.manual_seed(2)
        self.model = Line()

    def load_data(self) -> None:
        x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(-1, 1)
        self.dataset = Dataset(x=x, y=3 * x + 1)

    def train(self) -> None:
        pass

    def evaluate(self) -> None:
        x, y = self.dataset.get()
        loss = ((self.model(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean().item()
        logger.info(f"Test loss: {loss}")
        self.update_metrics({"test-loss": loss})

    def compose(self) -> None:
        super().compose()
        with CloneComposer(self.composer) as composer:
            self.composer = composer
            task = Tasklet("say", lambda: print("said", self._round, flush=True))
        self.composer.get_tasklet("evaluate").insert_after(task)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="")
    parser.add_argument("config", nargs="?", default="./config.json")
    args = parser.parse_args()
    a = LineAggregator(load_config(args.config))
    a.compose()
    a.run()
    print("final", a.model.fc.weight.item(), a.model.fc.bias.item(), flush=True)
"""

# A trainer that announces each phase and waits there when it is told to, and its aggregator.

NUMPY_TRAINER = """
import sys, time
import numpy as np
from flame.sdk import Config, Tasklet, Trainer

class Slow(Trainer):
    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id[-2:])

    def initialize(self):
        self.model = {"w": np.zeros(1000)}

    def phase(self, name):
        print("phase", name, self._round, flush=True)
        if self.config.hyperparameters.get("stop") == [self.number, name, self._round]:
            time.sleep(3600)

    def train(self):
        self.model["w"] += self.number
        self.dataset_size = 1

    def compose(self):
        super().compose()
        chain = self.composer
        chain.get_tasklet("initialize").insert_before(Tasklet("p1", self.phase, "starting"))
        chain.get_tasklet("fetch").insert_before(Tasklet("p2", self.phase, "fetching"))
        chain.get_tasklet("train").insert_before(Tasklet("p3", self.phase, "training"))
        chain.get_tasklet("upload").insert_before(Tasklet("p4", self.phase, "uploading"))

slow = Slow(Config("config.json"))
slow.compose()
slow.run()
print("rounds to the end", slow._round, flush=True)
"""

NUMPY_AGGREGATOR = """
import numpy as np
from flame.sdk import Aggregator, Config

class Mean(Aggregator):
    def __init__(self, config):
        self.config = config

    def initialize(self):
        self.model = {"w": np.zeros(1000)}

    def evaluate(self):
        number, count = self.config.hyperparameters.get("await", [0, 0])
        if self._round == number:
            channel = self.channel("aggregate")
            assert channel.wait_until(lambda: len(channel.all_ends()) >= count, 60)
        print("mean", self._round, self.model["w"][0], len(self._tally.folded), flush=True)

mean = Mean(Config("config.json"))
mean.compose()
mean.run()
"""


@pytest.fixture
def scripts(tmp_path):
    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return [tmp_path / f"{name}.py" for name in sources]

    return write


@pytest.fixture
def hand(tmp_path):
    hands = []

    def make(**more):
        hands.append(Hand(tmp_path, **more))
        return hands[-1]

    yield make
    for one in hands:
        one.stop()


@pytest.fixture(params=["p2p", "mqtt"])
def network(request, tmp_path):
    """A backend and where its meeting point is."""
    if request.param == "p2p":
        yield {}
        return
    mosquitto = Mosquitto(tmp_path / "mosquitto")
    yield {"backend": "mqtt", "broker": mosquitto.address}
    mosquitto.kill()


def test_scripts_written_for_flames_library_run_as_they_are(hand, scripts, network):
    trainer, aggregator = scripts(trainer=FLAME_TRAINER, aggregator=FLAME_AGGREGATOR)
    job = hand(policy={"minTrainers": 2}, hyperparameters={"batchSize": 32, "epochs": 4, "rounds": 5}, **network)
    top = job.start("aggregator", 0, aggregator)
    others = [job.start("trainer", number, trainer) for number in (1, 2)]
    assert top.end() == 0, top.text
    assert [worker.end() for worker in others] == [0, 0], others[0].text
    assert [f"said {number}" for number in range(1, 6)] == [line for line in top.lines if line.startswith("said")]
    weight, bias = map(float, top.lines[top.wait_for("final")].split()[1:])
    assert (weight, bias) == (pytest.approx(3, abs=0.01), pytest.approx(1, abs=0.01))
    assert any("round 5 finished" in line and "test-loss" in line for line in top.lines)
    assert (job.folder / "aggregator-0-1" / "artifacts" / "model.safetensors").exists()


def means(worker):
    return [tuple(map(float, line.split()[1:])) for line in worker.lines if line.startswith("mean")]


@pytest.mark.parametrize("phase", ["starting", "fetching", "training", "uploading"])
def test_a_trainer_killed_in_any_phase_does_not_hold_the_round_and_its_successor_takes_part(hand, scripts, phase):
    trainer, aggregator = scripts(trainer=NUMPY_TRAINER, aggregator=NUMPY_AGGREGATOR)
    job = hand(hyperparameters={"rounds": 4})
    steady = job.start("trainer", 1, trainer)
    victim = job.start("trainer", 2, trainer, hyperparameters={"stop": [2, phase, 1]})
    # The second round ends when the successor is there.
    awaited = {"rounds": 4, "await": [2, 2]}
    top = job.start("aggregator", 0, aggregator, hyperparameters=awaited, peers={"param-channel": 2})
    victim.wait_for("phase", phase)
    if phase in ("starting", "fetching"):
        steady.wait_for("phase uploading 1")  # the round has begun, and the victim has not taken its part
    assert victim.kill() == -signal.SIGKILL
    successor = job.start("trainer", 2, trainer, attempt=2)
    assert [top.end(), steady.end(), successor.end()] == [0, 0, 0], top.text
    # number of the round, mean, updates
    assert means(top) == [(1, 1, 1), (2, 2, 1), (3, 3.5, 2), (4, 5, 2)]


def test_trainers_outlive_their_aggregator_and_go_on_with_its_successor(hand, scripts):
    trainer, aggregator = scripts(trainer=NUMPY_TRAINER, aggregator=NUMPY_AGGREGATOR)
    job = hand(hyperparameters={"rounds": 3})
    others = [job.start("trainer", number, trainer) for number in (1, 3)]
    first = job.start("aggregator", 0, aggregator, peers={"param-channel": 2}, hyperparameters={"rounds": 10**6})
    first.wait_for("mean 2 ")
    assert first.kill() == -signal.SIGKILL
    others[0].wait_for("Waiting for a worker of role aggregator")
    second = job.start("aggregator", 0, aggregator, attempt=2, peers={"param-channel": 2})
    assert [second.end(), *(worker.end() for worker in others)] == [0, 0, 0], second.text
    assert means(second) == [(1, 2, 2), (2, 4, 2), (3, 6, 2)]


def test_a_job_outlives_the_restart_of_its_broker(hand, scripts, tmp_path):
    trainer, aggregator = scripts(trainer=NUMPY_TRAINER, aggregator=NUMPY_AGGREGATOR)
    mosquitto = Mosquitto(tmp_path / "mosquitto", persistence=True)
    try:
        job = hand(backend="mqtt", broker=mosquitto.address, hyperparameters={"rounds": 300}, policy={"minTrainers": 2})
        top = job.start("aggregator", 0, aggregator, peers={"param-channel": 2})
        others = [job.start("trainer", number, trainer) for number in (1, 3)]
        for number in (20, 120):
            top.wait_for(f"mean {number} ")
            mosquitto.kill()
            mosquitto.start()
        assert [top.end(), *(worker.end() for worker in others)] == [0, 0, 0], top.text
        assert means(top)[-1] == (300, 600, 2)
    finally:
        mosquitto.kill()


def test_a_trainer_that_raises_ends_with_its_traceback_and_the_others_go_on(hand, scripts):
    broken = NUMPY_TRAINER.replace("self.dataset_size = 1", "self.dataset_size = 1 / (self._round - 1)")
    trainer, aggregator, wrong = scripts(trainer=NUMPY_TRAINER, aggregator=NUMPY_AGGREGATOR, wrong=broken)
    job = hand(hyperparameters={"rounds": 3})
    steady = job.start("trainer", 1, trainer)
    failing = job.start("trainer", 2, wrong)
    top = job.start("aggregator", 0, aggregator, peers={"param-channel": 2})
    assert [top.end(), steady.end(), failing.end()] == [0, 0, 1]
    assert "ZeroDivisionError" in failing.text
    assert means(top) == [(1, 1, 1), (2, 2, 1), (3, 3, 1)]
