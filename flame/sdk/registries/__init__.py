"""Where metrics and models go. A job names a kind (``registry: {sort: mlflow, uri: ...}``); one kind a file.

``register("mine", MyRegistry)`` adds one, and so does an entry point in the group ``flame.registries``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.sdk.plugins import Plugins
from flame.sdk.registries.base import Registry, Version

if TYPE_CHECKING:
    from flame.sdk.config import Config
    from flame.sdk.link import Link

_HERE = "flame.sdk.registries"

#: Every registry by name. ``default`` is what a job means that names none and was not told better by a server.
registries: Plugins[Registry] = Plugins(
    "registry",
    "flame.registries",
    {
        "default": f"{_HERE}.local:LocalRegistry",
        "dummy": f"{_HERE}.dummy:DummyRegistry",
        "local": f"{_HERE}.local:LocalRegistry",
        "mlflow": f"{_HERE}.mlflow:MlflowRegistry",
    },
)
names = registries.names
register = registries.register


def open_registry(config: Config, link: Link) -> Registry:
    """The registry that a job names, opened for its run.

    :raises flame.errors.SpecError: there is no such kind.
    :raises flame.errors.MissingExtra: the kind needs a package that is not installed.
    """
    return registries.load(config.registry.sort)(config, link)


__all__ = ["Registry", "Version", "names", "open_registry", "register", "registries"]
