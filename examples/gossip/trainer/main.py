"""A site: trains the common model on its own handwritten digits. The model is a softmax regression in plain numpy."""

import numpy as np

from flame.sdk import Config
from flame.sdk.mode.gossip.trainer import Trainer


class Site(Trainer):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        with np.load(self.config.dataset) as data:
            self.x = data["x"].reshape(-1, 64) / 16
            self.y = data["y"]
        self.dataset_size = len(self.y)
        with np.load("held-out.npz") as data:  # lies beside this file
            self.x_test = data["x"].reshape(-1, 64) / 16
            self.y_test = data["y"]

    def initialize(self) -> None:
        self.model = {"weights": np.zeros((64, 10)), "bias": np.zeros(10)}
        self.order = np.random.default_rng(self.config.hyperparameters.seed)

    def train(self) -> None:
        hyper, losses = self.config.hyperparameters, []
        for _ in range(hyper.epochs):
            order = self.order.permutation(len(self.y))
            for start in range(0, len(order), hyper.batch_size):
                batch = order[start : start + hyper.batch_size]
                x, y = self.x[batch], self.y[batch]
                scores = x @ self.model["weights"] + self.model["bias"]
                chances = np.exp(scores - scores.max(axis=1, keepdims=True))
                chances /= chances.sum(axis=1, keepdims=True)
                losses.append(-np.log(chances[np.arange(len(y)), y]).mean())
                chances[np.arange(len(y)), y] -= 1
                self.model["weights"] -= hyper.learning_rate * x.T @ chances / len(y)
                self.model["bias"] -= hyper.learning_rate * chances.mean(axis=0)
        self.update_metrics({"loss": np.mean(losses)})

    def evaluate(self) -> None:
        scores = self.x_test @ self.model["weights"] + self.model["bias"]
        self.update_metrics({"accuracy": (scores.argmax(axis=1) == self.y_test).mean()})


site = Site(Config("config.json"))
site.compose()
site.run()
