"""Durable event streams that flamelets and clients follow and resume."""

from __future__ import annotations

from flame.notifier.notifier import Notifier

__all__ = ["Notifier"]
