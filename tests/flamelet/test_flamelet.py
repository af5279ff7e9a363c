"""What a flamelet promises: run once, say everything, leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import until

LINK = """
    import json, os, socket, sys
    link = socket.socket(fileno=int(os.environ["FLAME_LINK_FD"]))
    lines = link.makefile("r")
    def say(**message):
        link.sendall(json.dumps(message).encode() + b"\\n")
    def hear():
        return json.loads(lines.readline())
"""

# Says its pid and that of a child of its own, which would outlive it, and stays until it is killed.
STAYS = (
    LINK
    + """
    import subprocess, signal
    child = subprocess.Popen(["sleep", "1000"])
    say(type="metrics", round=1, metrics={"pid": os.getpid(), "child": child.pid})
    signal.pause()
"""
)

IGNORES_SIGTERM = (
    LINK
    + """
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(type="metrics", round=1, metrics={"pid": os.getpid()})
    while True:
        signal.pause()
"""
)


def alive(pid: float) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(*pids: float) -> None:
    await until(lambda: not any(alive(pid) for pid in pids))


async def test_a_task_runs_and_all_that_it_says_arrives_in_order(start: Any) -> None:
    server, worker = await start(
        LINK
        + """
    print("hello"); print("trouble", file=sys.stderr)
    say(type="metrics", round=1, metrics={"loss": 0.5})
    say(type="round", round=1, metrics={"loss": 0.5}, seconds=0.1)
    say(type="warning", message="careful")
    say(type="model", name="m", path="p")
    """
    )
    final = await server.until_state("completed")
    assert await worker.exit() == 0
    assert final["exitCode"] == 0
    types = [report["type"] for report in server.reports]
    assert types == ["state", "metrics", "round", "warning", "model", "state"]
    assert server.reports[1]["data"] == {"round": 1, "metrics": {"loss": 0.5}}
    assert server.log == b"hello\ntrouble\n"


async def test_the_child_finds_its_configuration_and_only_its_own_code(start: Any) -> None:
    server, worker = await start(
        """
        import json, os, pathlib
        print(json.load(open("config.json"))["role"], pathlib.Path.cwd().name)
        print(sorted(p.name for p in pathlib.Path("..").iterdir() if p.is_dir()))
        print(os.environ["FLAME_JOB_KEY"] == "ab" * 32, os.environ["FLAME_ATTEMPT"], "FLAME_TASK_KEY" in os.environ)
        print(os.path.isdir(os.environ["FLAME_ARTIFACTS"]))
        """
    )
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert server.log.decode().splitlines() == ["trainer trainer", "['artifacts', 'trainer']", "True 1 False", "True"]


async def test_code_that_is_not_what_the_manifest_promises_is_not_run(start: Any) -> None:
    server, worker = await start("print('run')")
    server.promised = "0" * 64
    await server.down()
    await server.up()
    final = await server.until_state("failed")
    assert await worker.exit() == 0
    assert "digest" in final["message"]
    assert server.log == b""


async def test_a_worker_of_another_version_says_so_and_does_not_try_for_an_hour(start: Any) -> None:
    server, worker = await start("print('run')")
    server.newer = {"wish": 1}
    await server.down()
    await server.up()
    final = await server.until_state("failed")
    assert await worker.exit() == 0
    assert "is of another version than the server's: Object contains unknown field `wish`" in final["message"]


async def test_the_whole_log_is_there_before_the_final_report(start: Any) -> None:
    server, worker = await start("print(*(f'line {i}' for i in range(300000)), 'no newline', sep='\\n', end='')")
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert server.log_at_end == server.log
    lines = server.log.decode().splitlines()
    assert lines[:300000:100000] == ["line 0", "line 100000", "line 200000"]
    assert lines[-1] == "no newline"


async def test_a_failure_says_its_exit_code_its_sentence_and_the_end_of_its_log(start: Any) -> None:
    server, worker = await start(
        LINK
        + """
    for i in range(100): print("line", i)
    say(type="failure", message="The data are missing.")
    sys.exit(3)
    """
    )
    final = await server.until_state("failed")
    assert await worker.exit() == 0
    assert (final["exitCode"], final["message"]) == (3, "The data are missing.")
    assert final["log"] == [f"line {i}" for i in range(80, 100)]


async def test_a_child_that_is_killed_is_reported_with_the_signal(start: Any) -> None:
    server, worker = await start("import os\nos.kill(os.getpid(), 11)")
    final = await server.until_state("failed")
    assert await worker.exit() == 0
    assert final["signal"] == "SIGSEGV"
    assert "SIGSEGV" in final["message"]


async def test_a_stop_ends_the_child_and_what_it_started(start: Any) -> None:
    server, worker = await start(STAYS)
    pids = (await server.until_said("metrics"))["metrics"]
    await server.send("stop", reason="The user asked for it.")
    final = await server.until_state("terminated")
    assert await worker.exit() == 0
    assert final["message"] == "The user asked for it."
    await gone(pids["pid"], pids["child"])


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(start: Any) -> None:
    server, worker = await start(IGNORES_SIGTERM, FLAME_STOP_GRACE="0.2")
    pids = (await server.until_said("metrics"))["metrics"]
    await server.send("stop")
    final = await server.until_state("terminated")
    assert await worker.exit() == 0
    assert final["signal"] == "SIGKILL"
    await gone(pids["pid"])


async def test_a_stop_before_the_start_runs_nothing(start: Any) -> None:
    server, worker = await start("print('run')")
    server.events.clear()
    await server.send("stop", reason="Too late.")
    await server.send("start", attempt=1)
    await server.until_state("terminated")
    assert await worker.exit() == 0
    assert server.log == b""


async def test_a_sigterm_to_the_flamelet_is_a_stop(start: Any) -> None:
    server, worker = await start(STAYS)
    pids = (await server.until_said("metrics"))["metrics"]
    worker.process.send_signal(signal.SIGTERM)
    await server.until_state("terminated")
    assert await worker.exit() == 0
    await gone(pids["pid"], pids["child"])


async def test_a_sigterm_is_heeded_although_the_server_is_away(start: Any) -> None:
    server, worker = await start(STAYS)
    pids = (await server.until_said("metrics"))["metrics"]
    await server.down()
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.exit() == 1
    await gone(pids["pid"], pids["child"])


async def test_the_child_does_not_outlive_a_killed_flamelet(start: Any) -> None:
    server, worker = await start("import os, signal\nprint(os.getpid(), flush=True)\nsignal.pause()", sdk=True)
    await server.until(lambda: server.log.endswith(b"\n"))
    assert psutil.pid_exists(int(server.log))
    worker.process.kill()
    await worker.exit()
    await gone(int(server.log))


async def test_a_role_speaks_through_the_sdk(start: Any) -> None:
    server, worker = await start(
        """
        import logging
        from flame.sdk import link
        link.current().metrics(1, {"loss": 0.25})
        raise ValueError("too small")
        """,
        sdk=True,
    )
    final = await server.until_state("failed")
    assert await worker.exit() == 0
    assert [r["data"] for r in server.reports if r["type"] == "metrics"] == [{"round": 1, "metrics": {"loss": 0.25}}]
    assert final["message"].startswith("ValueError: too small (main.py:")
    assert final["exitCode"] == 1
    assert "ValueError: too small" in final["log"][-1]


async def test_while_the_server_is_away_the_child_goes_on_and_nothing_is_lost_or_doubled(start: Any) -> None:
    server, worker = await start(
        LINK
        + """
    say(type="metrics", round=0, metrics={})
    hear()
    for i in range(1, 200):
        print("line", i)
        say(type="metrics", round=i, metrics={})
    say(type="warning", message="done")
    hear()
    """
    )
    await server.until_said("metrics")
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.down()
    await until(lambda: b"line 199" in (worker.work / "task.log").read_bytes())
    await server.up()
    await server.until_said("warning")
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert [r["data"]["round"] for r in server.reports if r["type"] == "metrics"] == list(range(200))
    assert server.log.decode().splitlines() == [f"line {i}" for i in range(1, 200)]
    assert server.states() == ["running", "completed"]
    assert server.connections >= 2


async def test_answers_that_get_lost_double_nothing(start: Any) -> None:
    server, worker = await start(
        LINK
        + """
    say(type="warning", message="ready")
    hear()
    for i in range(20):
        print("line", i)
        say(type="metrics", round=i, metrics={})
    """
    )
    await server.until_said("warning")
    server.swallow = 6
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert [r["data"]["round"] for r in server.reports if r["type"] == "metrics"] == list(range(20))
    assert server.log.decode().splitlines() == [f"line {i}" for i in range(20)]


async def test_a_start_that_comes_twice_runs_once(start: Any) -> None:
    server, worker = await start(LINK + "    print('run')\n    hear()\n")
    await server.until(lambda: server.log)
    await server.send("start", attempt=1)
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert server.log == b"run\n"


async def test_a_worker_that_is_restarted_in_place_does_not_run_again(start: Any) -> None:
    server, worker = await start(STAYS)
    await server.until_said("metrics")
    await server.until(lambda: server.acked >= 2)
    (child,) = psutil.Process(worker.process.pid).children()
    os.killpg(worker.process.pid, signal.SIGKILL)
    await worker.exit()
    child.kill()  # a container that is restarted takes it along
    _, second = await start(server, worker.work)
    final = await server.until_state("terminated")
    assert await second.exit() == 0
    assert "never run twice" in final["message"]
    assert server.states() == ["running", "terminated"]


@pytest.mark.parametrize("refusal", [(403, "Forbidden"), (404, "NotFound"), (401, "Unauthorized")])
async def test_a_fenced_attempt_ends_its_child_and_says_nothing_more(start: Any, refusal: tuple[int, str]) -> None:
    server, worker = await start(STAYS)
    pids = (await server.until_said("metrics"))["metrics"]
    server.refusal = refusal
    await server.down()
    await server.up()
    assert await worker.exit() == 1
    await gone(pids["pid"], pids["child"])
    assert server.states() == ["running"]


async def test_a_stranger_at_the_servers_address_does_not_end_the_child(start: Any) -> None:
    server, worker = await start(LINK + "    say(type='warning', message='up')\n    hear()\n    print('still here')\n")
    await server.until_said("warning")
    await server.down()

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\nConnection: close\r\n\r\nno such")
        writer.close()

    asked = asyncio.Event()
    stranger = await asyncio.start_server(
        lambda r, w: (asked.set(), refuse(r, w))[1], "127.0.0.1", server._port, reuse_address=True
    )
    async with asyncio.timeout(10):
        await asked.wait()
    stranger.close()
    await stranger.wait_closed()
    await server.up()
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert server.log == b"still here\n"


async def test_an_orphan_ends_itself(start: Any) -> None:
    server, worker = await start(STAYS, FLAME_ORPHAN_AFTER="0.3")
    pids = (await server.until_said("metrics"))["metrics"]
    await server.down()
    assert await worker.exit() == 1
    await gone(pids["pid"], pids["child"])


async def test_the_lease_is_renewed_a_few_times_within_its_length(start: Any) -> None:
    server, worker = await start(LINK + "    hear()\n")
    server.lease_seconds = 0.2
    await server.down()
    await server.up()
    await server.until(lambda: server.leases >= 5)
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    assert await worker.exit() == 0


async def test_a_connection_that_dies_in_silence_costs_no_lease(start: Any) -> None:
    server, worker = await start(LINK + "    hear()\n")
    server.lease_seconds, server.dead_connections = 4.0, 1  # before Python has even begun there
    async with asyncio.timeout(20):  # any other answer is waited for three times as long
        await server.until(lambda: server.leases >= 2)
    assert server.dead_connections == 0
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    assert await worker.exit() == 0


async def test_workers_hear_of_their_peers(start: Any) -> None:
    server, worker = await start(
        LINK
        + """
    say(type="join", channel="c", group="g", member={"end": "me"})
    print(json.dumps(hear()))
    say(type="leave", channel="c", group="g")
    """
    )
    joined = await server.until_said("join")
    assert joined == {"channel": "c", "group": "g", "member": {"end": "me"}}
    await server.send("peers", channel="c", group="g", joined=[{"end": "you"}], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert json.loads(server.log) == {
        "type": "peers",
        "channel": "c",
        "group": "g",
        "joined": [{"end": "you"}],
        "left": [],
    }
    assert [r["type"] for r in server.reports] == ["state", "join", "leave", "state"]


HANDS_IN = (
    LINK
    + """
    path = os.path.join(os.environ["FLAME_ARTIFACTS"], "model.bin")
    with open(path, "wb") as file:
        file.write(b"x" * 3_000_000)
    say(type="warning", message="written")
    hear()
    say(type="artifact", name="model.bin", path=path)
    print(json.dumps(hear()))
"""
)


async def test_an_artifact_is_in_the_servers_hands_when_the_child_is_told_so(start: Any) -> None:
    server, worker = await start(HANDS_IN)
    await server.until_said("warning")
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert json.loads(server.log) == {"type": "artifact", "name": "model.bin", "path": "/kept/model.bin"}
    assert server.artifacts == {"model.bin": b"x" * 3_000_000}


async def test_an_artifact_waits_for_the_server_to_come_back(start: Any, tmp_path: Path) -> None:
    go, handed_in = tmp_path / "go", tmp_path / "handed in"
    waits = f"import time\n    while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    main = HANDS_IN.replace("    hear()\n", f"    {waits}\n", 1).replace(
        "print(", f"open({str(handed_in)!r}, 'w').close()\n    print(", 1
    )
    server, worker = await start(main)
    await server.until_said("warning")
    await server.down()
    go.touch()
    await until(handed_in.exists)
    await server.up()
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert server.artifacts == {"model.bin": b"x" * 3_000_000}


async def test_a_checkpoint_is_handed_in_after_the_rounds_that_it_stands_for(start: Any) -> None:
    """Whoever goes on from it reports none of them again."""
    main = (
        LINK
        + """
    for number in range(1, 6):
        say(type="round", round=number, metrics={}, seconds=0.1)
    path = os.path.abspath("checkpoint-5.safetensors")
    open(path, "w").close()
    say(type="checkpoint", round=5, path=path)
    print(hear()["name"])
"""
    )
    server, worker = await start(main)
    server.slow_reports = True
    assert await worker.exit() == 0
    assert server.checkpoints == {5: 5}


async def test_a_refused_artifact_is_told_to_the_child(start: Any) -> None:
    server, worker = await start(HANDS_IN)
    server.refuse_artifacts = True
    await server.until_said("warning")
    await server.send("peers", channel="c", group="g", joined=[], left=[])
    await server.until_state("completed")
    assert await worker.exit() == 0
    assert json.loads(server.log)["error"] == "model.bin is too big."
