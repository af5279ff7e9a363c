"""Texts in the configuration of a compute that nobody may read in a log, a list or a message: tokens and passwords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

#: What is answered in place of a secret; who sends it back leaves the secret as it is.
MASK = "***"


class Secret:
    """A text that is kept and used, but never shown: to print, format or encode it gives ``***``.

    A field of this type in a runner's ``Config`` is written by users as plain text.

    :param text: the secret.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text, for the one call that needs it."""
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __str__(self) -> str:
        return MASK

    __repr__ = __str__


def read_secret(of: type, value: Any) -> Any:
    """For msgspec: make a secret of a text.

    :raises TypeError: it is no text. (msgspec makes a ValidationError with the place of it.)
    """
    if of is not Secret:
        raise NotImplementedError(f"configurations do not hold {of!r}")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return Secret(value)


def masked(config: Mapping[str, Any], typed: msgspec.Struct | None) -> dict[str, Any]:
    """A configuration as it may be shown.

    :param config: what was registered.
    :param typed: the same, as the kind's type; None where the kind cannot be loaded, and then no text is shown.
    """
    if typed is None:
        return {key: _all_masked(value) for key, value in config.items()}
    shown = msgspec.to_builtins(typed, enc_hook=str)
    return {key: _along(value, shown.get(key)) for key, value in config.items()}


def unmasked(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A changed configuration with the secrets that were sent back unread put in again.

    :param config: what a user sends.
    :param before: what is registered.
    """
    return {key: _restored(value, before.get(key)) for key, value in config.items()}


def _along(value: Any, shown: Any) -> Any:
    """``value``, masked where ``shown`` is; only what the user has written, not what the type fills in."""
    if isinstance(value, Mapping) and isinstance(shown, Mapping):
        return {key: _along(one, shown.get(key)) for key, one in value.items()}
    if isinstance(value, list) and isinstance(shown, list) and len(value) == len(shown):
        return [_along(one, other) for one, other in zip(value, shown, strict=True)]
    return MASK if shown == MASK else value


def _all_masked(value: Any) -> Any:
    if isinstance(value, str):
        return MASK
    if isinstance(value, Mapping):
        return {key: _all_masked(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_all_masked(one) for one in value]
    return value


def _restored(value: Any, before: Any) -> Any:
    if value == MASK and isinstance(before, str):
        return before
    if isinstance(value, Mapping) and isinstance(before, Mapping):
        return {key: _restored(one, before.get(key)) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str) and isinstance(before, list):
        return [_restored(one, before[at] if at < len(before) else None) for at, one in enumerate(value)]
    return value
