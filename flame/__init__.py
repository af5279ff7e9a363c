"""Flame: compose, deploy and manage federated learning jobs. See README.md and docs/architecture.md."""

from flame import _aliases

__version__ = "0.1.0"

_aliases.install()
