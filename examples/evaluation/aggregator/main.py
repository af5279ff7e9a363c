"""Has the model, and averages what the sites measure. It needs no model class: a file of named arrays is enough."""

from flame.sdk import Config, modelfile
from flame.sdk.mode.evaluation.aggregator import EvaluationAggregator


class Trial(EvaluationAggregator):
    def __init__(self, config: Config) -> None:
        self.config = config

    def initialize(self) -> None:
        self.model, _ = modelfile.load("model.safetensors")  # lies beside this file


trial = Trial(Config("config.json"))
trial.compose()
trial.run()
