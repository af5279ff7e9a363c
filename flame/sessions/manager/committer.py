"""Writes what has happened in all sessions: everything of one moment in one transaction, and then tells whom it concerns.

While one transaction is under way the next one gathers, so under load a transaction holds more, and the cost of a
task falls. Nobody is told anything that a crash could take back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from flame.errors import StoreError
from flame.sessions import wire
from flame.sessions.lifecycle import End
from flame.sessions.manager import journal
from flame.sessions.manager.live import Live
from flame.store import Store

log = logging.getLogger("flame.sessions")

_PAUSE = 0.5


class Committer:
    """The one writer of journals.

    :param store: where they are.
    :param told: called with each session of a commit, once it is done.
    """

    def __init__(self, store: Store, told: Callable[[Live], None]) -> None:
        self._store = store
        self._told = told
        self._dirty: dict[str, Live] = {}
        self._then: list[Callable[[], None]] = []
        self._writing: asyncio.Task[None] | None = None

    def touch(self, live: Live, then: Callable[[], None] | None = None) -> None:
        """Something of a session is to be written.

        :param then: called once it is.
        """
        self._dirty[live.id] = live
        if then is not None:
            self._then.append(then)
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    def ended(self, live: Live, ends: Iterable[End]) -> None:
        """Tasks of a session have ended: write it, and then tell their clients."""
        before = len(live.ends)
        live.ends.extend(ends)
        if len(live.ends) != before or live.entries:
            self.touch(live)

    async def settled(self) -> None:
        """Wait until all is written that there is to write now."""
        while self._writing is not None:
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        try:
            while self._dirty:
                lives, self._dirty = list(self._dirty.values()), {}
                then, self._then = self._then, []
                entries: list[tuple[str, int, bytes]] = []
                news = [_Commit(live, entries) for live in lives]
                await self._record(entries)
                for one in news:
                    one.tell()
                for call in then:
                    call()
                for live in lives:
                    self._told(live)
                    if live.keeper.due:
                        await self._sum_up(live)
        finally:
            self._writing = None

    async def _sum_up(self, live: Live) -> None:
        """Write a summary, and remove what it makes needless. What has happened since the last commit is not in it."""
        if live.id in self._dirty:  # it would say more than what is written
            return
        outdated = live.keeper.outdated(live.book, live.members)
        live.last += 1
        data = journal.summary(live.book, live.members)
        live.keeper.note(live.last, journal.SUMMARY)
        await self._record([(journal.name(live.id), live.last, data)])
        try:
            await self._store.forget(journal.name(live.id), outdated)
        except StoreError as error:
            log.warning("the journal of session %s is not shortened: %s", live.id, error)

    async def _record(self, entries: list[tuple[str, int, bytes]]) -> None:
        while entries:
            try:
                await self._store.record(entries)
                return
            except StoreError as error:  # nobody is told anything meanwhile, and nothing is lost
                log.error("what happens in sessions cannot be written, and is tried again: %s", error)
                await asyncio.sleep(_PAUSE)


class _Commit:
    """What one commit writes of one session."""

    def __init__(self, live: Live, entries: list[tuple[str, int, bytes]]) -> None:
        place = journal.name(live.id)
        self._live = live
        self._accepted, live.accepted = live.accepted, []
        ends, live.ends = live.ends, []
        for data, *what in live.entries:
            live.last += 1
            entries.append((place, live.last, data))
            live.keeper.note(live.last, *what)
        live.entries = []
        self._rows: dict[str, list[journal.Row]] = {}
        if ends:
            live.last += 1
            entries.append((place, live.last, journal.ended(ends)))
            live.keeper.note(live.last, journal.ENDED)
            for work, state, payload in ends:
                self._rows.setdefault(work.client, []).append((work.number, work.id, state, payload))
        self._entry = live.last
        for client, read in live.read.items():
            live.last += 1
            entries.append((place, live.last, journal.acknowledged(client, read)))
            live.keeper.note(live.last, journal.ACKNOWLEDGED)
        live.read = {}

    def tell(self) -> None:
        for member, block in self._accepted:
            if member.link is not None:
                member.link.send(wire.ACCEPTED, member.channel, *block)
        for client, rows in self._rows.items():
            member = self._live.members[client]
            member.unread[self._entry] = rows
            if member.link is not None:
                member.link.send(wire.ANSWERS, member.channel, self._entry, rows)
