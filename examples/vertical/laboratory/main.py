"""A laboratory: has measurements of patients, which stay here. What it sends is what its network makes of them."""

import numpy as np
import torch
from torch import nn

from flame.sdk import Config
from flame.sdk.mode.vertical.feature_party import FeatureParty


class Laboratory(FeatureParty):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        with np.load(self.config.dataset) as data:
            self.ids, x = data["id"], data["x"]
        self.x = torch.from_numpy((x - x.mean(axis=0)) / x.std(axis=0))

    def initialize(self) -> None:
        torch.manual_seed(self.config.hyperparameters.seed)
        self.model = nn.Sequential(nn.Linear(self.x.shape[1], 8), nn.ReLU(), nn.Linear(8, 4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.hyperparameters.learning_rate)


laboratory = Laboratory(Config("config.json"))
laboratory.compose()
laboratory.run()
