"""The command as a process, real servers, and jobs to run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import blocked_until

WAITS = "import signal; print('up', flush=True); signal.pause()"
ROUNDS = (
    "import flame.sdk.link as l\n"
    "link = l.current()\n"
    "for i in range(1, 4): link.round(i, {'loss': 1 / i, 'Accuracy': 0.9}, 0.01)\n"
    "link.model({'name': 'tiny', 'path': '/kept/model.safetensors'})\n"
    "link.close()\n"
)


class Server:
    """A `flame serve` process."""

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir
        self.log = data_dir.parent / "serve.log"
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "flame", "serve", "--port", str(port), "--data-dir", str(data_dir)]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log, start_new_session=True)
        blocked_until(self._listens)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return bool(json.loads((self.data_dir / "server.json").read_text())["pid"] == self.process.pid)
        except (OSError, ValueError):
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Cli:
    """Runs `flame` in an environment of the test's own."""

    until = staticmethod(blocked_until)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        self.environment |= {
            "FLAME_CONFIG": str(folder / "config.yaml"),
            "FLAME_DATA_DIR": str(self.data_dir),
            "PYTHONWARNINGS": "error",
            "COLUMNS": "100",
        }

    def begin(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flame", *arguments],
            env=self.environment,
            cwd=self.folder,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **options},
        )

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """What a command prints; its status must be the one that is expected."""
        with self.begin(*arguments) as process:
            out, self.err = process.communicate(timeout=60)
        assert process.returncode == status, (process.returncode, out, self.err)
        assert "Traceback" not in self.err
        return out

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self(*arguments, "-o", "json", status=status))

    def refused(self, *arguments: str, status: int = 1) -> str:
        """The sentence with which a command is refused; it prints nothing else."""
        assert self(*arguments, status=status) == ""
        return self.err

    def workers(self) -> list[psutil.Process]:
        """The processes of workers of this test."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLAME_WORK_DIR", "").startswith(str(self.data_dir)):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def job(self, name: str = "job", trainer: str = "print('trained')", aggregator: str = ROUNDS, **fields: Any) -> str:
        """A job folder whose roles are plain scripts; gives its path."""
        folder = self.folder / name
        for role, main in (("trainer", trainer), ("aggregator", aggregator)):
            (folder / role).mkdir(parents=True, exist_ok=True)
            (folder / role / "main.py").write_text(main)
        content = {
            "name": name,
            "schema": {
                "name": "central",
                "roles": [{"name": "trainer", "isDataConsumer": True}, {"name": "aggregator"}],
                "channels": [{"name": "param", "pair": ["trainer", "aggregator"]}],
            },
            "code": ".",
            "datasets": [{"name": "north", "url": "file:///north"}, {"name": "south", "url": "file:///south"}],
            "hyperparameters": {"rounds": 3},
        }
        (folder / "job.json").write_text(json.dumps({**content, **fields}))
        return str(folder)


@pytest.fixture
def flame(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    for process in cli.workers():
        process.kill()


@pytest.fixture
def start_server(flame: Cli, unused_tcp_port: int) -> Iterator[Callable[[], Server]]:
    servers = []

    def start() -> Server:
        flame.data_dir.mkdir(exist_ok=True)
        server = Server(flame.data_dir, unused_tcp_port)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=20)


@pytest.fixture
def server(start_server: Callable[[], Server]) -> Server:
    return start_server()
