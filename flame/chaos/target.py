"""What can be hit: a process of a worker, wherever it runs."""

from __future__ import annotations

import abc
from dataclasses import dataclass


@dataclass(frozen=True)
class Target(abc.ABC):
    """A process of a worker.

    :ivar task: the id of the task that it works on.
    :ivar attempt: which attempt of it.
    :ivar flamelet: it is the agent, not the code.
    """

    task: str
    attempt: int
    flamelet: bool

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Which process it is, in words."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """SIGKILL; one that is gone already is fine."""

    @abc.abstractmethod
    async def freeze(self) -> None:
        """SIGSTOP: it is there and does nothing, as a machine that sleeps."""

    @abc.abstractmethod
    async def thaw(self) -> None:
        """Let it go on."""

    @abc.abstractmethod
    async def cut(self) -> int:
        """End all its connections; gives how many there were.

        :raises flame.errors.UsageError: that cannot be done there.
        """

    def __str__(self) -> str:
        return f"{'flamelet of ' if self.flamelet else ''}{self.task}.{self.attempt} ({self.place})"
