"""Elastic sessions from the command line: applications, tasks of them, and sessions seen from outside."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flame.client import Client
from flame.spec.sessions import SessionForm

pytestmark = pytest.mark.usefixtures("server")

CODE = """
import time
from pathlib import Path


class Divide:
    def __init__(self, by=1):
        self.by = by

    def on_task_invoke(self, ctx, task):
        return {"quotient": task.input / self.by}


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.002)
"""


@pytest.fixture
def code(flame: Any) -> str:
    path = flame.folder / "sums.py"
    path.write_text(CODE)
    return str(path)


def test_applications_are_made_changed_and_removed(flame: Any, code: str) -> None:
    made = flame.json("app", "create", "halves", "--code", code, "--entry", "sums:Divide", "--argument", "by=2")
    assert (made["name"], made["application"]["arguments"]) == ("halves", {"by": 2})
    assert [one["id"] for one in flame.json("app", "list")] == [made["id"]]
    assert "sums:Divide" in flame("app", "list")
    assert "already" in flame.refused("app", "create", "halves", "--code", code, "--entry", "sums:Divide")
    changed = flame.json("app", "update", "halves", "--argument", "by=4", "--max-instances", "1", "--env", "KEY=hidden")
    assert (changed["id"], changed["application"]["maxInstances"]) == (made["id"], 1)
    assert changed["application"]["code"] == made["application"]["code"]
    assert flame.json("exec", "halves", "--input", "2") == [{"output": {"quotient": 0.5}}]
    shown = flame("app", "get", made["id"])
    assert "by=4" in shown
    assert "hidden" not in shown
    flame("app", "delete", "halves")
    assert flame.json("app", "list") == []
    assert "halves" in flame.refused("app", "get", "halves")
    assert "MODULE:NAME" in flame.refused("app", "create", "nothing", "--code", code, status=2)
    assert "no file and no folder" in flame.refused(
        "app", "create", "x", "--code", "absent", "--entry", "a:b", status=2
    )


def test_tasks_are_run_and_one_that_fails_is_in_the_status(flame: Any, code: str) -> None:
    flame("app", "create", "halves", "--code", code, "--entry", "sums:Divide", "--argument", "by=2")
    lines = flame("exec", "halves", "--input", "4", "--input", "5").splitlines()
    assert [json.loads(line) for line in lines] == [{"quotient": 2}, {"quotient": 2.5}]
    out = flame("exec", "halves", "--input", "4", "--input", '"four"', "--input", "6", status=1)
    assert [json.loads(line)["quotient"] for line in out.splitlines()] == [2, 3]
    assert "TypeError" in flame.err
    first, second = flame.json("exec", "halves", "--input", "1", "--input", "[]", status=1)
    assert first == {"output": {"quotient": 0.5}}
    assert "TypeError" in second["error"]
    with flame.begin("exec", "halves", "--input", "-", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate("8\n\n10\n", timeout=60)
    assert (process.returncode, [json.loads(line)["quotient"] for line in out.splitlines()]) == (0, [4, 5])
    assert "--input" in flame.refused("exec", "halves", status=2)
    assert "nobody" in flame.refused("exec", "nobody", "--input", "1")

    listed = flame.json("session", "list", "--state", "closed")
    assert [one["counts"]["total"] for one in listed] == [2, 3, 2, 2]
    (failed,) = flame.json("session", "tasks", listed[1]["id"], "--state", "failed")
    assert (failed["id"], failed["failure"]["type"]) == (2, "TypeError")
    assert "There are more: --after 1." in (flame("session", "tasks", listed[1]["id"], "--limit", "1"), flame.err)[1]


def test_ping_says_how_long_all_took(flame: Any) -> None:
    said = flame.json("ping", "-n", "50")
    assert (said["tasks"], said["succeed"], said["failed"]) == (50, 50, 0)
    assert 0 < said["sessionSeconds"] < said["seconds"] + said["sessionSeconds"]
    lines = [line.split() for line in flame("ping", "-n", "20").splitlines() if line.strip()]
    assert lines[0][:1] + lines[1][:2] == ["Session", "20", "tasks"]
    assert lines[2] == ["Total", "Succeed", "Failed", "Pending", "Running"]
    assert lines[-2] == ["20", "20", "0", "0", "0"]
    assert lines[-1][0] == "Done"


async def test_a_session_is_watched_and_closed_from_outside(flame: Any, code: str, server: Any, tmp_path: Path) -> None:
    from flame.sessions import connect

    gate = tmp_path / "gate"
    made = flame.json("app", "create", "waiter", "--code", code, "--entry", "sums:wait_for")
    async with Client(server.url) as client, connect(server.url) as connection:
        record = await client.sessions.open(SessionForm(id="mine", app=made["id"], max_instances=1))
        session = connection.join(record.id)
        await session.__aenter__()
        futures = session.submit_many([str(gate), str(gate)])
        await session.accepted()
        async for counts in session.watch():
            if counts.running == 1:
                break
        assert "1 running" in flame("session", "get", "mine")
        assert flame.json("session", "get", "mine")["counts"]["pending"] == 1
        assert "runs a task" in flame.refused("session", "close", "mine")
        with flame.begin("session", "watch", "mine") as watching:
            head, now = watching.stdout.readline().split(), watching.stdout.readline().split()
            assert head == ["Total", "Succeed", "Failed", "Pending", "Running"]
            assert now == ["2", "0", "0", "1", "1"]
            (closed,) = flame.json("session", "close", "--force", "mine")
            out, _ = watching.communicate(timeout=60)
        assert (watching.returncode, out.splitlines()[-1].split()[:2]) == (0, ["2", "0"])
        assert closed["state"] == "closed"
        assert flame.json("session", "list", "--state", "open") == []
        assert "no session" in flame.refused("session", "get", "other").lower()
        for future in futures:
            assert isinstance(await _end(future), Exception)


async def _end(future: Any) -> Any:
    try:
        return await future
    except Exception as error:
        return error
