"""Start, list and end workers.

A runner is chosen by its kind. Those that come with Flame are listed here; another package adds one by
an entry point of the group ``flame.runners``, named like its kind.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flame.errors import SpecError, UsageError
from flame.runners.base import Capacity, ExitCallback, Runner, WorkerExit, WorkerInfo, WorkerSpec
from flame.runners.secret import Secret, read_secret

__all__ = [
    "Capacity",
    "ExitCallback",
    "Runner",
    "Secret",
    "WorkerExit",
    "WorkerInfo",
    "WorkerSpec",
    "kinds",
    "make_runner",
    "read_config",
    "runner_for",
]

_GROUP = "flame.runners"
#: Imported when they are asked for, since each may need packages that only it needs.
_KINDS = {
    "docker": "flame.runners.docker:DockerRunner",
    "kubernetes": "flame.runners.kubernetes:KubernetesRunner",
    "local": "flame.runners.local:LocalRunner",
}


def runner_for(kind: str) -> type[Runner]:
    """The class of runners of a kind.

    :raises flame.errors.UsageError: there is no such kind.
    :raises flame.errors.MissingExtra: the kind needs a package that is not installed.
    """
    if kind in _KINDS:
        module, _, name = _KINDS[kind].partition(":")
        loaded = getattr(importlib.import_module(module), name)
    else:
        points = importlib.metadata.entry_points(group=_GROUP)
        if kind not in points.names:
            raise UsageError(f"There is no kind of compute {kind!r}; known are: {', '.join(kinds())}.")
        loaded = points[kind].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Runner)):
        raise UsageError(f"What is registered as the kind of compute {kind!r} is no flame.runners.Runner: {loaded!r}.")
    return loaded


def kinds() -> list[str]:
    """The kinds of compute that there are, also those whose packages are missing."""
    return sorted({*_KINDS, *importlib.metadata.entry_points(group=_GROUP).names})


def read_config(kind: str, config: Mapping[str, Any]) -> msgspec.Struct:
    """A compute's configuration, checked against its kind.

    :param config: as a user writes it, in camelCase.
    :raises flame.errors.UsageError: there is no such kind.
    :raises flame.errors.SpecError: the configuration does not fit the kind.
    :raises flame.errors.MissingExtra: the kind needs a package that is not installed.
    """
    runner = runner_for(kind)
    try:
        return msgspec.convert(dict(config), runner.Config, dec_hook=read_secret)
    except msgspec.ValidationError as error:
        raise SpecError(f"{error}.", where=f"configuration of a {kind} compute") from error


def make_runner(kind: str, config: Mapping[str, Any], *, instance: str, data_dir: Path) -> Runner:
    """Make a runner from a compute's registered configuration.

    :param config: the kind's configuration as a user writes it, in camelCase.
    :param instance: the server's id.
    :param data_dir: the server's data directory.
    :raises flame.errors.UsageError: there is no such kind.
    :raises flame.errors.SpecError: the configuration does not fit the kind.
    """
    return runner_for(kind)(read_config(kind, config), instance=instance, data_dir=data_dir)
