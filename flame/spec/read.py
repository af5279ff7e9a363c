"""Text -> plain data: JSON and YAML as people write them, with every complaint naming the line or the place.

Both give the same plain data: dictionaries with text keys, lists, text, numbers, booleans and None. A key
``//`` is a comment and is dropped at any depth. A key that stands twice in one object is refused, because
the parsers would silently keep the last. YAML is read by the rules of its version 1.2, so that ``no`` (Norway)
is text and ``1e-3`` is a number. What a file may cost is bounded: size, depth, and the number of values
that its aliases unfold to.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path as FilePath
from typing import Any, NoReturn

from flame.errors import SpecError, UsageError
from flame.spec.places import Path, dotted

#: Largest file that is read, in bytes.
MAX_BYTES = 16 * 1024 * 1024
#: Most values in a file, after its YAML aliases are unfolded, and how deep they may lie in each other.
MAX_VALUES = 500_000
MAX_DEPTH = 64

COMMENT = "//"
SUFFIXES = (".json", ".yaml", ".yml")


class _Object(dict[str, Any]):
    """A parsed object that remembers a key which stood in it twice."""

    twice: str | None = None


def _collect(pairs: list[tuple[str, Any]]) -> _Object:
    collected = _Object()
    for key, value in pairs:
        if key in collected and key != COMMENT and collected.twice is None:
            collected.twice = key
        collected[key] = value
    return collected


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows")


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_collect, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"this is no JSON: {error.msg}.", f"{name}: line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise SpecError(f"values lie more than {MAX_DEPTH} deep in each other.", name) from error
    except ValueError as error:
        raise SpecError(f"this is no JSON: {error}.", name) from error


def _yaml_loader() -> Any:
    """PyYAML's safe loader with the scalars of YAML 1.2 and objects that notice a key given twice."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}

    def scalar(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))

    scalar("null", r"^(?:~|null|Null|NULL|)$", "~nN\0")
    Loader.yaml_implicit_resolvers.setdefault("", []).extend(Loader.yaml_implicit_resolvers.pop("\0"))
    scalar("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
    scalar("int", r"^[-+]?[0-9]+$", "-+0123456789")
    scalar("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789")
    scalar("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")
    scalar("merge", r"^<<$", "<")

    def integer(loader: Any, node: Any) -> int:
        return int(node.value)

    def mapping(loader: Any, node: Any) -> _Object:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "a mapping is expected", node.start_mark)
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next(
            (key for at, key in enumerate(written) if key in written[:at] and key not in (COMMENT, "<<")), None
        )
        loader.flatten_mapping(node)
        collected = _Object()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            collected[key.value] = loader.construct_object(value, deep=True)
        collected.twice = twice
        return collected

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_loader())  # noqa: S506 - a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}: line {mark.line + 1}, column {mark.column + 1}" if mark else name
        raise SpecError(f"this is no YAML: {error.problem or error.context}.", place) from error
    except RecursionError as error:
        raise SpecError(f"values lie more than {MAX_DEPTH} deep in each other.", name) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise SpecError(f"this is no YAML: {' '.join(str(error).split())}.", name) from error


class _Cleaner:
    """Walks parsed data once: drops comments, refuses keys given twice and what JSON has no word for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = 0

    def place(self, path: Path) -> str:
        return f"{self.name}: {dotted(path)}" if path else self.name

    def clean(self, value: Any, path: Path = ()) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise SpecError(f"the file unfolds to more than {MAX_VALUES} values.", self.name)
        if len(path) > MAX_DEPTH:
            raise SpecError(f"values lie more than {MAX_DEPTH} deep in each other.", self.name)
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, int | float):
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError("infinity and not-a-number cannot be used here.", self.place(path))
            return value
        if isinstance(value, dict):
            twice = getattr(value, "twice", None)
            if twice is not None:
                raise SpecError(f"the key {twice!r} stands here twice; keep one of them.", self.place(path))
            return {key: self.clean(inner, (*path, key)) for key, inner in value.items() if key != COMMENT}
        if isinstance(value, list):
            return [self.clean(inner, (*path, index)) for index, inner in enumerate(value)]
        raise SpecError(
            f"a YAML value of type {type(value).__name__} cannot be used; put it in quotes.", self.place(path)
        )


def parse(text: str | bytes, name: str, *, json_only: bool | None = None) -> Any:
    """Parse JSON or YAML.

    :param text: the text; bytes must be UTF-8.
    :param name: the file's name, for complaints. One that ends in ``.json`` is read as JSON, anything else as YAML
        (of which JSON is a part), unless ``json_only`` says otherwise.
    :raises flame.errors.SpecError: it cannot be read; says where.
    """
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise SpecError(f"the file is larger than {MAX_BYTES >> 20} MiB.", name)
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SpecError(f"the file is no UTF-8 text (byte {error.start}).", name) from error
    if json_only is None:
        json_only = name.lower().endswith(".json")
    # A tab may indent JSON but not YAML, so what looks like JSON is tried as that, whatever the file's name.
    if json_only or text.lstrip()[:1] in ("{", "["):
        try:
            data = _parse_json(text, name)
        except SpecError:
            if json_only:
                raise
            data = _parse_yaml(text, name)
    else:
        data = _parse_yaml(text, name)
    try:
        return _Cleaner(name).clean(data)
    except RecursionError as error:
        raise SpecError(f"values lie more than {MAX_DEPTH} deep in each other.", name) from error


def read(path: FilePath, name: str | None = None) -> Any:
    """Read and parse a file.

    :param name: what to call it in complaints; its path where there is no shorter name.
    :raises flame.errors.UsageError: it cannot be opened.
    :raises flame.errors.SpecError: it cannot be parsed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name or path} cannot be read: {reason}.") from error
    return parse(content, name or str(path))


def reach(base: FilePath, written: str, where: str) -> FilePath:
    """The absolute path that a file or a command line means; it need not exist.

    :param base: where relative paths begin. ``~`` is the home directory.
    :raises flame.errors.SpecError: it cannot be a path: too long, a loop of links, nobody's home.
    """
    try:
        path = (base / FilePath(written).expanduser()).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"{written!r} cannot be used as a path: {getattr(error, 'strerror', None) or error}.", where
        ) from error
    return path


def files_in(folder: FilePath) -> list[FilePath]:
    """The files of a folder, by name.

    :raises flame.errors.UsageError: it cannot be listed.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror or error}.") from error


def read_noun(source: str | FilePath) -> tuple[Any, str]:
    """Read a file, or standard input when ``source`` is ``-``; gives the data and the name for complaints."""
    if str(source) == "-":
        return parse(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input"), "standard input"
    return read(reach(FilePath.cwd(), str(source), str(source)), str(source)), str(source)
