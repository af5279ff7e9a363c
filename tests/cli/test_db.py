"""``flame db``: a server's state moves to another database, and a server that is started there goes on with it."""

from __future__ import annotations

import signal
import socket
import stat
from collections.abc import Callable
from typing import Any

import pytest


def end(server: Any) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=20) == 0


def test_the_state_moves_to_mongodb_and_back_with_a_server_on_each(
    flame: Any, start_server: Callable[[], Any], mongo_url: str
) -> None:
    server = start_server()
    job = flame.json("job", "create", flame.job(), "--server", server.url)["id"]
    flame("job", "start", job, "--server", server.url)
    flame("job", "wait", job, "--server", server.url)
    before = flame.json("job", "get", job, "--server", server.url)
    assert before["state"] == "completed"
    end(server)
    moved = flame.json("db", "export", "state.zip")
    assert {name: moved[name] > 0 for name in ("documents", "events", "bundles")} == dict.fromkeys(
        ("documents", "events", "bundles"), True
    )
    assert flame.err == "", "only a terminal is shown how far it is"
    assert stat.S_IMODE((flame.folder / "state.zip").stat().st_mode) == 0o600
    there = flame.json("db", "import", "state.zip", "--db", mongo_url)
    assert {**there, "file": ""} == {**moved, "file": ""}
    assert "is not empty" in flame.refused("db", "import", "state.zip", "--db", mongo_url)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    other = flame.begin("serve", "--port", port, "--db", mongo_url, "--data-dir", str(flame.folder / "other"))
    try:
        flame.until(lambda: (flame.folder / "other" / "server.json").exists())
        assert flame.json("job", "get", job, "--server", url) == before
        said = flame.refused("db", "export", "again.zip", "--db", mongo_url, "--data-dir", str(flame.folder / "third"))
        assert "Another server works on this database: process" in said
        assert f"Another server uses {flame.folder}/other" in flame.refused(
            "db", "export", "again.zip", "--data-dir", str(flame.folder / "other")
        )
    finally:
        other.send_signal(signal.SIGTERM)
        other.communicate(timeout=30)
    assert flame("db", "export", "back.zip", "--db", mongo_url).startswith("The state is in back.zip: ")
    said = flame("db", "import", "back.zip", "--data-dir", str(flame.folder / "back"))
    assert said.startswith("The state of back.zip is in the database: ")
    assert not (flame.folder / "again.zip").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04"])
def test_a_file_that_is_no_export_is_refused_and_nothing_is_left(flame: Any, content: bytes) -> None:
    (flame.folder / "x.zip").write_bytes(content)
    assert "x.zip: This is no export of Flame's" in flame.refused("db", "import", "x.zip")
    assert "does not exist" in flame.refused("db", "import", "absent.zip", status=2)


def test_a_running_server_keeps_its_state_for_itself(flame: Any, server: Any) -> None:
    for command in (("export",), ("import",)):
        (flame.folder / "state.zip").write_bytes(b"")
        said = flame.refused("db", *command, "state.zip", "--data-dir", str(server.data_dir))
        assert f"Another server uses {server.data_dir}: process {server.process.pid} at {server.url}" in said
