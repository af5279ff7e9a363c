"""Servers on this machine: the one that runs in a data directory, or a private one that is started in it.

A private server (`python -m flame serve --private`) lives as long as somebody is attached to it, and ends by itself
(:mod:`flame.client.attach`). This module imports next to nothing, so that `flame run` can start one before it
imports the rest; the two then load side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from flame.errors import ServerUnreachable


def running(data_dir: Path) -> str | None:
    """The address of the server that runs in a data directory, if its process is there."""
    try:
        url, pid = address((data_dir / "server.json").read_bytes())
        os.kill(pid, 0)
    except (OSError, OverflowError, ValueError):
        return None
    return url


def address(text: bytes) -> tuple[str, int]:
    """What a server says of itself in ``server.json``, and a private one in the first line that it prints: URL and pid.

    :raises ValueError: this is not it.
    """
    try:
        said = json.loads(text)
        return str(said["url"]), int(said["pid"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"{text!r} is no server's address") from error


class PrivateServer:
    """A private server that was asked to start.

    :param data_dir: its data directory.
    :ivar folder: the data directory.
    :ivar chosen: it is the one that serves; another one may have been faster.
    :ivar lost: it has ended although it was needed, and is not there any more.
    :raises flame.errors.ServerUnreachable: the directory cannot be written.
    """

    def __init__(self, data_dir: Path) -> None:
        self.log = data_dir / "server.log"
        self.chosen = self.lost = False
        self.folder = data_dir
        self.process = self._start(0)

    def start_again(self, port: int) -> None:
        """Start it once more, where it was: whoever uses it finds it there.

        :raises flame.errors.ServerUnreachable: the directory cannot be written.
        """
        self.process = self._start(port)

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        data_dir = self.folder
        command = ["serve", "--private", "--port", str(port), "--data-dir", str(data_dir)]
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._begin = log.tell()
                return subprocess.Popen(
                    [sys.executable, "-m", "flame", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C in the terminal is for the command, which stops the job first
                )
        except OSError as error:
            raise ServerUnreachable(f"No server can be started in {data_dir}: {error.strerror or error}.") from error

    def complaint(self) -> str:
        """Why it ended instead of starting, in its own words."""
        with self.log.open("rb") as log:
            log.seek(self._begin)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
        said = lines[-1] if lines else f"status {self.process.returncode}"
        return f"The private server did not start: {said} (its log is {self.log})."

    def leave(self) -> None:
        """Let it end by itself, which nobody waits for: a thread that dies with this process sees to it that no zombie stays."""
        threading.Thread(target=self.process.wait, daemon=True).start()

    def end(self) -> None:
        """End it, although nobody was attached to it yet."""
        self.process.terminate()
        self.leave()
