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


class EntersSlowly:
    """Takes its time to load something; a task takes as long as it says."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_session_enter(self, ctx: Any) -> None:
        time.sleep(self.seconds)

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        time.sleep(task.input)
        return task.input


class Sums:
    """Adds what it is given to an array that all tasks share."""

    def on_session_enter(self, ctx: Any) -> None:
        self.base = ctx.common_data["base"]

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        return {"sum": self.base + task.input["more"], "writeable": bool(self.base.flags.writeable)}


def slow_square(x: int) -> int:
    time.sleep(0.001)
    return x * x


def total(pair: Any) -> Any:
    """The sum of an array that is shared, and of a number that is the task's own."""
    array, number = pair
    return float(array.sum()) + number


class Makes:
    """Answers with objects."""

    def on_session_enter(self, ctx: Any) -> None:
        self.ctx = ctx

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        import numpy as np

        return ctx.put(np.ones(task.input))


class Mapped:
    """Says who it is, and how much memory of its own it has of the common data."""

    def on_session_enter(self, ctx: Any) -> None:
        self.array = ctx.common_data["array"]
        self.total = float(self.array.sum())

    def on_task_invoke(self, ctx: Any, task: Any) -> Any:
        address, private, path = self.array.ctypes.data, 0, ""
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                first, last = (int(part, 16) for part in words[0].split("-"))
                inside = first <= address < last
                path = words[-1] if inside else path
            elif inside and words[0] in ("Private_Dirty:", "Private_Clean:"):
                private += int(words[1]) * 1024 if words[0] == "Private_Dirty:" else 0
        return os.getpid(), self.total, private, path


class Counter:
    """An actor."""

    def __init__(self, start: int = 0) -> None:
        self.n = start

    def add(self, k: int = 1) -> int:
        self.n += k
        return self.n

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("no")

    def _private(self) -> None: ...


def power(base: int, exponent: int = 2) -> int:
    return int(base**exponent)


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
