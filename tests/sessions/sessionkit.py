"""Applications that the tests' sessions serve, and servers to serve them. The executors get this file as it is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def square(x: Any) -> Any:
    return x * x


def fail(x: Any) -> Any:
    raise ValueError(f"no {x}")


def pid(_: Any) -> int:
    return os.getpid()


def wait_for(path: str) -> str:
    """Return once a file is there."""
    while not Path(path).exists():
        time.sleep(0.002)
    return path


def fail_until(path: str) -> int:
    """Fail as often as the file has not three lines yet."""
    with open(path, "a+") as file:
        file.write("x\n")
        file.seek(0)
        tries = len(file.readlines())
    if tries < 3:
        raise RuntimeError(f"try {tries}")
    return tries


def die(path: str) -> str:
    """Take the process down the first time."""
    if not Path(path).exists():
        Path(path).touch()
        os._exit(3)
    return "alive"


def die_always(_: Any) -> None:
    os.kill(os.getpid(), 9)


class Told:
    """Writes down what it is told."""

    def __init__(self, folder: str = "", offset: int = 0) -> None:
        self.folder = Path(folder) if folder else None
        self.offset = offset

    def _say(self, what: str) -> None:
        if self.folder is not None:
            with (self.folder / f"{os.getpid()}.told").open("a") as file:
                file.write(what + "\n")

    def on_session_enter(self, ctx: Any) -> None:
        self.ctx = ctx
        self._say("enter")

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        self._say(f"task {task.id}")
        return [task.id, task.attempt, task.input, ctx.common_data, self.offset]

    def on_session_leave(self) -> None:
        self._say("leave")


class NeverEnters:
    def on_session_enter(self, ctx: Any) -> None:
        raise ConnectionError("the database is away")

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        raise AssertionError


class Sums:
    """Adds what it is given to an array that all tasks share."""

    def on_session_enter(self, ctx: Any) -> None:
        self.base = ctx.common_data["base"]

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        return {"sum": self.base + task.input["more"], "writeable": bool(self.base.flags.writeable)}


def slow_square(x: int) -> int:
    time.sleep(0.001)
    return x * x
