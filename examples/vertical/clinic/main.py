"""The clinic: has the diagnoses, which stay here, and the upper part of the network."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flame.sdk import Config
from flame.sdk.mode.vertical.active_party import ActiveParty


class Clinic(ActiveParty):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        with np.load(self.config.dataset) as data:
            self.ids, self.held_out = data["id"], data["held_out"]
            self.y = torch.from_numpy(data["benign"]).float()

    def initialize(self) -> None:
        torch.manual_seed(self.config.hyperparameters.seed)
        self.model = nn.Sequential(nn.Linear(3 * 4, 8), nn.ReLU(), nn.Linear(8, 1))  # three laboratories' four outputs
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.hyperparameters.learning_rate)

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(scores.squeeze(1), labels)

    def evaluate(self) -> None:
        benign = self.y[self.held_out_rows] > 0.5
        right = (self.predict().squeeze(1) > 0) == benign
        self.update_metrics({"patients": len(right), "accuracy": right.float().mean()})


clinic = Clinic(Config("config.json"))
clinic.compose()
clinic.run()
