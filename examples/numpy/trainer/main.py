"""A hospital: fits a straight line to its own patients, beginning from the model of all hospitals."""

import numpy as np

from flame.sdk import Config, Trainer


class Hospital(Trainer):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        table = np.loadtxt(self.config.dataset, delimiter=",", skiprows=1)
        self.x, self.y = table[:, :2], table[:, 2]
        self.dataset_size = len(self.y)

    def initialize(self) -> None:
        self.model = {"slope": np.zeros(2), "offset": np.zeros(())}

    def train(self) -> None:
        for _ in range(self.config.hyperparameters.epochs):
            error = self.x @ self.model["slope"] + self.model["offset"] - self.y
            self.model["slope"] -= self.config.hyperparameters.learning_rate * (error @ self.x) / len(error)
            self.model["offset"] -= self.config.hyperparameters.learning_rate * error.mean()

    def evaluate(self) -> None:
        error = self.x @ self.model["slope"] + self.model["offset"] - self.y
        self.update_metrics({"loss": np.mean(error**2)})


hospital = Hospital(Config("config.json"))
hospital.compose()
hospital.run()
