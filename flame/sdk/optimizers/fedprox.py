"""FedProx: federated averaging of trainers that are held near the global model.

    trainer:  min_w F_k(w) + mu / 2 ||w - x||^2
    server:   x' = sum_k n_k y_k / sum_k n_k

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks. MLSys 2020, algorithm 2.
"""

from __future__ import annotations

from flame.sdk.optimizers.base import Regularizer
from flame.sdk.optimizers.fedavg import FedAvg
from flame.sdk.optimizers.terms import QuadraticTerm
from flame.sdk.plugins import number


class FedProx(FedAvg):
    """The proximal term is on the trainers' side.

    :param mu: its strength, at least 0; 0 is FedAvg.
    """

    sort = "fedprox"

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = number("mu", mu, low=0)

    def regularizer(self) -> Regularizer:
        """See :meth:`Optimizer.regularizer`."""
        return QuadraticTerm(self.mu)
