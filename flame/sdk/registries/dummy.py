"""The registry that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from flame.errors import WorkerError
from flame.sdk.registries.base import Registry, Version


class DummyRegistry(Registry):
    """For jobs whose metrics and model need not outlive what the server keeps of them."""

    sort = "dummy"

    def save_params(self, params: Mapping[str, Any]) -> None:
        """Does nothing."""

    def save_metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def save_model(self, name: str, model: Any, path: Path) -> None:
        """Does nothing."""

    def load_model(self, name: str, version: int) -> dict[str, npt.NDArray[Any]]:
        """Refuses: there is nothing here."""
        raise WorkerError(
            f"baseModel {name!r} version {version} cannot be loaded: the registry of this job is 'dummy', which keeps no "
            "models. Name another one in registry.sort."
        )

    def finish(self, timeout: float) -> Version | None:
        """Nothing is kept."""
        return None
