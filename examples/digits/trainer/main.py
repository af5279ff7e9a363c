"""A site: trains the common network on its own handwritten digits."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flame.sdk import Config, Trainer


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


class DigitsTrainer(Trainer):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = None

    def load_data(self) -> None:
        with np.load(self.config.dataset) as data:
            self.x = torch.from_numpy(data["x"]).float().unsqueeze(1) / 16
            self.y = torch.from_numpy(data["y"]).long()
        self.dataset_size = len(self.y)

    def initialize(self) -> None:
        self.model = Net()
        self.order = torch.Generator().manual_seed(self.config.hyperparameters.seed)

    def train(self) -> None:
        hyper = self.config.hyperparameters
        optimizer = torch.optim.SGD(self.model.parameters(), lr=hyper.learning_rate, momentum=0.9)
        self.model.train()
        losses = []
        for _ in range(hyper.epochs):
            for batch in torch.randperm(len(self.y), generator=self.order).split(hyper.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(self.model(self.x[batch]), self.y[batch])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        self.update_metrics({"loss": np.mean(losses)})

    def evaluate(self) -> None:
        pass  # the aggregator does, on digits that no site has


trainer = DigitsTrainer(Config("config.json"))
trainer.compose()
trainer.run()
