"""What a container needs before it can be made: its image, and the dependencies that the image lacks.

Dependencies are installed once for an image and a set of requirements, by a container that does nothing else, into
a volume of their own. Workers see that volume, but cannot write to it: what one job's packages do when they
are installed, and what one job's code does, reaches no other job.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from flame.errors import RunnerError
from flame.runners.docker_config import DockerConfig
from flame.runners.docker_engine import Engine, Refused, log

T = TypeVar("T")
#: Where the volume is in a container.
PACKAGES = "/flame-packages"


class Once(Generic[T]):
    """Work that is done once however many ask for it at the same time."""

    def __init__(self) -> None:
        self._under_way: dict[Any, asyncio.Task[T]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._under_way

    async def __call__(self, key: Any, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do it, or wait until who does it has done it. A caller that is cancelled takes nobody's work along."""
        if key not in self._under_way:
            task = self._under_way[key] = asyncio.create_task(work())
            task.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(self._under_way[key])

    async def settled(self, key: Any = None) -> None:
        """Wait until what is being done has been done, well or badly; None for all of it."""
        tasks = [task for name, task in self._under_way.items() if key is None or name == key]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Break off what is being done."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Images:
    """The images of an engine, pulled as the configuration says."""

    def __init__(self, engine: Engine, config: DockerConfig) -> None:
        self._engine = engine
        self._policy = config.pull_policy
        self._credentials: dict[str, str] | None = None
        if config.credentials is not None:
            known = config.credentials
            self._credentials = {"username": known.username, "password": known.password.reveal()}
            self._credentials |= {"serveraddress": known.registry} if known.registry else {}
        self._once: Once[str] = Once()

    async def have(self, image: str) -> str:
        """The id of an image that is on the engine from now on.

        :raises flame.errors.RunnerError: it is not there and cannot be had; names it.
        """
        return await self._once(image, lambda: self._have(image))

    async def close(self) -> None:
        """Break off what is being pulled."""
        await self._once.close()

    async def _have(self, image: str) -> str:
        found = await self._engine.find("inspect_image", image)
        if self._policy == "always" or (found is None and self._policy == "missing"):
            refusal = await self._pull(image)
            found = await self._engine.find("inspect_image", image)
            if found is None:
                raise RunnerError(
                    f"The image {image!r} is not on the Docker engine, and it cannot be pulled: {refusal}."
                )
            if refusal:
                log.warning("the image %s cannot be pulled (%s): the one that is there is used", image, refusal)
        if found is None:
            raise RunnerError(f"The image {image!r} is not on the Docker engine, and pullPolicy is `never`.")
        return str(found["Id"])

    async def _pull(self, image: str) -> str:
        """Pull an image; gives the cause if that fails."""
        log.info("pulling the image %s", image)
        try:
            progress = str(await self._engine.call("pull", image, auth_config=self._credentials))
        except Refused as refusal:
            return refusal.reason.rstrip(".")
        # What goes wrong after the first bytes is told in the stream, under a status that promised success.
        failed = [line["error"] for line in map(json.loads, progress.splitlines()) if "error" in line]
        return str(failed[-1]).rstrip(".") if failed else ""


class Packages(NamedTuple):
    """The interpreter that has what was required, in a container; and the volume that it is in, where the image's own will not do."""

    python: str
    volume: str | None = None


class Dependencies:
    """The requirements of jobs, installed for the images of an engine.

    :param python: the images' interpreter.
    :param run: runs a command in a container of an image to its end, as root, with a volume at :data:`PACKAGES`; gives its exit
        code and what it printed. Takes image, command and volume.
    """

    def __init__(
        self, engine: Engine, python: str, run: Callable[[str, Sequence[str], str], Awaitable[tuple[int, str]]]
    ) -> None:
        self._engine = engine
        self._python = python
        self._run = run
        self._known: dict[str, Packages] = {}
        self._once: Once[Packages] = Once()

    async def have(self, image: str, image_id: str, requirements: Sequence[str]) -> Packages:
        """An interpreter that has what is required.

        :raises flame.errors.RunnerError: it cannot be installed; with pip's last lines.
        """
        if not requirements:
            return Packages(self._python)
        wanted = sorted(set(requirements))
        key = hashlib.sha256(json.dumps([image_id, self._python, wanted]).encode()).hexdigest()[:32]
        if key in self._known and await self._there(self._known[key]):
            return self._known[key]
        return await self._once(key, lambda: self._install(key, image, wanted))

    async def close(self) -> None:
        """Break off what is being installed."""
        await self._once.close()

    async def _there(self, packages: Packages) -> bool:
        return packages.volume is None or await self._engine.find("inspect_volume", packages.volume) is not None

    async def _install(self, key: str, image: str, requirements: list[str]) -> Packages:
        volume = f"flame-packages-{key}"
        labels = {"flame.image": image, "flame.requirements": " ".join(requirements)}
        await self._engine.call("create_volume", volume, labels=labels)
        command = [self._python, "-P", "-m", "flame.runners.environments", PACKAGES, *requirements]
        code, output = await self._run(image, command, volume)
        lines = output.strip().splitlines()
        if code != 0 or not lines:
            await self._engine.find("remove_volume", volume)
            raise RunnerError(lines[-1] if lines else f"{', '.join(requirements)} could not be installed in {image}.")
        packages = Packages(lines[-1], volume)
        if not packages.python.startswith(f"{PACKAGES}/"):  # the image has it all
            await self._engine.find("remove_volume", volume)
            packages = Packages(self._python)
        self._known[key] = packages
        return packages
