"""The interface of a registry: where a job's parameters, metrics and models are kept after it has ended.

A registry must never hold up a round. What its calls are given they take in at once; what is slow or may fail happens in
the background, and :meth:`Registry.finish` alone waits, for a bounded time.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy.typing as npt

if TYPE_CHECKING:
    from flame.sdk.config import Config
    from flame.sdk.link import Link


class Version(NamedTuple):
    """A registered model: its place in the registry and its version there."""

    uri: str
    version: str


class Registry(abc.ABC):
    """One kind of registry, opened for one run of a job.

    :param config: the task's configuration; ``config.registry.uri`` says where.
    :param link: how the user is told of trouble.
    """

    #: The name by which a job chooses it.
    sort: ClassVar[str]

    def __init__(self, config: Config, link: Link) -> None:
        self.config = config
        self.link = link

    def setup_run(self, name: str = "") -> None:
        """Flame's library opens a run so; here it is open already."""

    @abc.abstractmethod
    def save_params(self, params: Mapping[str, Any]) -> None:
        """Keep the hyperparameters."""

    @abc.abstractmethod
    def save_metrics(self, round: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a round."""

    @abc.abstractmethod
    def save_model(self, name: str, model: Any, path: Path) -> None:
        """Keep a model as a new version.

        :param name: the registered model's name.
        :param model: the object, see :mod:`flame.sdk.weights`.
        :param path: its weights as a safetensors file, which may be gone after :meth:`finish`.
        """

    @abc.abstractmethod
    def load_model(self, name: str, version: int) -> dict[str, npt.NDArray[Any]]:
        """The weights of a registered model.

        :raises flame.errors.WorkerError: there is none of that name and version, or the registry cannot be reached.
        """

    @abc.abstractmethod
    def finish(self, timeout: float) -> Version | None:
        """The job is done: wait until all is kept, at the longest ``timeout`` seconds. Gives the model's version.

        None, after a warning to the user, when the registry did not take it in time; or when it keeps no models.
        """

    def close(self) -> None:
        """Let go. Before :meth:`finish` it means that the job has failed. Safe to call again."""

    cleanup = close
