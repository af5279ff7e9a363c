"""What a server refuses, as the error that it is."""

from __future__ import annotations

import msgspec

from flame import errors
from flame.errors import FlameError
from flame.sessions import dialing

_ERRORS = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, FlameError)}


def refusal(kind: str, message: str) -> FlameError:
    """The error of a name, whose class may have another way of being made."""
    cls = _ERRORS.get(kind, errors.ServerError)
    error = FlameError.__new__(cls)
    FlameError.__init__(error, message)
    return error


def of_door(refused: dialing.Refused) -> FlameError:
    """The error of an answer to the request for a connection."""
    try:
        form = msgspec.json.decode(refused.body)["error"]
        return refusal(str(form["type"]), str(form["message"]))
    except (msgspec.MsgspecError, LookupError, TypeError):
        return refused
