"""A Keras 3 model on its torch backend is a model like any other: averaged by its own weights, trained by its own fit."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("keras") is None:
    pytest.skip("keras is not installed", allow_module_level=True)

# In a process of its own, as Keras takes its backend from the environment when it is imported, and to see that nothing
# of it stays behind in the processes of the other tests.
SCRIPT = """
import sys
import numpy as np
import keras

sys.path.insert(0, sys.argv[1])
from pathlib import Path
from syncjob import InThread, Job
from flame.sdk import Aggregator, Trainer

assert keras.backend.backend() == "torch"


def net():
    made = keras.Sequential([
        keras.layers.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.BatchNormalization(),
        keras.layers.Dense(2),
    ])
    made.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    return made


def data(number):
    rng = np.random.default_rng(number)
    x = rng.standard_normal((16 * (number + 1), 4)).astype(np.float32)
    return x, np.stack([x[:, 0] + number, x[:, 1]], 1)


keras.utils.set_random_seed(1)
MODELS = [net() for _ in range(4)]  # here, as the roles' threads would race for names and seeds


class Site(InThread, Trainer):
    def __init__(self, config):
        self.config = config
        self.number = int(config.task_id.split("-")[1])
        self.sent = []

    def load_data(self):
        self.x, self.y = data(self.number)
        self.dataset_size = len(self.x)

    def initialize(self):
        self.model = MODELS[self.number]

    def train(self):
        self.model.fit(self.x, self.y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        self.sent.append([np.array(each) for each in self.model.get_weights()])


class Top(InThread, Aggregator):
    def __init__(self, config):
        self.config = config
        self.after = []

    def initialize(self):
        self.model = MODELS[3]

    def evaluate(self):
        self.after.append([np.array(each) for each in self.model.get_weights()])


job = Job(Path(sys.argv[2]))
top = job.add(Top, "aggregator", rounds=3, trainers=3)
sites = [job.add(Site, "trainer", number) for number in range(3)]
start = [np.array(each) for each in MODELS[3].get_weights()]
job.run()
assert len(top.after) == 3
shares = np.array([1, 2, 3]) / 6
for number, after in enumerate(top.after):
    assert len(after) == len(start) == 8  # two dense layers' kernels and biases, and BatchNormalization's four
    for index, array in enumerate(after):
        mean = sum(share * site.sent[number][index].astype(float) for share, site in zip(shares, sites))
        np.testing.assert_allclose(array, mean, atol=1e-5)
assert any(not np.allclose(a, b) for a, b in zip(start, top.after[0]))

# And it computes what Keras alone would, one site after the other from the same weights.
alone, weights = net(), start
for after in top.after:
    trained = []
    for number in range(3):
        alone.set_weights(weights)
        x, y = data(number)
        alone.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        trained.append([np.array(each) for each in alone.get_weights()])
    weights = [sum(share * each[index] for share, each in zip(shares, trained)) for index in range(8)]
    for mine, theirs in zip(weights, after):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
print("equal")
"""


def test_keras_models_on_torch_are_averaged_as_by_hand(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr
    assert done.returncode == 0, done.stderr
