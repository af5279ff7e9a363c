"""A plan carried out on one job: workers are held at the moments that it names, the deeds done, and the workers let go.

A moment is a file that a worker renames (:mod:`flame.sdk.chaospoints`), so it is waited for by looking into the folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import msgspec

from flame.chaos.plan import PARTS, Deed
from flame.chaos.processes import Process
from flame.chaos.reach import Reach
from flame.chaos.server import Part
from flame.chaos.target import Target
from flame.errors import UsageError

_LOOK = 0.02  # seconds between two looks
_PRESENCE = 20.0  # seconds within which the target of a deed has to be there once its moment has come


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a deed.

    :ivar done: False: its moment never came, or there was nobody to do it to.
    :ivar what: in words.
    """

    deed: str
    done: bool
    what: str


class Drill:
    """Deeds to be done to one job.

    :param job: its id.
    :param tasks: its tasks: by id, their role and their number in it.
    :param folder: what the server has as ``FLAME_CHAOS``.
    :param parts: the server, and what else is no worker and may be meant.
    :param random: picks among several workers.
    :param reach: finds the workers.
    :param say: told what is done as it is done.
    """

    def __init__(  # noqa: PLR0917
        self,
        job: str,
        tasks: Mapping[str, tuple[str, int]],
        folder: Path,
        parts: Mapping[str, Part],
        random: Random,
        reach: Reach,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._job = job
        self._tasks = tasks
        self._folder = folder
        self._parts = parts
        self._random = random
        self._reach = reach
        self._say = say or (lambda _: None)

    def wish(self, deeds: Sequence[Deed]) -> None:
        """Ask for the moments of deeds. To be called before the job is started, so that none is missed."""
        for deed in deeds:
            for name in deed.wishes():
                (self._folder / name).touch()

    async def carry_out(self, deeds: Sequence[Deed], ended: asyncio.Event) -> list[Done]:
        """Do the deeds, each at its moment.

        :param deeds: they must have been wished for.
        :param ended: set when the job has ended, so that no moment is waited for any more.
        """
        try:
            return list(await asyncio.gather(*(self._carry_out(deed, ended) for deed in deeds)))
        finally:
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)

    async def _carry_out(self, deed: Deed, ended: asyncio.Event) -> Done:
        while (taken := self._taken(deed)) is None:
            if ended.is_set():
                return Done(deed=str(deed), done=False, what="the job never came there")
            await asyncio.sleep(_LOOK)
        for name in deed.wishes():
            (self._folder / name).unlink(missing_ok=True)
        done = await self._do(deed, taken, ended)
        self._say(f"{done.deed}: {done.what}")
        return done

    def _taken(self, deed: Deed) -> str | None:
        """The task and attempt of the worker that has come to the moment."""
        for name in deed.wishes():
            for path in self._folder.iterdir():
                if path.name.startswith(f"{name}.taken-"):
                    return path.name.removeprefix(f"{name}.taken-").rpartition("-")[0]
        return None

    def _release(self, deed: Deed) -> None:
        for name in deed.wishes():
            for path in list(self._folder.iterdir()):
                if path.name.startswith(f"{name}.taken-"):
                    path.unlink(missing_ok=True)

    async def _do(self, deed: Deed, holder: str, ended: asyncio.Event) -> Done:
        part = self._parts.get(deed.who)
        if part is None and deed.who in PARTS - {"flamelet"}:
            self._release(deed)
            raise UsageError(f"There is no {deed.who} here that is ours to {deed.act}.")
        if part is not None:
            return Done(deed=str(deed), done=True, what=await self._hit_part(deed, part))
        target = await self._target(deed, holder, ended)
        if target is None:
            self._release(deed)
            return Done(deed=str(deed), done=False, what=f"there was no {deed.who}")
        return Done(deed=str(deed), done=True, what=await self._hit(deed, target))

    async def _hit_part(self, deed: Deed, part: Part) -> str:
        name = f"{deed.who} ({part.pid})"
        if deed.act != "kill":
            return await self._hit(deed, Process("", 0, False, part.pid), name)
        part.kill()
        self._release(deed)
        try:
            await asyncio.sleep(deed.seconds)
        finally:  # also if the trial is broken off meanwhile: it is perhaps not ours alone
            await part.start()
        return f"killed {name} and started it again"

    async def _hit(self, deed: Deed, target: Target, name: str | None = None) -> str:
        name = name or str(target)
        match deed.act:
            case "kill":
                await target.kill()
                self._release(deed)
                return f"killed {name}"
            case "pause":
                await target.freeze()
                self._release(deed)
                try:
                    await asyncio.sleep(deed.seconds)
                finally:
                    await target.thaw()
                return f"stopped {name} for {deed.seconds:g} s"
            case "cut":
                number = await target.cut()
                self._release(deed)
                return f"cut {number} connections of {name}"

    async def _target(self, deed: Deed, holder: str, ended: asyncio.Event) -> Target | None:
        """Whom a deed means, now that its moment has come."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _PRESENCE
        while True:
            found = self._choose(deed, holder, await self._reach.workers(self._job))
            if found is not None or ended.is_set() or loop.time() > until:
                return found
            await asyncio.sleep(_LOOK)

    def _choose(self, deed: Deed, holder: str, all: Sequence[Target]) -> Target | None:
        if deed.who == "flamelet":
            fit = [target for target in all if target.flamelet]
        else:
            fit = [target for target in all if not target.flamelet and self._means(deed, target)]
        held = [target for target in fit if f"{target.task}.{target.attempt}" == holder]
        return held[0] if held else self._random.choice(fit) if fit else None

    def _means(self, deed: Deed, target: Target) -> bool:
        role, number = self._tasks.get(target.task, ("", 0))
        return role == deed.who and deed.number in (None, number)
