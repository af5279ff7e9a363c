"""The folder of :mod:`flame.sdk.chaospoints` in a place that does not see the one of a trial: kept like that one through a pipe.

It is sent there as text and run by the Python that is there, so it imports nothing but the standard library. Its only argument is the
folder. Lines that come in say ``put NAME`` or ``remove NAME``; lines that go out are the names of wishes that were taken. When the pipe
ends, nothing is left in the folder, so whoever was held goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

_LOOK = 0.01  # seconds between two looks


def keep(folder: str) -> None:
    """Keep a folder until the pipe ends."""
    os.makedirs(folder, exist_ok=True)
    told, rest = set[str](), b""
    while True:
        if select.select([0], [], [], _LOOK)[0]:
            piece = os.read(0, 65536)
            if not piece:
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                word, _, name = line.decode().partition(" ")
                _change(word, os.path.join(folder, name))
        taken = {name for name in os.listdir(folder) if ".taken-" in name}
        for name in sorted(taken - told):
            print(name, flush=True)
        told = taken
    for name in os.listdir(folder):
        _change("remove", os.path.join(folder, name))


def _change(word: str, path: str) -> None:
    if word == "put":
        open(path, "wb").close()
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


if __name__ == "__main__":
    keep(sys.argv[1])
