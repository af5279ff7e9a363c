"""Averages the hospitals' lines. It has no data of its own, and reports what was learned."""

import numpy as np

from flame.sdk import Aggregator, Config


class Study(Aggregator):
    def __init__(self, config: Config) -> None:
        self.config = config

    def initialize(self) -> None:
        self.model = {"slope": np.zeros(2), "offset": np.zeros(())}

    def evaluate(self) -> None:
        bmi, pressure = self.model["slope"]
        self.update_metrics({"bmi": bmi, "pressure": pressure})


study = Study(Config("config.json"))
study.compose()
study.run()
