"""Federated averaging with server momentum.

    v' = beta_1 v + (mean - x)
    x' = x + eta v'

Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. 2019,
section 3.3 (with the sign of v turned round).
"""

from __future__ import annotations

from flame.sdk.optimizers.layout import Array
from flame.sdk.optimizers.serverstep import ServerStep
from flame.sdk.plugins import number


class FedAvgM(ServerStep):
    """Server momentum.

    :param beta_1: how much of the last step is kept, in [0, 1).
    :param eta: the server's learning rate, above 0.
    """

    sort = "fedavgm"
    vectors = ("v",)

    def __init__(self, beta_1: float = 0.9, eta: float = 1.0) -> None:
        super().__init__()
        self.beta_1 = number("beta_1", beta_1, low=0, below=1)
        self.eta = number("eta", eta, above=0)

    def move(self, current: Array, mean: Array, *states: Array) -> None:
        """See :meth:`ServerStep.move`."""
        (v,) = states
        v *= self.beta_1
        v += mean - current
        mean[:] = current + self.eta * v
