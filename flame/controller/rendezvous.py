"""How the workers of a job find each other.

A worker that joins a channel says where it can be reached. Everyone on the other side of the channel in the same group is told,
and the newcomer is told who is there. The members are in the store, one document each, so that a restarted
server knows them; the telling goes through the tasks' event streams, so that nobody misses any of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import msgspec

from flame.errors import SpecError
from flame.spec.nouns import Channel
from flame.spec.records import Record
from flame.store import Document, Store

_COLLECTION = "members"

Tell = Callable[[str, dict[str, Any]], Coroutine[Any, Any, None]]


class Membership(Record, kw_only=True):
    """A worker on a channel. ``member`` is what it says of itself: ``{end, role, attempt, address, ...}``."""

    job_id: str
    channel: str
    group: str
    end: str
    role: str
    member: dict[str, Any]

    @property
    def id(self) -> str:
        """The id of the document."""
        return "\n".join((self.job_id, self.channel, self.group, self.end))


class Rendezvous:
    """The members of one job's channels.

    :param job: the job's id.
    :param channels: the schema's, which say whose news concerns whom.
    :param store: where the members are kept.
    :param tell: puts a ``peers`` event in the stream of a task.
    """

    def __init__(self, job: str, channels: Iterable[Channel], store: Store, tell: Tell) -> None:
        self._job = job
        self._channels = {channel.name: channel for channel in channels}
        self._store = store
        self._tell = tell
        self._members: dict[tuple[str, str], dict[str, Membership]] = {}
        self._lock = asyncio.Lock()  # the events of a stream come in the order of what happened

    async def load(self) -> None:
        """Read the members that an earlier process of the server has kept."""
        for document in await self._kept():
            membership = msgspec.convert(document.body, Membership)
            self._group(membership.channel, membership.group)[membership.end] = membership

    async def join(self, end: str, role: str, channel: str, group: str, member: dict[str, Any]) -> None:
        """A worker is there. Saying it again, unchanged, tells nobody anything.

        :raises flame.errors.SpecError: the role has no part in this channel.
        """
        if channel not in self._channels or role not in self._channels[channel].pair:
            raise SpecError(f"Role {role!r} has no part in a channel {channel!r} of this job.")
        member = {**member, "end": end, "role": role}
        newcomer = Membership(job_id=self._job, channel=channel, group=group, end=end, role=role, member=member)
        async with self._lock:
            there = self._group(channel, group)
            before = there.get(end)
            if before is not None and before.member == member:
                return
            if before is not None:
                await self._store.delete(_COLLECTION, newcomer.id)
            await self._store.insert(_COLLECTION, newcomer.id, msgspec.to_builtins(newcomer))
            there[end] = newcomer
            others = self._others(newcomer)
            news = [self._tell(other.end, self._event(newcomer, joined=[newcomer])) for other in others]
            await asyncio.gather(self._tell(end, self._event(newcomer, joined=others)), *news)

    async def leave(self, end: str, channel: str | None = None, group: str | None = None) -> None:
        """A worker is no longer there: on one channel, or on any."""
        async with self._lock:
            await self._leave(
                lambda one: one.end == end and channel in (None, one.channel) and group in (None, one.group)
            )

    async def depart(self, end: str, attempt: int) -> None:
        """Nothing is left of a worker, up to this attempt of it; a later one may be there already."""
        async with self._lock:
            await self._leave(lambda one: one.end == end and one.member.get("attempt", 0) <= attempt)

    async def _leave(self, leaving: Callable[[Membership], bool]) -> None:
        there = [one for members in self._members.values() for one in members.values() if leaving(one)]
        for membership in there:
            await self._store.delete(_COLLECTION, membership.id)
            del self._group(membership.channel, membership.group)[membership.end]
            event = self._event(membership, left=[membership.end])
            await asyncio.gather(*(self._tell(other.end, event) for other in self._others(membership)))

    async def clear(self) -> None:
        """The job has ended: forget all, tell nobody."""
        async with self._lock:
            self._members.clear()
            there = await self._kept()
            await asyncio.gather(*(self._store.delete(_COLLECTION, document.id) for document in there))

    async def _kept(self) -> list[Document]:
        return await self._store.find(_COLLECTION, where={"jobId": self._job}, limit=1_000_000)

    def _group(self, channel: str, group: str) -> dict[str, Membership]:
        return self._members.setdefault((channel, group), {})

    def _others(self, membership: Membership) -> list[Membership]:
        """Who is on the other side: the members of the pair's other role, or of the same if it is paired with itself."""
        first, second = self._channels[membership.channel].pair
        far = second if membership.role == first else first
        there = self._group(membership.channel, membership.group).values()
        return [other for other in there if other.role == far and other.end != membership.end]

    @staticmethod
    def _event(about: Membership, *, joined: Iterable[Membership] = (), left: Iterable[str] = ()) -> dict[str, Any]:
        return {
            "channel": about.channel,
            "group": about.group,
            "joined": [other.member for other in joined],
            "left": list(left),
        }
