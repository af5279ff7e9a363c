"""Adaptive server optimizers; what FedAdam, FedAdagrad and FedYogi share.

    D  = mean - x
    m' = beta_1 m + (1 - beta_1) D
    v' = one rule each
    x' = x + eta m' / (sqrt(v') + tau)

from m = 0 and v = tau^2, without bias correction.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated Optimization. ICLR 2021, algorithm 2.
"""

from __future__ import annotations

import abc

import numpy as np

from flame.sdk.optimizers.layout import Array
from flame.sdk.optimizers.serverstep import ServerStep
from flame.sdk.plugins import number


class FedOpt(ServerStep):
    """Base of the adaptive server optimizers.

    :param beta_1: decay of the first moment, in [0, 1).
    :param beta_2: decay of the second moment, in [0, 1); FedAdagrad has no use for it.
    :param eta: the server's learning rate, above 0.
    :param tau: degree of adaptivity, above 0: the smaller, the more adaptive.
    """

    vectors = ("m", "v")

    def __init__(self, beta_1: float = 0.9, beta_2: float = 0.99, eta: float = 1e-2, tau: float = 1e-3) -> None:
        super().__init__()
        self.beta_1 = number("beta_1", beta_1, low=0, below=1)
        self.beta_2 = number("beta_2", beta_2, low=0, below=1)
        self.eta = number("eta", eta, above=0)
        self.tau = number("tau", tau, above=0)

    @abc.abstractmethod
    def adapt(self, v: Array, square: Array) -> None:
        """Update the second moment ``v`` in place, with the square of D (which may be overwritten)."""

    def initial(self, vector: str) -> float:
        """See :meth:`ServerStep.initial`."""
        return self.tau**2 if vector == "v" else 0.0

    def move(self, current: Array, mean: Array, *states: Array) -> None:
        """See :meth:`ServerStep.move`."""
        m, v = states
        delta = mean - current
        m *= self.beta_1
        m += (1 - self.beta_1) * delta
        np.square(delta, out=delta)
        self.adapt(v, delta)
        mean[:] = current + self.eta * m / (np.sqrt(v) + self.tau)
