"""Points in a worker's work at which something can be made to happen to it: how crashes are tried at exact moments.

``FLAME_CHAOS`` names a folder. A file in it called ``WHO@POINT@ROUND.ACTION`` is a wish, which the first worker fulfils that comes to the
point:

* ``WHO``: a role, a task's id, or ``*``.
* ``POINT``: ``start`` (before the role's script is run), or the name of a tasklet, before it is done: ``internal_init``, ``load_data``,
  ``distribute``, ``fetch``, ``train``, ``upload``, ``aggregate``, ``checkpoint``, ``inform_end_of_training``, ``save_model`` ...; with a plus
  behind it (``train+``) after it was done.
* ``ROUND``: its number, or ``*``.
* ``ACTION``: ``kill`` (SIGKILL), ``stop`` (SIGSTOP; somebody else continues it), ``hold`` (wait until the file is gone).

The worker renames the file to ``WISH.taken-TASK.ATTEMPT-PID`` (``TASK`` is the task's id) before it acts, so a wish is fulfilled once, and whoever has made it can wait for that name
to appear; a worker that is held goes on when the file is removed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_ACTIONS = ("kill", "stop", "hold")


class Points:
    """The points of one worker.

    :param folder: where wishes are.
    :param names: what this worker is called in them: its role and its task's id.
    :param taker: what it calls itself when it fulfils one: its task's id and attempt. A number of a process is not enough where
        workers are in containers, each with numbers of its own.
    """

    def __init__(self, folder: Path, names: set[str], taker: str = "") -> None:
        self._folder = folder
        self._names = names | {"*"}
        self._taker = taker

    def reach(self, point: str, round: int) -> None:
        """The worker is at a point: fulfil a wish that says so."""
        for name in sorted(os.listdir(self._folder)) if self._folder.is_dir() else ():
            wish, _, action = name.rpartition(".")
            who, *where = wish.split("@")
            if action in _ACTIONS and who in self._names and where in ([point, str(round)], [point, "*"]):
                self._fulfil(name, action)

    def _fulfil(self, name: str, action: str) -> None:
        taken = self._folder / f"{name}.taken-{self._taker}-{os.getpid()}"
        try:
            (self._folder / name).rename(taken)
        except FileNotFoundError:
            return  # another one was faster
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while action == "hold" and taken.exists():
            time.sleep(0.002)


def points(*names: str) -> Callable[[str, int], None] | None:
    """What to call at each point; None where nobody wants anything.

    :param names: what this worker is called.
    """
    folder = os.environ.get("FLAME_CHAOS")
    if not folder:
        return None
    task, attempt = os.environ.get("FLAME_TASK", ""), os.environ.get("FLAME_ATTEMPT", "1")
    return Points(Path(folder), {*names, task} - {""}, f"{task}.{attempt}").reach
