"""``--set hyperparameters.rounds=5``: single values of a job, changed from the command line.

A path is written as in a file: keys joined with dots, a list's entry by its number or its name in brackets
(``schema.roles[0].replica``, ``schema.roles[trainer].replica``). The keys of a modelSpec need not say
``modelSpec``. The value is YAML: a number, ``true``, text, ``[a, b]``, ``{sort: random, kwargs: {k: 2}}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from flame.errors import UsageError
from flame.spec import normal
from flame.spec.nouns import JobForm
from flame.spec.places import Path, Places, dotted
from flame.spec.read import parse
from flame.spec.shape import listing, shape, suggestion

_STEP = re.compile(r"""\.?(?:\["([^"]*)"\]|\[([^\[\]"]+)\]|([^.\[\]=]+))""")


def split(override: str) -> tuple[list[str], str]:
    """``a.b[0]=c`` -> ``(["a", "b", "0"], "c")``."""
    path, equals, value = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override}: write it as path=value, such as hyperparameters.rounds=5.")
    steps: list[str] = []
    at = 0
    path = path.strip()
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None or (at == 0 and path.startswith(".")):
            raise UsageError(f"--set {override}: {path!r} is no path such as schema.roles[0].replica.")
        steps.append(next(group for group in match.groups() if group is not None).strip())
        at = match.end()
    if not steps:
        raise UsageError(f"--set {override}: the path before the = is missing.")
    return steps, value


def apply_overrides(
    form: JobForm, overrides: Iterable[str], places: Places | None = None, notes: list[str] | None = None
) -> JobForm:
    """The form with single values changed.

    :param overrides: ``path=value``, applied in order.
    :param places: where the form was written; learns that these values come from the command line.
    :param notes: gets a sentence for each hyperparameter or argument that was not there before.
    :raises flame.errors.UsageError: a path leads nowhere; the text lists what is there.
    :raises flame.errors.SpecError: a value does not fit.
    """
    overrides = list(overrides)
    if not overrides:
        return form
    places = places or Places()
    data = msgspec.to_builtins(form)
    for override in overrides:
        steps, text = split(override)
        path = _set(data, steps, text, f"--set {override}", notes if notes is not None else [])
        places.put(path, f"--set {override}")
    return shape(data, JobForm, places)


def _set(data: dict[str, Any], steps: list[str], text: str, name: str, notes: list[str]) -> Path:
    from msgspec import inspect

    kind: Any = inspect.type_info(JobForm)
    if steps[0] in normal.MODEL_KEYS:
        steps = ["modelSpec", *steps]
    node: Any = data
    path: Path = ()
    for at, step in enumerate(steps):
        last = at == len(steps) - 1
        kind = _plain(kind)
        if isinstance(kind, inspect.StructType):
            fields = {field.encode_name: field.type for field in kind.fields}
            if step not in fields:
                there = [*fields, *normal.MODEL_KEYS] if not path else list(fields)
                raise UsageError(
                    f"{name}: there is no {step!r}{_inside(path)}; {suggestion(step, there, 'the keys there')}"
                )
            key: str | int = step
            kind = fields[step]
        elif isinstance(kind, inspect.DictType):
            key = step
            kind = kind.value_type
            if last and step not in node:
                notes.append(f"{name}: {dotted((*path, step))} is new; there were {listing(node, 30)}.")
        elif isinstance(kind, inspect.ListType):
            key = _index(node, step, path, name)
            kind = kind.item_type
        elif isinstance(node, dict):
            key = step
        elif isinstance(node, list):
            key = _index(node, step, path, name)
        else:
            raise UsageError(f"{name}: {dotted(path)} is a single value; there is no {step!r} in it.")
        path = (*path, key)
        holder: Any = node
        if last:
            holder[key] = _value(text, kind, name)
        else:
            node = holder.get(key) if isinstance(key, str) else holder[key]
            if node is None:
                node = holder[key] = [] if isinstance(_plain(kind), inspect.ListType) else {}
    return path


def _plain(kind: Any) -> Any:
    """A type without its ``None``."""
    from msgspec import inspect

    if isinstance(kind, inspect.UnionType):
        return next(one for one in kind.types if not isinstance(one, inspect.NoneType))
    return kind


def _inside(path: Path) -> str:
    return f" in {dotted(path)}" if path else ""


def _index(node: Any, step: str, path: Path, name: str) -> int:
    """Which entry of a list is meant: by number, or by its name (a role's, in a dataSpec)."""
    names = [str(one.get("name", one.get("role", ""))) if isinstance(one, dict) else str(one) for one in node]
    if step in names:
        return names.index(step)
    if step.isdecimal() and int(step) < len(node):
        return int(step)
    there = f"it has {len(node)} entries, {listing(names)}" if node else "it is empty"
    raise UsageError(f"{name}: there is no entry {step!r}{_inside(path)}; {there}.")


def _value(text: str, kind: Any, name: str) -> Any:
    from msgspec import inspect

    value = parse(text, name, json_only=False)
    plain = _plain(kind)
    if isinstance(plain, inspect.StrType) and isinstance(value, int | float):
        return text.strip()
    if isinstance(plain, inspect.StructType) and {"sort"} <= {field.encode_name for field in plain.fields}:
        return normal.choice(value)
    return value
