"""A site: tries the model on its own handwritten digits."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flame.sdk import Config
from flame.sdk.mode.evaluation.evaluator import Evaluator


class Net(nn.Module):
    """Two convolutions and a linear layer; 8 x 8 pixels in, ten scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.out(x.flatten(1))


class Site(Evaluator):
    def __init__(self, config: Config) -> None:
        self.config = config

    def load_data(self) -> None:
        with np.load(self.config.dataset) as data:
            self.x = torch.from_numpy(data["x"]).float().unsqueeze(1) / 16
            self.y = torch.from_numpy(data["y"]).long()
        self.dataset_size = len(self.y)

    def initialize(self) -> None:
        self.model = Net()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            scores = self.model(self.x)
        right = (scores.argmax(1) == self.y).float()
        self.update_metrics({"loss": F.cross_entropy(scores, self.y), "accuracy": right.mean()})


site = Site(Config("config.json"))
site.compose()
site.run()
