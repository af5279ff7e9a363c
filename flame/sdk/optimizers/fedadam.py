"""FedAdam: v' = beta_2 v + (1 - beta_2) D^2; the rest is in :mod:`flame.sdk.optimizers.fedopt`."""

from __future__ import annotations

from flame.sdk.optimizers.fedopt import FedOpt
from flame.sdk.optimizers.layout import Array


class FedAdam(FedOpt):
    """Reddi et al., ICLR 2021. Parameters are those of :class:`FedOpt`."""

    sort = "fedadam"

    def adapt(self, v: Array, square: Array) -> None:
        """See :meth:`FedOpt.adapt`."""
        v *= self.beta_2
        square *= 1 - self.beta_2
        v += square
