"""Helpers that scripts written for Flame's library import from ``flame.common.util``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from flame.errors import WorkerError
from flame.sdk.common.constants import DeviceType
from flame.sdk.config import Config
from flame.sdk.weights import is_torch


class MLFramework(Enum):
    """The library that a role's models are of."""

    UNKNOWN = 1
    PYTORCH = 2
    TENSORFLOW = 3


valid_frameworks = ["pytorch", "tensorflow"]


def get_ml_framework_in_use() -> MLFramework:
    """The library that the role's code has imported so far."""
    if "torch" in sys.modules:
        return MLFramework.PYTORCH
    if "tensorflow" in sys.modules or "keras" in sys.modules:
        return MLFramework.TENSORFLOW
    return MLFramework.UNKNOWN


def weights_to_device(weights: Mapping[str, Any] | Sequence[Any], dtype: DeviceType) -> Any:
    """PyTorch weights on the CPU or the GPU; anything else as it is."""
    return _moved(weights, "cpu" if dtype is DeviceType.CPU else "cuda")


def weights_to_model_device(weights: Mapping[str, Any] | Sequence[Any], model: Any) -> Any:
    """PyTorch weights on the device of a module; anything else as it is."""
    return _moved(weights, next(model.parameters()).device) if is_torch(model) else weights


def delta_weights_pytorch(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``a - b`` by name; None where one of them is None."""
    return None if a is None or b is None else {name: a[name] - b[name] for name in a}


def delta_weights_tensorflow(a: Sequence[Any] | None, b: Sequence[Any] | None) -> list[Any] | None:
    """``a - b`` in order; None where one of them is None."""
    return None if a is None or b is None else [x - y for x, y in zip(a, b, strict=True)]


def get_dataset_filename(url: str) -> str:
    """The last part of a dataset's URL."""
    return PurePosixPath(unquote(urlsplit(url).path)).name


def mlflow_runname(config: Config) -> str:
    """What Flame's library calls a worker's run: its role, group and task."""
    groups = "".join(f"{group}-" for group in config.group_association.values() if group in config.realm)
    return f"{config.role}-{groups}{config.task_id[:8]}"


def install_package(package: str) -> bool:
    """Install a package with pip unless it is there; a job does better to name it in ``dependencies``."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return subprocess.run([sys.executable, "-m", "pip", "install", package], check=False).returncode == 0
    return True


def install_packages(packages: Iterable[str]) -> None:
    """Install packages with pip unless they are there.

    :raises flame.errors.WorkerError: one could not be installed.
    """
    for package in packages:
        if not install_package(package):
            raise WorkerError(f"The package {package!r} could not be installed; name it in the job's dependencies.")


def _moved(weights: Any, device: Any) -> Any:
    if isinstance(weights, Mapping):
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in weights.items()}
    return weights
