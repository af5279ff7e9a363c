"""``flame chaos`` as a command, on a job of two sites whose workers are on a compute of its server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "survival"))
from survivalkit import central

from flame.chaos.server import Server
from flame.chaos.trial import our_address

RESTART = {"attempts": 5, "backoff": 0.1}


def with_this_machine(folder: Path, name: str, kind: str, config: dict[str, Any]) -> Path:
    """A file with two computes: ``here``, which is this machine, and another one."""
    path = folder / "computes.yaml"
    path.write_text(yaml.safe_dump([{"name": "here", "kind": "local"}, {"name": name, "kind": kind, "config": config}]))
    return path


def on_private_server(
    folder: Path,
    computes: Path,
    placement: dict[str, Any],
    *words: str,
    rounds: int = 4,
    end_after: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Give the command the job's files. It must leave no temporary file.

    :param computes: a file with the computes of its private server.
    :param end_after: when it has said this, it is told to end.
    """
    job = central(folder / "job", sites=2, placement=placement, restart=RESTART, rounds=rounds)
    temporary = folder / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "flame", "chaos", str(job), "--computes", str(computes), *words, "-o", "json"],
        env={**_environment(), "FLAME_CONFIG": str(folder / "none"), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    if end_after is not None:
        while end_after not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.terminate()
    out, err = process.communicate(timeout=170)
    assert not list(temporary.iterdir())
    return subprocess.CompletedProcess(process.args, process.returncode, out, said + err)


def on_running_server(folder: Path, computes: Path, placement: dict[str, Any], *words: str) -> Any:
    """Give the command the id of a job on a server that runs, with these computes; gives what it tells. It must leave no wish."""
    settings = {"FLAME_CONFIG": str(folder / "none"), "FLAME_TOKEN": "of-the-test"}
    points = folder / "points"
    options = ["--computes", str(computes), "--host", our_address(), "--insecure-plain-http"]
    server = Server(folder / "data", {**settings, "FLAME_CHAOS": str(points)}, options)
    asyncio.run(server.start())

    def flame(*command: str) -> Any:
        environment = {**_environment(), **settings, "FLAME_DATA_DIR": str(folder / "data"), "FLAME_SERVER": server.url}
        done = subprocess.run(
            [sys.executable, "-m", "flame", *command, "-o", "json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=170,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    try:
        created = flame("job", "create", str(central(folder / "job", sites=2, placement=placement, restart=RESTART)))
        told = flame("chaos", created["id"], *words)
    finally:
        asyncio.run(server.end())
    assert list(points.iterdir()) == []
    return told


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
