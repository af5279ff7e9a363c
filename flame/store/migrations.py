"""The versions of the SQLite database: what each adds to the one before.

A step is never edited once it was released: a database that has taken it will not take it again. A new
need is a new step at the end. ``user_version`` in the file's header counts the steps taken, and
``application_id`` says that the file is Flame's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from flame.errors import StoreError

_APPLICATION = 0x464C4D45  # "FLME"

MIGRATIONS: Sequence[Sequence[str]] = (
    (
        # job_id and state repeat fields of the body, taken out once at the write: cheaper than an index over
        # json_extract(), which parses the body again for each index.
        "CREATE TABLE documents (collection TEXT NOT NULL, id TEXT NOT NULL, version INTEGER NOT NULL,"
        " body TEXT NOT NULL, job_id TEXT, state TEXT, PRIMARY KEY (collection, id))",
        "CREATE INDEX documents_by_job ON documents (collection, job_id, id) WHERE job_id IS NOT NULL",
        "CREATE INDEX documents_by_state ON documents (collection, state, id) WHERE state IS NOT NULL",
        "CREATE TABLE keys (collection TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL,"
        " PRIMARY KEY (collection, key)) WITHOUT ROWID",
        "CREATE INDEX keys_by_id ON keys (collection, id)",
        "CREATE TABLE events (stream TEXT NOT NULL, seq INTEGER NOT NULL, time REAL NOT NULL,"
        " type TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (stream, seq)) WITHOUT ROWID",
    ),
    (
        # With a rowid: records can be large, and an index tree of large rows is slow to walk.
        "CREATE TABLE journals (journal TEXT NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,"
        " PRIMARY KEY (journal, number))",
    ),
)


def migrate(db: sqlite3.Connection, steps: Sequence[Sequence[str]], path: Path) -> None:
    """Bring a database to the newest version, each step in a transaction of its own.

    :param db: a connection without implicit transactions.
    :param steps: the statements of each version, oldest first.
    :param path: of the database, for the message.
    :raises flame.errors.StoreError: a newer Flame wrote it, or it belongs to another program.
    """
    while True:
        # The version is read inside the transaction, so that two processes that start at once take turns.
        db.execute("BEGIN IMMEDIATE")
        try:
            version = _version(db, path)
            if version > len(steps):
                raise StoreError(
                    f"The database {path} was written by a newer Flame (version {version} of its tables,"
                    f" this Flame knows {len(steps)}). Install that Flame, or choose another database."
                )
            if version < len(steps):
                for statement in steps[version]:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {version + 1}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        if version >= len(steps):
            return


def _version(db: sqlite3.Connection, path: Path) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    application: int = db.execute("PRAGMA application_id").fetchone()[0]
    empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != _APPLICATION and not (empty and not version):
        raise StoreError(f"The database {path} belongs to another program. Choose another one.")
    return version
