"""Who did what: a file with one line of JSON for each request that changed something, or that was refused.

The file is only ever appended to. Secrets are not in it: neither tokens nor bodies are written, and what is written of the
path are names and ids. Readers of things are not written, workers neither: what these do is in their jobs' events.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flame.apiserver.permissions import Access
from flame.errors import StoreError
from flame.spec.people import Principal
from flame.spec.records import Record

if TYPE_CHECKING:
    from aiohttp import web

    from flame.apiserver.routes import Route

log = logging.getLogger("flame.apiserver")

#: From this size on the file is put aside as ``audit.log.TIME``, and a new one is begun.
LARGEST = 64 << 20

_REFUSED = frozenset({401, 403, 429})
_SILENT = frozenset({"GET", "HEAD"})
_encode = msgspec.json.Encoder().encode


class Deed(Record, kw_only=True):
    """One line. ``what`` is the route, ``path`` what was asked for, ``status`` how it was answered."""

    time: float
    who: str
    role: str
    address: str
    what: str
    path: str
    status: int
    token: str = ""
    reason: str = ""


class Audit:
    """The file.

    :param path: where it is; None writes nothing.
    :raises flame.errors.StoreError: it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file = -1
        self._size = 0
        if path is not None:
            self._open(path)

    def note(
        self, route: Route, principal: Principal | None, request: web.Request, status: int, reason: str = ""
    ) -> None:
        """Write down a request, if it is one to be written down."""
        if self._file < 0:
            return
        refused = status in _REFUSED
        if not refused and (route.method in _SILENT or route.access in (Access.WORKER, Access.OPEN)):
            return
        deed = Deed(
            time=time.time(),
            who=principal.name if principal else "anyone",
            role=principal.role.value if principal and principal.projects else "",
            address=request.remote or "",
            what=f"{route.method} {route.path}",
            path=request.path[:500],
            status=status,
            token=principal.token if principal else "",
            reason=reason[:500],
        )
        line = _encode(deed) + b"\n"
        try:
            os.write(self._file, line)
        except OSError as error:  # it has been done already, so the server's own log must say it
            log.error("this could not be written into %s (%s): %s", self._path, error.strerror, line.decode().strip())
        self._size += len(line)
        if self._size > LARGEST and self._path is not None:
            os.close(self._file)
            self._path.rename(self._path.with_name(f"{self._path.name}.{int(time.time())}"))
            self._open(self._path)

    def last(self, count: int, who: str | None = None, *, refused: bool = False) -> list[Deed]:
        """The last lines, the oldest first.

        :param who: only what this one did.
        :param refused: only what was refused.
        """
        if self._path is None:
            return []
        found: deque[Deed] = deque(maxlen=count)
        with self._path.open("rb") as file:
            for line in file:
                try:
                    deed = msgspec.json.decode(line, type=Deed)
                except (msgspec.DecodeError, UnicodeDecodeError):  # the disk was full in the middle of it
                    continue
                if who in (None, deed.who) and (not refused or deed.status in _REFUSED):
                    found.append(deed)
        return list(found)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._file).st_size
        except OSError as error:
            raise StoreError(f"The log of who did what, {path}, cannot be written: {error.strerror}.") from error
