"""Attributes that a subclass must set, as Flame's library declares them."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

__all__ = ["ABCMeta", "abstract_attribute"]


def abstract_attribute(function: Callable[..., Any]) -> property:
    """Declares an attribute that a subclass sets; reading it before that is an AttributeError in words."""

    def read(instance: Any) -> Any:
        try:
            return instance.__dict__[function.__name__]
        except KeyError:
            raise AttributeError(f"{type(instance).__name__} must set self.{function.__name__}.") from None

    def write(instance: Any, value: Any) -> None:
        instance.__dict__[function.__name__] = value

    return property(read, write, doc=function.__doc__)
