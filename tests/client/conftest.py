"""Real servers as processes, and jobs to run on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from waiting import until

JOB = {
    "name": "tiny",
    "schema": {
        "name": "central",
        "roles": [{"name": "trainer", "isDataConsumer": True}, {"name": "aggregator"}],
        "channels": [{"name": "param", "pair": ["trainer", "aggregator"]}],
    },
    "code": ".",
    "datasets": [{"name": "north", "url": "file:///north"}, {"name": "south", "url": "file:///south"}],
    "hyperparameters": {"rounds": 2},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory and a configuration of the test's own."""
    for name in [name for name in os.environ if name.startswith("FLAME_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLAME_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("FLAME_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """Makes a job folder whose roles are plain scripts."""

    def make(
        name: str = "job", trainer: str = "print('trained')", aggregator: str = "print('merged')", **fields: Any
    ) -> Path:
        folder = tmp_path / name
        for role, main in (("trainer", trainer), ("aggregator", aggregator)):
            (folder / role).mkdir(parents=True, exist_ok=True)
            (folder / role / "main.py").write_text(main)
        (folder / "job.json").write_text(json.dumps({**JOB, **fields}))
        return folder

    return make


class Server:
    """A `flame serve` process."""

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "flame", "serve", "--port", str(port), "--data-dir", str(data_dir)]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        log = (self.data_dir.parent / "serve.log").open("ab")
        with log:
            self.process = subprocess.Popen(self._command, stderr=log, start_new_session=True)  # noqa: ASYNC220
        await until(self._listens)

    def _listens(self) -> bool:
        try:
            said = json.loads((self.data_dir / "server.json").read_text())
        except (OSError, ValueError):
            return False
        assert self.process is not None
        assert self.process.poll() is None, (self.data_dir.parent / "serve.log").read_text()
        return bool(said["pid"] == self.process.pid)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=20)


@pytest.fixture
async def server(tmp_path: Path, home: Path, unused_tcp_port: int) -> AsyncIterator[Server]:
    home.mkdir()
    server = Server(home, unused_tcp_port)
    await server.start()
    yield server
    server.end()


@pytest.fixture
def workers() -> Any:
    """Finds the processes of this test's workers."""
    import psutil

    def find(data_dir: Path) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLAME_WORK_DIR", "").startswith(str(data_dir)):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    return find
