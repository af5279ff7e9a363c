"""Processes of a worker in a container, wherever that is: found, and sent signals, by commands that are run in there."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flame.chaos.target import Target

#: Prints all processes of a container and the words of their commands, for :func:`read`.
LIST = 'for folder in /proc/[0-9]*; do echo "$folder"; tr "\\0" "\\n" <"$folder/cmdline"; echo; done 2>/dev/null'
_MODULES = {"flame.flamelet": True, "flame.sdk.launch": False}


@dataclass(frozen=True)
class Inside(Target):
    """A process in a container.

    :ivar pid: its number in there.
    """

    pid: int

    @abc.abstractmethod
    async def run(self, script: str) -> str:
        """Run a script in the container, as the worker's user; gives what it prints. A container that is gone has nothing to say."""

    async def kill(self) -> None:
        """See the base class."""
        await self.run(f"kill -KILL {self.pid}")

    async def freeze(self) -> None:
        """See the base class."""
        await self.run(f"kill -STOP {self.pid}")

    async def thaw(self) -> None:
        """See the base class."""
        await self.run(f"kill -CONT {self.pid}")


def read(listed: str) -> Iterator[tuple[int, bool]]:
    """The processes of a worker among all those of its container.

    :param listed: what :data:`LIST` has printed.
    :returns: their numbers, and whether it is the flamelet.
    """
    for entry in listed.split("/proc/")[1:]:
        number, *words = entry.split("\n")
        if number.isdecimal() and number != "1":  # that one started the others, and has their words in its command
            for module in _after(words, "-m"):
                if module in _MODULES:
                    yield int(number), _MODULES[module]


def _after(words: Sequence[str], option: str) -> Sequence[str]:
    at = words.index(option) + 1 if option in words else len(words)
    return words[at : at + 1]
