"""The code of an application that is given inline: from a class or a function to a bundle of source files.

Nothing of the objects themselves travels, only source: the file of the module that defines it, or the package. A script's own
module travels under the script's name, so that what it does under ``if __name__ == "__main__"`` does not happen again. In a notebook
there is no file; there the source of what is defined is gathered, with what it refers to.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from flame.errors import UsageError
from flame.spec import bundle

_PLAIN = (int, float, str, bool, bytes, type(None))


class Code(NamedTuple):
    """``module:Name``, and the bundle with the module; None where it is installed anyway."""

    entry: str
    bundle: bytes | None

    @property
    def digest(self) -> str | None:
        """The bundle's SHA-256."""
        return None if self.bundle is None else bundle.digest(self.bundle)


def gather(what: Any, folder: str | Path | None = None) -> Code:
    """The code of a class or a function.

    :param folder: all of this folder's files travel, and the module is looked for there.
    :raises flame.errors.UsageError: it has no source, or is not defined at the top of its module.
    """
    name = getattr(what, "__qualname__", None)
    if not (inspect.isclass(what) or inspect.isfunction(what)) or name is None:
        raise UsageError(f"{what!r} is no application: give a class, a function, or the name of a registered one.")
    if not re.fullmatch(r"[\w.]+", name):
        raise UsageError(f"{name} is no application: it must be defined with a name at the top of a module.")
    module = sys.modules[what.__module__]
    path = _file(module)
    if path is None:
        return Code(f"notebook:{name}", bundle.pack_files({"notebook.py": _from_objects(what).encode()}))
    spec = getattr(module, "__spec__", None)
    if module.__name__ == "__main__" and spec is not None:  # python -m package.module
        home = spec.name.removesuffix(".__main__")
    elif module.__name__ == "__main__":
        home = re.sub(r"\W", "_", path.stem)
        home = home if home.isidentifier() else f"script_{home}"
    else:
        home = module.__name__
    if folder is not None:
        root = Path(folder).resolve()
        files = dict(files_below(root, root))
        if not path.is_relative_to(root):
            raise UsageError(f"{what.__module__} is not in {root}.")
        home = ".".join(path.relative_to(root).with_suffix("").parts)
        return Code(f"{home}:{name}", bundle.pack_files(files))
    if _installed(path):
        return Code(f"{home}:{name}", None)
    top, dot, _ = home.partition(".")
    package = sys.modules.get(top)
    if dot and package is not None and (places := list(getattr(package, "__path__", []))):
        files = {}
        for place in places:
            root = Path(place).resolve()
            files.update(files_below(root, root.parent))
        return Code(f"{home}:{name}", bundle.pack_files(files))
    if dot or path.name == "__init__.py":
        home = home.rpartition(".")[2]
    try:
        return Code(f"{home}:{name}", bundle.pack_files({f"{home}.py": path.read_bytes()}))
    except OSError as error:
        raise UsageError(f"The code of {name} cannot be read: {error}.") from error


def _file(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    path = Path(name).resolve() if name else None
    return path if path is not None and path.is_file() else None


def _installed(path: Path) -> bool:
    if any(part in ("site-packages", "dist-packages") for part in path.parts):
        return True
    return path.is_relative_to(Path(inspect.__file__).resolve().parent) or path.is_relative_to(
        Path(bundle.__file__).resolve().parents[1]
    )


def files_below(folder: Path, root: Path) -> Iterator[tuple[str, bytes]]:
    """A folder's files by their paths from ``root``; hidden and compiled ones are left out."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden and path.suffix not in (".pyc", ".pyo"):
            yield "/".join(parts), path.read_bytes()


# ------------------------------------------------------------------------------------------------- notebooks


def _from_objects(what: Any) -> str:
    """Source text that defines an object of a notebook, and what it refers to."""
    lines: dict[str, str] = {}
    _define(what, what.__qualname__.partition(".")[0], lines, set())
    return "from __future__ import annotations\n" + "\n\n".join(lines.values()) + "\n"


def _define(what: Any, name: str, lines: dict[str, str], begun: set[str]) -> None:
    if name in begun:
        return
    begun.add(name)
    if isinstance(what, ModuleType):
        lines[name] = f"import {what.__name__} as {name}"
    elif isinstance(what, _PLAIN):
        lines[name] = f"{name} = {what!r}"
    elif inspect.isclass(what) or inspect.isfunction(what):
        module = sys.modules[what.__module__]
        if _file(module) is not None:
            lines[name] = f"from {what.__module__} import {what.__name__} as {name}"
            return
        try:
            source = textwrap.dedent(inspect.getsource(what))
        except (OSError, TypeError) as error:
            raise UsageError(f"The source of {name} is not known; put it into a file.") from error
        for other in _names(what):
            if other in vars(module):
                _define(vars(module)[other], other, lines, begun)
        lines[name] = source
    else:
        raise UsageError(
            f"{name} is an object of the class {type(what).__qualname__}, which does not travel with the code of an "
            "application; make it in on_session_enter, or give it as common data."
        )


def _names(what: Any) -> list[str]:
    """The global names to which a function, or a class's methods, refer."""
    if inspect.isfunction(what):
        return list(_of_code(what.__code__))
    found = [base.__name__ for base in what.__bases__ if base is not object]
    for member in vars(what).values():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if inspect.isfunction(function):
            found += _of_code(function.__code__)
    return found


def _of_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_code(constant)
