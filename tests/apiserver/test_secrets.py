"""Secrets stay where they belong: a server and a job with known ones, and then everything that was written is searched."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from flame.apiserver.app import ROUTES
from flame.cli.main import flame
from flame.client import Client
from flame.controller.keys import Keys
from flame.errors import FlameError
from flame.spec.people import TokenForm, UserForm, UserRole
from flame.spec.records import JobState

TOKEN = "the-operators-token-4711"
#: Waits until the test has looked around, prints what it can see of its surroundings, and fails with all of it.
MAIN = """
import os, pathlib, time
print(sorted(os.environ))
while not pathlib.Path({gate!r}).exists():
    time.sleep(0.02)
raise SystemExit("it fails, so that its last words go everywhere: " + os.environ["FLAME_TASK"])
"""


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    folder = tmp_path / "certificates"
    for arguments in (["ca"], ["server"], ["client", "workers"]):
        assert CliRunner().invoke(flame, ["cert", *arguments, "--dir", str(folder)]).exit_code == 0
    return folder


@pytest.fixture
def server(tmp_path: Path, certificates: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``flame serve`` as an operator starts it, talkative, with everything that has a secret."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    files = {
        "--data-dir": tmp_path / "data",
        "--token-file": tmp_path / "token",
        "--tls-cert": certificates / "server.pem",
        "--tls-key": certificates / "server-key.pem",
        "--tls-ca": certificates / "ca.pem",
        "--tls-client-ca": certificates / "ca.pem",
        "--tls-worker-cert": certificates / "workers.pem",
        "--tls-worker-key": certificates / "workers-key.pem",
    }
    command = [sys.executable, "-m", "flame", "serve", "--port", "0", "--p2p-tls", "-v"]
    command += [str(part) for pair in files.items() for part in pair]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
    yield process
    process.kill()
    process.wait()


async def address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    async with asyncio.timeout(60):
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            with contextlib.suppress(OSError, ValueError):
                return str(json.loads((folder / "data" / "server.json").read_text())["url"])
            await asyncio.sleep(0.02)


async def everything(client: Client, job: str, tasks: list[str]) -> str:
    """All that the API shows to an admin, and what it says when it refuses."""
    said: list[str] = []
    for route in ROUTES:
        if route.method != "GET" or route.path.startswith("/v1/attach"):
            continue
        for one in (job, *tasks, "local", "ada"):
            parts = dict.fromkeys(("id", "name", "sha256", "invite", "round", "task", "digest"), one)
            path = route.path.format_map({**parts})
            try:
                said.append((await client._session.call("GET", path, into=bytes)).decode(errors="replace"))
            except FlameError as error:
                said.append(str(error))
    return "\n".join(said)


def seen(folder: Path) -> dict[str, bytes]:
    """All files that were written, but for those whose purpose is a secret."""
    found = {}
    for path in folder.rglob("*"):
        private = path.name in ("secret", "token") or path.name.endswith("-key.pem") or path.parent.name == "code"
        if path.is_file() and not private and "certificates" not in path.parts:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


async def test_no_secret_is_written_where_it_does_not_belong(
    tmp_path: Path,
    server: subprocess.Popen[bytes],
    certificates: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_code: Any,
    make_form: Any,
) -> None:
    monkeypatch.setenv("FLAME_CA", str(certificates / "ca.pem"))
    url = await address(tmp_path, server)
    gate = tmp_path / "gate"
    secrets: dict[str, str] = {"the operator's token": TOKEN}
    async with Client(url, TOKEN) as operator:
        made = await operator.users.create(UserForm(name="ada", role=UserRole.ADMIN))
        secrets["a user's token"] = made.token.token
    async with Client(url, made.token.token) as ada:
        secrets["another token"] = (await ada.tokens.create(TokenForm(user="ada"))).token
        digest = await ada.code.upload(make_code(MAIN.format(gate=str(gate)), MAIN.format(gate=str(gate))))
        job = await ada.jobs.create(make_form(digest))
        await ada.jobs.start(job.id)
        tasks = [task.id for task in await ada.jobs.tasks(job.id)]
        async for event in ada.jobs.events(job.id, follow=True):
            if event.type == "job" and event.data["state"] == JobState.RUNNING.value:
                break
        keys = Keys.load(tmp_path / "data" / "secret")
        secrets["the server's secret"] = (tmp_path / "data" / "secret").read_bytes().hex()
        secrets["the job's key"] = keys.job(job.id)
        secrets |= {f"the key of {task}": keys.task(task, 1) for task in tasks}
        for name in ("server", "workers", "ca"):
            lines = (certificates / f"{name}-key.pem").read_text().splitlines()
            secrets[f"the private key of {name}"] = lines[1]
        for key in (tmp_path / "data" / "workers").rglob("p2p-key.pem"):
            assert key.stat().st_mode & 0o077 == 0
            secrets[f"the key of {key.parent.name} for its peers"] = key.read_text().splitlines()[1]
        assert len(secrets) == 3 + 2 + 3 + 3 + 3
        lines = [" ".join(child.cmdline()) for child in psutil.Process(server.pid).children(recursive=True)]
        lines.append(" ".join(psutil.Process(server.pid).cmdline()))
        assert len(lines) > 6  # flamelets and their children
        for token in ("wrong", secrets["the job's key"], f"{made.token.token}x"):
            async with Client(url, token) as stranger:
                with pytest.raises(FlameError) as refused:
                    await stranger.info()
                assert token not in str(refused.value)
        gate.touch()
        assert (await ada.jobs.wait(job.id)).state is JobState.FAILED
        events = [json.dumps(event.data) async for event in ada.jobs.events(job.id)]
        shown = await everything(ada, job.id, tasks)
        logs = [b"".join([piece async for piece in ada.tasks.log(task)]).decode() for task in tasks]
    server.terminate()
    assert await asyncio.to_thread(server.wait, 60) == 0
    places = {"process list": lines, "events": events, "what the API shows": [shown], "logs of tasks": logs}
    for place, texts in places.items():
        for what, secret in secrets.items():
            assert not any(secret in text for text in texts), f"{what} is in the {place}"
    files = seen(tmp_path)
    assert {"server.log", "data/audit.log", "data/flame.db"} <= set(files)
    assert any(path.endswith("flamelet.log") for path in files)
    for path, data in files.items():
        for what, secret in secrets.items():
            assert secret.encode() not in data, f"{what} is in {path}"
    assert "it fails" in shown
    assert os.stat(tmp_path / "data").st_mode & 0o077 == 0
