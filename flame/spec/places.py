"""Where something was written: from a path inside a form back to the file and the place in it.

A job is put together from several files, checked as one form, and may be checked again by a server that
never saw the files. So the checks speak of paths inside the form, such as ``("schema", "roles", 0, "name")``,
and a :class:`Places` turns one into the words that a user needs: ``schema.json: roles[0].name``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Path = tuple[str | int, ...]

_PLAIN = re.compile(r"[^\s.\[\]\"']+")


def dotted(path: Sequence[str | int]) -> str:
    """A path as text, such as ``roles[0].groupAssociation[1].param-channel``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not _PLAIN.fullmatch(step):
            text += f'["{step}"]'
        else:
            text += f".{step}" if text else step
    return text


class Places:
    """Which part of a form comes from which file.

    :param origins: path in the form -> (file, path in the file); the longest path that fits decides. Without
        any, a place is the path in the form alone, which is what a server has to say.
    """

    def __init__(self, origins: Mapping[Path, tuple[str, Path]] | None = None) -> None:
        self._origins = dict(origins or {})

    def put(self, path: Path, file: str, inside: Path = ()) -> None:
        """Say that the form's ``path`` was written in ``file`` at ``inside``."""
        self._origins[path] = (file, inside)

    def where(self, *path: str | int) -> str:
        """The place as text: the file, if it is known, and the path in it."""
        for length in range(len(path), -1, -1):
            origin = self._origins.get(path[:length])
            if origin is not None:
                file, inside = origin
                place = dotted(inside + path[length:])
                return f"{file}: {place}" if place else file
        return dotted(path)

    def under(self, *prefix: str | int) -> Places:
        """The places of one part of the form, addressed from that part's own root."""
        inner = {path[len(prefix) :]: origin for path, origin in self._origins.items() if path[: len(prefix)] == prefix}
        if () not in inner:
            for length in range(len(prefix), -1, -1):
                origin = self._origins.get(prefix[:length])
                if origin is not None:
                    inner[()] = (origin[0], origin[1] + prefix[length:])
                    break
        return Places(inner)
