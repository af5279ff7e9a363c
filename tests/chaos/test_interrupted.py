"""Whoever tells a trial or a campaign to end finds nothing of it afterwards: no server, worker, broker or database, and no file."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "survival"))
from campaign import mongo, mosquitto
from survivalkit import central

ROOT = Path(__file__).parents[2]


class Command:
    """A command whose processes, and theirs in turn, are known by their ``TMPDIR``, which is below a folder of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder / "temporary"
        self.folder.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**environment, "FLAME_CONFIG": str(folder / "none.yaml"), "TMPDIR": str(self.folder)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for process in self.others():
            process.kill()
        self.process.communicate()

    def others(self) -> list[psutil.Process]:
        """All but the command's own process."""
        return [process for process in psutil.process_iter() if self._mine(process)]

    def _mine(self, process: psutil.Process) -> bool:
        try:
            mine = process.environ().get("TMPDIR", "").startswith(str(self.folder))
            return mine and process.pid != self.process.pid
        except psutil.Error:
            return False

    def until_there(self, *parts: str) -> None:
        """Wait until for each part a process runs in whose command it is."""
        deadline = time.monotonic() + 100
        while missing := [part for part in parts if not any(part in command for command in self._commands())]:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, missing
            threading.Event().wait(0.05)

    def _commands(self) -> list[str]:
        found = []
        for process in self.others():
            try:
                found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def told(self, number: int) -> tuple[int, str]:
        """Tell it to end; gives its status and what it has said."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_trial_that_is_told_to_end_ends_its_server_and_its_workers(tmp_path, number):
    job = central(tmp_path / "job", sites=2, rounds=1_000_000)
    with Command(tmp_path, "flame", "chaos", str(job), "--pause", "trainer@train=3", "10m") as command:
        command.until_there("flame serve", "flame.flamelet", "flame.sdk.launch")
        status, out = command.told(number)
        assert (status, out.splitlines()[-1]) == (130, "Interrupted.")
        assert command.others() == []
    assert list(command.folder.iterdir()) == []


def test_a_campaign_that_is_told_to_end_ends_all_that_it_has_started(tmp_path):
    words = ["--cases", "40", "--lanes", "2", "--only", "pause", "--kind", "mqtt", "--kind", "database"]
    (scratch := tmp_path / "scratch").mkdir()
    others = [made[0]._command[0] for make in (mosquitto, mongo) if (made := make(scratch)) is not None]
    with Command(tmp_path, "benchmarks.chaos_campaign", *words) as command:
        command.until_there("flame serve", "flame.flamelet", "flame.sdk.launch", *others)
        status, _ = command.told(signal.SIGTERM)
        assert status == 130
        assert command.others() == []
    assert list(command.folder.iterdir()) == []
