"""Updates leave as they are."""

from __future__ import annotations

from flame.sdk.optimizers.base import Weights
from flame.sdk.privacy.base import Privacy


class Default(Privacy):
    """Changes nothing and promises nothing."""

    sort = "default"

    def apply(self, weights: Weights, start: Weights) -> Weights:
        """See :meth:`Privacy.apply`."""
        return weights
