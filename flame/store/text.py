"""What the stores have in common: bodies as JSON text, and the fields that lists can be filtered by."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from flame.errors import StoreError

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_text(what: str, body: dict[str, Any]) -> str:
    """A body as JSON.

    :param what: names the body in the message.
    :raises flame.errors.StoreError: it is no JSON.
    """
    try:
        return msgspec.json.encode(body).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} cannot be stored, since it is no JSON: {error}.") from error


def is_field(name: str) -> bool:
    """True for a name that lists can be filtered by; it is safe inside a statement of a database."""
    return _FIELD.fullmatch(name) is not None


def check_field(name: str) -> str:
    """The name of a field, if lists can be filtered by it.

    :raises flame.errors.StoreError: they cannot.
    """
    if not is_field(name):
        raise StoreError(f"Lists cannot be filtered by {name!r}, only by a field's name.")
    return name
