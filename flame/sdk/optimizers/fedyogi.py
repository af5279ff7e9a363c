"""FedYogi: v' = v - (1 - beta_2) D^2 sign(v - D^2); the rest is in :mod:`flame.sdk.optimizers.fedopt`."""

from __future__ import annotations

import numpy as np

from flame.sdk.optimizers.fedopt import FedOpt
from flame.sdk.optimizers.layout import Array


class FedYogi(FedOpt):
    """Reddi et al., ICLR 2021. Parameters are those of :class:`FedOpt`."""

    sort = "fedyogi"

    def adapt(self, v: Array, square: Array) -> None:
        """See :meth:`FedOpt.adapt`."""
        sign = np.sign(v - square)
        square *= 1 - self.beta_2
        v -= square * sign
