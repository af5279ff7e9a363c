"""Connections to a SQLite file, and SQLite's failures in plain words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from flame.errors import StoreError

_BUSY_SECONDS = 5.0
#: The most of a database that one connection keeps in memory, in bytes. The system keeps the file's pages anyway, for all connections at once.
_CACHE = 512 * 1024


def connect(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode that begins no transaction by itself; makes the file, with its folder, where it is not there.

    :raises sqlite3.Error: see :func:`explain`.
    :raises OSError: likewise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made here for its mode, which what SQLite puts beside it takes over. A file that is there must not
    # be touched: closing it would end the locks that another store in this process has on it.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA cache_size = {-_CACHE // 1024}")  # below zero: in KiB
            return db
        except sqlite3.Error as error:
            # Two processes that make a database WAL at the same time are refused at once, whatever the timeout.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                db.close()
                raise
        time.sleep(0.01)


_CAUSES = {
    sqlite3.SQLITE_BUSY: "another process is using it. End that one, or choose another data directory",
    sqlite3.SQLITE_LOCKED: "another process is using it. End that one, or choose another data directory",
    sqlite3.SQLITE_FULL: "the disk is full. Free some space and try again",
    sqlite3.SQLITE_READONLY: "it is read-only for this user. Change its permissions and those of its folder",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Check that its folder is there and may be written",
    sqlite3.SQLITE_CORRUPT: "it is damaged. Restore it from a copy, or move it away to begin anew",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database. Move it away, or choose another one",
    sqlite3.SQLITE_IOERR: "the disk could not be read or written. Check the disk and the free space",
}


def explain(error: Exception, path: Path) -> StoreError:
    """The error to raise for what went wrong with the database ``path``."""
    if isinstance(error, StoreError):
        return error
    code = getattr(error, "sqlite_errorcode", None)
    cause = _CAUSES.get(code & 0xFF) if code is not None else None  # the low byte is the family
    failure = StoreError(f"The database {path} failed: {cause or error}.")
    failure.__cause__ = error
    return failure
