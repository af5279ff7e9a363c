"""Plain data -> forms. The types in :mod:`flame.spec.nouns` decide; this module explains a refusal in plain words.

The conversion is msgspec's. Only when it refuses, the data are walked once more beside the types to find
the first thing that does not fit, because a user needs the place, what is there, and what may be there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from flame.errors import SpecError
from flame.spec.places import Path, Places

T = TypeVar("T")


def listing(names: Iterable[str], most: int = 24) -> str:
    """Names for a sentence: ``'a', 'b' and 'c'``; a long list is cut."""
    words = [repr(name) for name in names]
    if len(words) > most:
        words = [*words[:most], f"{len(words) - most} more"]
    if not words:
        return "none"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def suggestion(name: str, names: Iterable[str], what: str) -> str:
    """The end of a sentence about an unknown name: the likely one, or all there are.

    :param what: the names as a plural, such as ``the roles``.
    """
    import difflib  # only a refusal needs it

    names = list(names)
    folded = {other.casefold(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return f"{what} are {listing(names)}." if names else f"{what}: there are none."


def shape(data: Any, cls: type[T], places: Places | None = None) -> T:
    """Make a form of plain data.

    :param places: where the data were written; addressed from the root of ``data``.
    :raises flame.errors.SpecError: they do not fit; one sentence, with the place.
    """
    try:
        return msgspec.convert(data, cls)
    except (msgspec.ValidationError, RecursionError) as error:
        places = places or Places()
        found = _first_misfit(data, _type_info(cls), ())
        if found is None:
            raise SpecError(f"this does not fit: {error}.", places.where() or None) from error
        path, sentence = found
        raise SpecError(sentence, places.where(*path) or None) from error


def _type_info(cls: Any) -> Any:
    import msgspec.inspect

    return msgspec.inspect.type_info(cls)


def _first_misfit(value: Any, kind: Any, path: Path) -> tuple[Path, str] | None:
    """The first place where ``value`` does not fit the type, and the sentence about it."""
    from msgspec import inspect

    if isinstance(kind, inspect.AnyType):
        return None
    if isinstance(kind, inspect.UnionType):
        if value is None and any(isinstance(one, inspect.NoneType) for one in kind.types):
            return None
        rest = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
        return _first_misfit(value, rest[0], path)
    if isinstance(kind, inspect.StructType):
        return _struct_misfit(value, kind, path)
    if isinstance(kind, inspect.ListType):
        if not isinstance(value, list):
            return path, f"must be a list, not {describe(value)}."
        return next(
            (f for i, inner in enumerate(value) if (f := _first_misfit(inner, kind.item_type, (*path, i)))), None
        )
    if isinstance(kind, inspect.DictType):
        if not isinstance(value, dict):
            return path, f"must be an object (keys with values), not {describe(value)}."
        inner = kind.value_type
        return next((f for key, one in value.items() if (f := _first_misfit(one, inner, (*path, key)))), None)
    return _scalar_misfit(value, kind, path)


def _struct_misfit(value: Any, kind: Any, path: Path) -> tuple[Path, str] | None:
    if not isinstance(value, dict):
        return path, f"must be an object (keys with values), not {describe(value)}."
    fields = {one.encode_name: one for one in kind.fields}
    for key in value:
        if key not in fields and kind.forbid_unknown_fields:
            return path, f"unknown key {key!r}; {suggestion(key, fields, 'the keys here')}"
    for key, one in fields.items():
        if key in value:
            found = _first_misfit(value[key], one.type, (*path, key))
            if found:
                return found
        elif one.required:
            return path, f"the key {key!r} is missing."
    return None


def _scalar_misfit(value: Any, kind: Any, path: Path) -> tuple[Path, str] | None:
    from msgspec import inspect

    if isinstance(kind, inspect.StrType):
        fits = isinstance(value, str)
        if fits and kind.min_length and len(value) < kind.min_length:
            return path, "must not be empty."
        if fits and kind.max_length and len(value) > kind.max_length:
            return path, f"must have at most {kind.max_length} characters."
        hint = "; put it in quotes" if isinstance(value, int | float) else ""
        return None if fits else (path, f"must be text, not {describe(value)}{hint}.")
    if isinstance(kind, inspect.BoolType):
        return None if isinstance(value, bool) else (path, f"must be true or false, not {describe(value)}.")
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        whole = isinstance(kind, inspect.IntType)
        what = "a whole number" if whole else "a number"
        if kind.ge is not None:
            what += f" of at least {kind.ge}"
        if kind.gt is not None:
            what += f" greater than {kind.gt}"
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if fits and ((kind.ge is not None and value < kind.ge) or (kind.gt is not None and value <= kind.gt)):
            fits = False
        return None if fits else (path, f"must be {what}, not {describe(value)}.")
    return None


def describe(value: Any) -> str:
    """A value for a sentence: what it is, and itself where it is short."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"the text {value[:37]!r}..."
    if isinstance(value, int | float):
        return str(value)
    return "a list" if isinstance(value, list) else "an object"
