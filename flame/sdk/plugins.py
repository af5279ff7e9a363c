"""Choosing a part by name: optimizers, selectors, datasamplers, privacies, backends, registries.

A job names such a part (``{"sort": "fedadam", "kwargs": {...}}``). The parts that ship with Flame are listed by name and
place only, so that choosing one imports that one file. A user's own part comes by :meth:`Plugins.register`, or
from an installed package that declares it in the entry point group of its kind.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from flame.errors import SpecError

T = TypeVar("T")


class Plugins(Generic[T]):
    """All parts of one kind, by name.

    :param kind: what one is called in a message, such as ``optimizer``.
    :param group: the entry point group in which other packages declare theirs, such as ``flame.optimizers``.
    :param builtin: name -> ``module:attribute`` of those that ship with Flame.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self.builtin = dict(builtin)
        self._registered: dict[str, Callable[..., T]] = {}

    def register(self, name: str, factory: Callable[..., T]) -> None:
        """Add a part, or replace one, for this process.

        :param factory: a class, or a function with the same keyword arguments.
        """
        self._registered[name] = factory

    def names(self) -> list[str]:
        """Every name that :meth:`load` knows, sorted."""
        return sorted({*self.builtin, *self._registered, *self._entry_points()})

    def load(self, name: str) -> Callable[..., T]:
        """The class (or factory) of that name; imports its module.

        :raises flame.errors.SpecError: there is none; the text suggests the nearest name.
        """
        if name in self._registered:
            return self._registered[name]
        place = self.builtin.get(name) or self._folded.get(fold(name))
        if place is not None:
            module, _, attribute = place.partition(":")
            factory: Callable[..., T] = getattr(import_module(module), attribute)
            return factory
        point = self._entry_points().get(name)
        if point is not None:
            found: Callable[..., T] = point.load()
            return found
        raise SpecError(f"There is no {self.kind} {name!r}. {suggest(name, self.names())}")

    @property
    def _folded(self) -> dict[str, str]:
        """The built-in ones, under names whose case and dashes do not matter, as :mod:`flame.spec.known` reads them."""
        return {fold(name): place for name, place in self.builtin.items()}

    def make(self, name: str, kwargs: Mapping[str, Any] | None = None) -> T:
        """Construct the part of that name.

        :param kwargs: its keyword arguments, as the job gives them.
        :raises flame.errors.SpecError: no such part, or an argument that it does not take, or a value that cannot be.
        """
        factory = self.load(name)
        kwargs = dict(kwargs or {})
        self._check_arguments(name, factory, kwargs)
        return factory(**kwargs)

    def _check_arguments(self, name: str, factory: Callable[..., T], kwargs: Mapping[str, Any]) -> None:
        parameters = inspect.signature(factory).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return
        known = {each.name: each.default is each.empty for each in parameters if each.kind is not each.VAR_POSITIONAL}
        for key in kwargs:
            if key not in known:
                raise SpecError(f"The {self.kind} {name!r} takes no argument {key!r}. {suggest(key, known)}")
        for key, required in known.items():
            if required and key not in kwargs:
                raise SpecError(f"The {self.kind} {name!r} needs the argument {key!r}; give it in kwargs.")

    def _entry_points(self) -> dict[str, Any]:
        from importlib.metadata import entry_points  # slow to import, and only foreign names need it

        return {point.name: point for point in entry_points(group=self.group)}


def fold(name: str) -> str:
    """A name without what may be spelt in several ways: case, dashes, underscores, blanks."""
    return name.casefold().translate({ord(each): None for each in "-_ "})


def suggest(word: str, known: Iterable[str]) -> str:
    """A sentence that helps with a mistyped word: the nearest known one, or all of them."""
    names = sorted(known)
    if not names:
        return "It takes none."
    near = difflib.get_close_matches(word.lower(), names, n=1) or [name for name in names if word.lower() in name]
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."


def number(
    name: str, value: Any, *, above: float | None = None, low: float | None = None, below: float | None = None
) -> float:
    """Check a numeric argument of a part.

    :param above: the value must be greater than this.
    :param low: the least value allowed.
    :param below: the value must be less than this.
    :raises flame.errors.SpecError: it is not a number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{name} must be a finite number, not {value!r}.", "kwargs")
    bounds = []
    if above is not None:
        bounds.append((value > above, f"above {above:g}"))
    if low is not None:
        bounds.append((value >= low, f"at least {low:g}"))
    if below is not None:
        bounds.append((value < below, f"below {below:g}"))
    if not all(held for held, _ in bounds):
        raise SpecError(f"{name} must be {' and '.join(text for _, text in bounds)}, not {value!r}.", "kwargs")
    return float(value)


def integer(name: str, value: Any, *, low: int | None = None) -> int:
    """Check an integer argument of a part.

    :param low: the least value allowed.
    :raises flame.errors.SpecError: it is not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f"{name} must be an integer, not {value!r}.", "kwargs")
    if low is not None and value < low:
        raise SpecError(f"{name} must be at least {low}, not {value}.", "kwargs")
    return value
