"""State: one interface, several databases.

:func:`open_store` chooses the database by the scheme of a URL; :class:`Store` is what all of them can do.
"""

from __future__ import annotations

from pathlib import Path

from flame.errors import UsageError
from flame.store.base import Document, Store
from flame.store.lock import ServerLock

__all__ = ["DEFAULT_URL", "Document", "ServerLock", "Store", "open_store", "take_lock"]

#: The database of a server that was told nothing else: a file in its data directory.
DEFAULT_URL = "sqlite:///flame.db"


def open_store(url: str, data_dir: Path) -> Store:
    """Open the state that ``url`` names, and make or migrate its database where that is needed.

    :param url: ``sqlite:///PATH``: a file; a relative path (``sqlite:///flame.db``) lies in ``data_dir``, an
        absolute one has four slashes (``sqlite:////var/lib/flame.db``). Or ``mongodb://HOST[:PORT]/DATABASE``, whose
        server is looked for at the first use, so this call does not wait for it.
    :param data_dir: the server's data directory; what a database does not hold itself (bundles) is kept there.
    :raises flame.errors.UsageError: the URL is not one of these.
    :raises flame.errors.MissingExtra: MongoDB's driver is not installed.
    :raises flame.errors.StoreError: the database cannot be opened, or a newer Flame wrote it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise UsageError(f"The database {url!r} is not a URL; write it like {DEFAULT_URL!r}.")
    if scheme == "sqlite":
        if not rest.startswith("/") or rest == "/" or rest.endswith("/"):
            raise UsageError(f"The database {url!r} names no file; write it like {DEFAULT_URL!r} (three slashes).")
        from flame.store.sqlite import SqliteStore

        return SqliteStore(data_dir / rest[1:], bundles=data_dir / "bundles")
    if scheme in ("mongodb", "mongodb+srv"):
        from flame.store.mongodb import MongoStore

        return MongoStore(url)
    raise UsageError(f"The database {url!r} is of no known kind; 'sqlite:///PATH' and 'mongodb://HOST/DATABASE' are.")


async def take_lock(url: str, store: Store, *, place: str, takeover: float, wait: bool) -> ServerLock | None:
    """Become the only server of a database that several can reach; None for one that lies in the data directory.

    From then on the store refuses to write as soon as another server has taken over.

    :param url: of the database, as for :func:`open_store`.
    :param store: what is to be guarded.
    :param place: names our data directory, whose own lock we hold.
    :param takeover: see :class:`flame.store.lock.ServerLock`.
    :param wait: wait as a standby while another server works.
    :raises flame.errors.Conflict: another server works on the database, and we do not wait.
    :raises flame.errors.StoreError: the database fails.
    """
    if not url.startswith("mongodb"):
        return None
    from flame.store.mongodb import MongoStore

    assert isinstance(store, MongoStore)
    # Not migrated before the lock is ours: an older server may be at work.
    lock = ServerLock(MongoStore(url, migrate=False), place, takeover)
    try:
        await lock.take(wait=wait)
    except BaseException:
        await lock.close()
        raise
    store.guard(lock.hold)
    return lock
