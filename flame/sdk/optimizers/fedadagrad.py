"""FedAdagrad: v' = v + D^2; the rest is in :mod:`flame.sdk.optimizers.fedopt`."""

from __future__ import annotations

from flame.sdk.optimizers.fedopt import FedOpt
from flame.sdk.optimizers.layout import Array


class FedAdagrad(FedOpt):
    """Reddi et al., ICLR 2021. Parameters are those of :class:`FedOpt`; the paper's experiments take ``beta_1=0``."""

    sort = "fedadagrad"

    def adapt(self, v: Array, square: Array) -> None:
        """See :meth:`FedOpt.adapt`."""
        v += square
