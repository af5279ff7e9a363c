"""Participants: people who bring a worker and data of their own, and come with an invite.

An invite is a secret that lets so many participants into one job. The server keeps its digest alone. A participant makes a
secret of its own when it first comes, by whose digest it is known again: so it gets its own task back after it was
away, and nobody else gets it, whoever holds the same invite. What the invite opens is small: to read what the job is, to
read its code, to take a place. Everything else goes with the key of the task's attempt, as for any other worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from flame.controller.context import StoredInvite, StoredTask
from flame.controller.submission import new_id
from flame.errors import Conflict, Forbidden, NotFound, SpecError, Unauthorized
from flame.spec.records import Event, Invitation, Invite, Job, Seat

if TYPE_CHECKING:
    from flame.controller.controller import Controller
    from flame.controller.shelf import Saved
    from flame.controller.supervisor import Supervisor

#: The beginning of every invite's token, by which people and scanners know what they have found.
PREFIX = "flame-invite"
#: The longest that an invite may be good for, in seconds.
LONGEST = 366 * 86400.0


class Participants:
    """The invites of all jobs, and the places that those who come with one take.

    :param controller: the jobs.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._context = controller.context
        self._lock = asyncio.Lock()  # a place goes to one participant, a use of an invite too

    # ---------------------------------------------------------------------------------------------- invites

    async def invite(self, job: str, *, uses: int, seconds: float, realm: str | None) -> Invite:
        """Make an invite; its token is in the answer, and nowhere else.

        :raises flame.errors.SpecError: the job has no place for participants, or none in this realm.
        :raises flame.errors.Conflict: the job has ended.
        """
        record = await self._controller.job(job)
        if record.state.ended:
            raise Conflict(f"Job {record.name!r} has ended ({record.state.value}): nobody can take part any more.")
        places = [task for task in await self._controller.tasks(job) if task.config.from_user]
        if not places:
            raise SpecError(
                f"Job {record.name!r} has no places for participants; its dataSpec says how many with fromUser."
            )
        if realm is not None and not any(fits(task.config.realm, realm) for task in places):
            there = ", ".join(sorted({task.config.realm for task in places}))
            raise SpecError(f"No place for a participant lies in the realm {realm!r}; there are places in {there}.")
        if not 0 < seconds <= LONGEST:
            raise SpecError(f"An invite is good for {LONGEST:.0f} s at most, and for some time.")
        number, now = new_id(), time.time()
        token = f"{PREFIX}.{number}.{secrets.token_urlsafe(32)}"
        made = StoredInvite(
            id=number,
            job_id=job,
            realm=realm,
            uses=uses,
            created_at=now,
            expires_at=now + seconds,
            digest=_digest(token),
        )
        await self._context.invites.insert(number, made)
        return msgspec.structs.replace(_shown(made), token=token)

    async def invites(self, job: str) -> list[Invite]:
        """A job's invites, oldest first, without their tokens."""
        await self._controller.job(job)
        return [_shown(saved.record) for saved in await self._context.invites.all({"jobId": job})]

    async def revoke(self, job: str, id: str) -> None:
        """Take an invite back: nobody comes with it any more, and who came with it goes.

        :raises flame.errors.NotFound: the job has no such invite.
        """
        async with self._lock:
            saved = await self._context.invites.get(id)
            if saved is None or saved.record.job_id != job:
                raise NotFound(f"The job {job} has no invite {id!r}.")
            await self._context.invites.put(saved, msgspec.structs.replace(saved.record, revoked=True))
            self._context.standing.end(("invite", id), Unauthorized("This invite was taken back; ask for a new one."))
            supervisor = self._controller.supervisor(job)
            if supervisor is not None:
                for task in supervisor.tasks:
                    if task.invite == id and not task.state.ended:
                        await supervisor.evict(task.id, "Its invite was taken back.")

    async def forget(self, job: str) -> None:
        """The job is deleted, and its invites with it."""
        for saved in await self._context.invites.all({"jobId": job}):
            await self._context.invites.delete(saved.id)
            self._context.standing.end(("invite", saved.id), Unauthorized("The job of this invite was removed."))

    async def open(self, token: str | None) -> Saved[StoredInvite]:
        """The invite of a token. It may be used up or have expired; who came with it in time may come back.

        :raises flame.errors.Unauthorized: there is no such invite, or it was taken back.
        """
        number = named(token)
        saved = await self._context.invites.get(number) if number is not None else None
        if token is None:
            raise Unauthorized("This is for participants only: it needs an invite's token (`flame job invite JOB`).")
        if saved is None or not hmac.compare_digest(_digest(token), saved.record.digest):
            raise Unauthorized("This is no invite that this server has made; ask for a new one.")
        if saved.record.revoked:
            raise Unauthorized("This invite was taken back; ask for a new one.")
        return saved

    # ----------------------------------------------------------------------------------------------- places

    async def invitation(self, invite: StoredInvite) -> Invitation:
        """What a participant may know before it decides."""
        job = await self._controller.job(invite.job_id)
        tasks = await self._places(invite)
        assert job.code is not None
        return Invitation(
            job_id=job.id,
            name=job.name,
            state=job.state,
            reason=job.reason,
            roles=sorted({task.role for task in tasks}),
            realm=invite.realm,
            code=job.code,
            dependencies=job.form.model_spec.dependencies,
            backends=sorted(
                {channel.backend or job.form.backend for task in tasks for channel in task.config.channels}
            ),
            free=sum(task.holder is None for task in tasks),
            expires_at=invite.expires_at,
        )

    async def code(self, invite: StoredInvite) -> bytes:
        """The bundle with the code, for whoever wants to read it first."""
        job = await self._controller.job(invite.job_id)
        assert job.code is not None
        return await self._controller.catalog.bundle(job.code)

    async def states(self, invite: StoredInvite, after: int) -> AsyncGenerator[Sequence[Event], None]:
        """The states that the job goes through, and what it waits for; nothing else of what happens in it."""
        batches = await self._controller.events(invite.job_id, after, follow=True)
        return _states(batches)

    async def seat(self, invite: Saved[StoredInvite], secret: str, name: str, realm: str | None) -> Seat:
        """Take a place, or come back to one's own.

        :param secret: the participant's, by which it is known again.
        :raises flame.errors.Conflict: the job takes nobody now, or all places are taken.
        :raises flame.errors.Forbidden: the invite has expired or is used up.
        """
        holder = _digest(secret)
        async with self._lock:
            invite = await self._context.invites.get(invite.id) or invite  # others may have come with it meanwhile
            supervisor = self._controller.supervisor(invite.record.job_id)
            mine = next((task for task in await self._places(invite.record) if task.holder == holder), None)
            if supervisor is None:
                job = await self._controller.job(invite.record.job_id)
                if mine is not None and mine.state.ended:
                    return self._seat(job, mine)
                state = "has ended" if job.state.ended else "was not started yet"
                raise Conflict(f"Job {job.name!r} {state} ({job.state.value}).")
            if mine is None:
                mine = await self._new_place(invite, supervisor, holder, name, realm)
            elif supervisor.task(mine.id).state.ended:
                return self._seat(supervisor.job, supervisor.task(mine.id))
            who = {"participant": name, "holder": holder, "invite": invite.id}
            await supervisor.claim(mine.id, **who)
            return self._seat(supervisor.job, supervisor.task(mine.id))

    async def _new_place(
        self, invite: Saved[StoredInvite], supervisor: Supervisor, holder: str, name: str, realm: str | None
    ) -> StoredTask:
        """A place that nobody has, for somebody who comes for the first time with this invite."""
        record = invite.record
        known = holder in record.holders
        if not known and record.expires_at < time.time():
            raise Forbidden("This invite has expired; ask for a new one.")
        if not known and len(record.holders) >= record.uses:
            raise Forbidden(f"This invite is used up: it was for {record.uses}; ask for a new one.")
        free = [
            task
            for task in supervisor.tasks
            if task.config.from_user
            and task.holder is None
            and not task.state.ended
            and all(fits(task.config.realm, wanted) for wanted in (record.realm, realm) if wanted is not None)
        ]
        if not free:
            where = f" in the realm {realm or record.realm!r}" if realm or record.realm else ""
            raise Conflict(f"All places for participants{where} in job {supervisor.job.name!r} are taken.")
        supervisor.check_claim(free[0].id)
        if not known:
            fresh = msgspec.structs.replace(record, holders=[*record.holders, holder], names=[*record.names, name])
            await self._context.invites.put(invite, fresh)
        return free[0]

    async def _places(self, invite: StoredInvite) -> list[StoredTask]:
        """The tasks for participants that this invite may open."""
        supervisor = self._controller.supervisor(invite.job_id)
        if supervisor is not None:
            tasks = supervisor.tasks
        else:
            found = await self._context.tasks.all({"jobId": invite.job_id})
            tasks = sorted((saved.record for saved in found), key=lambda task: task.index)
        return [
            task
            for task in tasks
            if task.config.from_user and (invite.realm is None or fits(task.config.realm, invite.realm))
        ]

    def _seat(self, job: Job, task: StoredTask) -> Seat:
        assert job.code is not None
        return Seat(
            job_id=job.id,
            task=task.id,
            role=task.role,
            index=task.index,
            realm=task.config.realm,
            attempt=task.attempt,
            state=task.state,
            code=job.code,
            key=None if task.state.ended else self._context.keys.task(task.id, task.attempt),
        )


def named(token: str | None) -> str | None:
    """The id of the invite that a token says it is of; None for what is no invite's token."""
    parts = (token or "").split(".")
    return parts[1] if len(parts) == 3 and parts[0] == PREFIX else None


def fits(place: str, realm: str) -> bool:
    """Whether data that lie in ``realm`` may take a place: it is the place's own region, or a part of it."""
    return place in ("default", realm) or realm.startswith(f"{place}/")


async def _states(batches: AsyncGenerator[Sequence[Event], None]) -> AsyncGenerator[Sequence[Event], None]:
    async with aclosing(batches):
        async for batch in batches:
            wanted = [
                msgspec.structs.replace(
                    event, data={key: event.data[key] for key in ("state", "reason") if key in event.data}
                )
                for event in batch
                if event.type == "job"
            ]
            if wanted:
                yield wanted


def _shown(invite: StoredInvite) -> Invite:
    return Invite(**{name: getattr(invite, name) for name in Invite.__struct_fields__})


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
