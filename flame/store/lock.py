"""One server at a time on a database that several can reach: a lock that expires when its holder falls silent.

Each term of office is a document of its own, numbered upwards, and whoever inserts the next number holds the lock: inserting
an id is atomic on every database. The holder renews its term by changing that document, which nobody else does. So the lock asks
no more of a database than the rest of Flame, and compares no clocks of different machines: a term counts as silent when one observer
has seen it unchanged for a while by its own clock.

What keeps two servers from writing at once, with ``takeover`` as T:

* A holder may write for 0.3 T after it has begun to renew its term and found no later one. Then it must renew first
  (:meth:`ServerLock.hold`); one that was stopped or cut off finds out before it writes again, not after.
* Whoever takes over has seen the term unchanged for half of T, inserts the next one, and waits another half of T: 0.3 T until
  the former holder may not write any more, and 0.2 T for a write that it has begun.
* A term that its holder has ended, or whose holder had the data directory that is now ours, is followed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any

from flame.errors import Conflict, StoreError
from flame.store.base import Document, Store

log = logging.getLogger("flame.store")

#: The collection of the terms.
TERMS = "terms"
_PARTING = 5.0  # seconds that an end waits for a database that is away
_SILENT, _MAY_WRITE = 0.5, 0.3  # of T


class ServerLock:
    """The lock of one server.

    :param store: the database, on a connection of its own, so that nothing is in the way of renewing.
    :param place: names the data directory; who has it is alone there.
    :param takeover: seconds from the last word of a holder until another one works in its stead.
    :ivar lost: set when another server has taken over.
    """

    def __init__(self, store: Store, place: str, takeover: float) -> None:
        self._store = store
        self._takeover = takeover
        self._about = {"place": place, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        self._term: Document | None = None
        self._until = 0.0
        self._renewing = asyncio.Lock()
        self._closing = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None
        self._successor = ""
        self.lost = asyncio.Event()

    async def take(self, *, wait: bool) -> None:
        """Become the one server.

        :param wait: as a standby: until the present one ends or falls silent.
        :raises flame.errors.Conflict: another server works on the database, and we do not wait.
        :raises flame.errors.StoreError: the database fails.
        """
        waiting = False
        while True:
            try:
                present = await self._newest()
            except StoreError as error:
                if not waiting:
                    raise
                log.warning("standby: %s", error)
                await asyncio.sleep(self._takeover / 40)
                continue
            free = present is None or present.body["ended"] or present.body["place"] == self._about["place"]
            if present is not None and not free:
                if wait and not waiting:
                    waiting = True
                    log.info("standby: %s works on this database; waiting", _describe(present))
                try:
                    seen = await self._changes(present)
                except StoreError:
                    if not wait:
                        raise
                    await asyncio.sleep(self._takeover / 40)
                    continue
                if seen is not None:
                    if wait or seen.body["ended"]:
                        continue
                    raise Conflict(
                        f"Another server works on this database: {_describe(present)}. Use that one, end it, or wait for "
                        "its end with --standby."
                    )
            begin = time.monotonic()
            number = int(present.id) + 1 if present else 1
            try:
                term = await self._store.insert(TERMS, f"{number:012}", {**self._about, "ended": False, "beats": 0})
            except Conflict:
                continue  # another one was faster
            self._term, self._until = term, begin + _MAY_WRITE * self._takeover
            self._beating = asyncio.create_task(self._beat())
            if present is not None:
                if not free:
                    log.warning("%s has fallen silent; taking over", _describe(present))
                    await asyncio.sleep((1 - _SILENT) * self._takeover)
                    await self.hold()
                with contextlib.suppress(StoreError):
                    await self._store.delete(TERMS, present.id)
            return

    async def hold(self) -> None:
        """Make sure that we may write.

        :raises flame.errors.StoreError: another server has taken over, or the database does not answer.
        """
        if time.monotonic() >= self._until:
            await self._renew()

    async def close(self) -> None:
        """End the term, so that the next server need not wait; for when nothing will be written any more."""
        self._closing.set()
        if self._beating is not None:
            await asyncio.wait([self._beating], timeout=_PARTING)
        if self._term is not None and not self.lost.is_set():
            with contextlib.suppress(StoreError, TimeoutError):  # it is away; the term falls silent by itself
                async with asyncio.timeout(_PARTING):
                    await self._change(ended=True)
        await self._store.close()

    async def _beat(self) -> None:
        # Told to end by an event: a cancellation can get lost in a driver that waits with a timeout of its own.
        while not self.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MAY_WRITE * self._takeover / 3):
                    await self._closing.wait()
            if self._closing.is_set():
                return
            try:
                await self._renew()
            except StoreError as error:
                if not self.lost.is_set():
                    log.warning("the lock of the database cannot be renewed for now: %s", error)

    async def _renew(self) -> None:
        asked = time.monotonic()
        async with self._renewing:
            if self.lost.is_set():
                raise self._failure()
            if self._until > asked + _MAY_WRITE * self._takeover * 0.9:
                return  # somebody has just done it while we waited
            assert self._term is not None
            while True:
                begin = time.monotonic()
                mine = await self._change(beats=self._term.body["beats"] + 1)
                newest = await self._newest()
                if newest is None or newest.id != self._term.id:
                    self._successor = _describe(newest) if newest is not None else "another server"
                    self.lost.set()
                    raise self._failure()
                if mine:
                    break
                # Nobody else changes our term: this is an earlier change of ours of which we have never heard that it took place, because
                # the database stood still, or one that is still under way there.
                self._term = newest
                if begin > asked + _MAY_WRITE * self._takeover:
                    raise StoreError("The database does not take the renewal of this server's term.")
                await asyncio.sleep(self._takeover / 40)
            self._until = begin + _MAY_WRITE * self._takeover

    async def _change(self, **fields: Any) -> bool:
        assert self._term is not None
        changed = await self._store.replace(
            TERMS, self._term.id, {**self._term.body, **fields}, version=self._term.version
        )
        if changed is not None:
            self._term = changed
        return changed is not None

    async def _newest(self) -> Document | None:
        found = await self._store.find(TERMS, descending=True, limit=1)
        return found[0] if found else None

    async def _changes(self, term: Document) -> Document | None:
        """The newest term as soon as it is another one, or changed: a sign of life; None: silence."""
        silent_at = time.monotonic() + _SILENT * self._takeover
        while (now := time.monotonic()) < silent_at:
            await asyncio.sleep(self._takeover / 40)
            newest = await self._newest()
            if newest is None or (newest.id, newest.version) != (term.id, term.version):
                return newest or term
            if time.monotonic() - now > self._takeover / 10:  # the database was slow, or away: for the holder, too
                silent_at = time.monotonic() + _SILENT * self._takeover
        return None

    def _failure(self) -> StoreError:
        return StoreError(f"This server has lost its database to {self._successor}; it writes nothing any more.")


def _describe(term: Document) -> str:
    return f"process {term.body['pid']} on {term.body['host']}"
