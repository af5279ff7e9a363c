"""Lets scripts written for Flame's earlier library run as they are.

There the library's modules lay directly in ``flame`` (``flame.config``, ``flame.mode.horizontal.trainer``); here they are in
:mod:`flame.sdk`, beside the control plane's. An import of ``flame.X`` that names nothing in ``flame`` itself is
answered with the module ``flame.sdk.X``: the same object under a second name, so a class is one class however it was
imported. Names that exist in neither place fail as ever.

One finder on ``sys.meta_path`` does it. It stands first, because the ordinary finder would otherwise load
``flame.mode.composer`` a second time from the folder of the aliased package ``flame.mode``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_ROOT = "flame."
_HOME = "flame.sdk."


class AliasFinder:
    """Finds ``flame.X`` as ``flame.sdk.X``; also the loader of what it has found."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if not name.startswith(_ROOT) or name.startswith(_HOME) or name == "flame.sdk":
            return None
        first, _, rest = name[len(_ROOT) :].partition(".")
        if rest:
            # Below a package of the control plane nothing is aliased.
            parent = sys.modules.get(_ROOT + first)
            if parent is None or not parent.__name__.startswith(_HOME):
                return None
        elif PathFinder.find_spec(name, path) is not None:
            return None
        home = _HOME + name[len(_ROOT) :]
        if home not in sys.modules:
            package = import_module(home.rpartition(".")[0])
            if PathFinder.find_spec(home, getattr(package, "__path__", [])) is None:
                return None
        return ModuleSpec(name, self, origin=home)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of the SDK itself."""
        assert spec.origin is not None
        module = import_module(spec.origin)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; only the spec that the import system has just put over its own is taken back."""
        alias = module.__spec__
        if alias is not None:
            module.__spec__ = self._specs.pop(alias.name, alias)


def install() -> None:
    """Put the finder in place, once."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
