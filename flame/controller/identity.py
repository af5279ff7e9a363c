"""Who this server is: the id by which it knows its workers, and the secret that their keys come from.

Both lie in the data directory. Where several servers can reach the database, as a standby does, they are in the database too, and what
is there counts: a server that takes over must know the workers of the one before, and be known by them.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from flame.controller.keys import Keys, write_whole
from flame.errors import Conflict, StoreError
from flame.store import Store

_COLLECTION, _ID = "server", "identity"


@dataclass(frozen=True)
class Identity:
    """A server's id and its keys."""

    id: str
    keys: Keys


def kept(data_dir: Path, name: str) -> str:
    """A random name in a file of the data directory: made once.

    :raises flame.errors.StoreError: the file cannot be read or written.
    """
    path = data_dir / name
    try:
        if not path.exists():
            write_whole(path, secrets.token_hex(8).encode())
        return path.read_text().strip()
    except OSError as error:
        raise StoreError(f"The data directory {data_dir} cannot be written: {error.strerror}.") from error


async def identify(data_dir: Path, store: Store | None) -> Identity:
    """Find out who we are, or decide it.

    :param store: the database, where other servers can reach it; None: the data directory alone says it.
    :raises flame.errors.StoreError: the data directory or the database cannot be read or written.
    """
    name, keys = kept(data_dir, "id"), Keys.load(data_dir / "secret")
    if store is None:
        return Identity(name, keys)
    mine = {"id": name, "secret": (data_dir / "secret").read_bytes().hex()}
    with contextlib.suppress(Conflict):
        await store.insert(_COLLECTION, _ID, mine)
    found = await store.get(_COLLECTION, _ID)
    assert found is not None
    if found.body != mine:
        write_whole(data_dir / "id", found.body["id"].encode())
        write_whole(data_dir / "secret", bytes.fromhex(found.body["secret"]))
    return Identity(found.body["id"], Keys.load(data_dir / "secret"))
