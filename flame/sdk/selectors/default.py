"""Everyone takes part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.sdk.selectors.base import EndLike, Selector


class Default(Selector):
    """All ends that are there."""

    sort = "default"

    def select(self, ends: Mapping[str, EndLike], channel_props: Mapping[str, Any]) -> list[str]:
        """See :meth:`Selector.select`."""
        return list(ends)
