"""The commands of each noun, against a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from flame.cli.main import flame as root

WAITS = "import signal; print('up', flush=True); signal.pause()"


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append(((*path, name), command))
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize(
    ("path", "command"), commands(root), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_help_says_what_it_does_and_shows_an_example(path: tuple[str, ...], command: click.Command) -> None:
    text = command.get_help(click.Context(command, info_name="flame " + " ".join(path), max_content_width=110))
    assert command.help
    example = text[text.index("Example") :]
    assert re.search(rf"^ +(\w+=\S+ )?flame {' '.join(path)}", example, re.MULTILINE)


def test_help_is_there_under_both_its_names(flame: Any) -> None:
    assert "Usage: flame [OPTIONS] COMMAND" in flame("--help")
    assert "flame run examples/digits" in flame("run", "-h")


def test_a_job_from_its_creation_to_its_removal(flame: Any, server: Any) -> None:
    made = flame.json("job", "create", flame.job("digits"))
    assert made["state"] == "ready"
    assert flame.json("job", "start", "digits")["state"] in ("starting", "deploying", "running")
    ended = flame.json("job", "wait", "digits")
    assert (ended["job"], ended["state"]) == (made["id"], "completed")
    assert flame.json("job", "get", made["id"][:20])["rounds"][2]["metrics"]["Accuracy"] == 0.9
    assert [job["id"] for job in flame.json("job", "list", "--state", "completed")] == [made["id"]]
    tasks = flame.json("job", "tasks", "digits")
    assert [task["role"] for task in tasks] == ["aggregator", "trainer", "trainer"]
    assert flame("job", "logs", "digits", "--task", "trainer/1") == "trained\n"
    together = flame("job", "logs", "-f", "digits").splitlines()
    assert sorted(line for line in together if "trained" in line) == [
        "trainer/1    | trained",
        "trainer/2    | trained",
    ]
    assert flame("task", "logs", tasks[1]["id"]) == "trained\n"
    assert flame.json("task", "get", "trainer/2", "--job", "digits")["id"] == tasks[2]["id"]
    events = flame.json("job", "events", "digits", "-f")
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert len(flame("job", "events", "digits").splitlines()) == len(events)
    assert "digits" in flame("job", "list")
    assert "loss" in flame("job", "get", "digits")
    flame("job", "delete", "digits")
    assert flame.json("job", "list") == []
    assert "There is no job 'digits'" in flame.refused("job", "get", "digits")


def test_tables_align(flame: Any, server: Any) -> None:
    flame("job", "create", flame.job("a"))
    flame("job", "create", flame.job("a-longer-name"))
    lines = flame("job", "list").splitlines()
    assert lines[0].split() == ["ID", "NAME", "STATE", "CREATED", "TOOK"]
    assert len({line.index(word) for line, word in zip(lines, ["STATE", "ready", "ready"], strict=True)}) == 1


def test_a_name_of_several_jobs_means_the_newest_but_deletes_none(flame: Any, server: Any) -> None:
    first, second = (flame.json("job", "create", flame.job("same"))["id"] for _ in range(2))
    assert flame.json("job", "get", "same")["id"] == second
    assert f"2 jobs are called 'same'; this is about the newest one, {second}" in flame.err
    said = flame.refused("job", "delete", "same", status=2)
    assert first in said
    assert second in said
    assert "fits 2 jobs" in flame.refused("job", "get", second[:3], status=2)


def test_what_the_state_forbids_is_said_in_a_sentence(flame: Any, server: Any) -> None:
    flame("job", "create", flame.job("once"), "--start")
    flame("job", "wait", "once")
    assert flame.refused("job", "start", "once").startswith("Error: ")
    assert flame.refused("job", "stop", "once").startswith("Error: ")


def test_a_wait_ends_with_the_jobs_fate_or_its_own_deadline(flame: Any, server: Any) -> None:
    flame("job", "create", flame.job("slow", trainer=WAITS, aggregator=WAITS), "--start")
    assert "has not ended within 0.1 s" in flame.refused("job", "wait", "slow", "--timeout", "0.1")
    assert flame.json("job", "stop", "slow", "--wait")["state"] == "terminated"
    assert flame.json("job", "wait", "slow", status=1)["state"] == "terminated"
    assert flame.workers() == []


def test_a_wait_that_began_before_a_kill_of_the_server_returns_after_its_restart(flame: Any, server: Any) -> None:
    go = flame.folder / "go"
    trainer = f"import os, time\nprint('here', flush=True)\nwhile not os.path.exists({str(go)!r}): time.sleep(0.05)"
    flame("job", "create", flame.job("long", trainer=trainer), "--start")
    flame.environment["FLAME_SERVER"] = server.url
    waiting = flame.begin("job", "wait", "long", "-o", "json")
    log = flame.begin("job", "logs", "-f", "long", "--task", "trainer/1")
    assert "here" in log.stdout.readline()
    flame.until(lambda: flame.json("job", "get", "long")["state"] == "running")
    before = {process.pid for process in flame.workers()}
    server.kill()
    assert "Waiting for it to come back" in waiting.stderr.readline()
    server.start()
    assert before & {process.pid for process in flame.workers()}
    go.touch()
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    document = json.loads(out)
    assert document["state"] == "completed"
    assert [one["round"] for one in document["rounds"]] == [1, 2, 3]
    assert log.wait(timeout=20) == 0
    log.communicate()
    assert all(task["attempt"] == 1 for task in flame.json("job", "tasks", "long"))


def test_ending_a_tasks_worker_fails_its_job(flame: Any, server: Any) -> None:
    flame("job", "create", flame.job("frail", trainer=WAITS, aggregator=WAITS), "--start")
    flame.until(lambda: flame.json("job", "get", "frail")["state"] == "running")
    flame("task", "delete", "trainer/1", "--job", "frail")
    assert flame.json("job", "wait", "frail", status=1)["state"] == "failed"


def test_expansion_needs_no_server(flame: Any) -> None:
    configs = flame.json("job", "expand", flame.job("digits"))
    assert [one["role"] for one in configs] == ["aggregator", "trainer", "trainer"]
    assert configs[1]["dataset"] == "file:///north"
    out = flame("job", "expand", flame.job("digits"))
    assert out.splitlines()[0].split() == ["TASK", "ROLE", "GROUPS", "DATASET"]
    assert "param" in out[out.index("\n\n") :]
    assert all(len(line) <= 100 for line in out[out.index("\n\n") :].splitlines())


def test_designs_with_schema_and_code(flame: Any, server: Any) -> None:
    folder = flame.job("digits")
    made = flame.json("design", "create", folder, "--name", "central", "--description", "one")
    assert made["schema"]["name"] == "central"
    assert made["code"]
    assert flame.json("design", "update", "central", "--description", "two")["description"] == "two"
    schema = Path(flame.folder / "schema.json")
    schema.write_text(json.dumps(flame.json("schema", "get", "--design", "central")))
    assert "trainer" in flame("schema", "get", "--design", "central")
    flame("schema", "update", "--design", "central", str(schema))
    flame("code", "get", "--design", "central", "--to", str(flame.folder / "code.zip"))
    assert "aggregator" in flame("code", "get", "--design", "central")
    flame("code", "update", "--design", "central", str(flame.folder / "code.zip"))
    assert flame.json("design", "get", "central")["code"] == made["code"]
    assert [one["name"] for one in flame.json("design", "list")] == ["central"]
    job = flame.folder / "by-design.json"
    job.write_text(
        json.dumps({"name": "by-design", "designId": made["id"], "datasets": [{"name": "n", "url": "file:///n"}]})
    )
    flame("code", "delete", "--design", "central")
    assert flame.json("design", "get", "central")["code"] is None
    flame("design", "delete", "central")
    assert "no design 'central'" in flame.refused("design", "get", "central")


def test_a_topology_is_drawn_from_a_file_a_job_or_a_design(flame: Any, server: Any) -> None:
    folder = flame.job("digits")
    schema = json.loads((Path(folder) / "job.json").read_text())["schema"]
    (flame.folder / "schema.yaml").write_text(json.dumps(schema))
    flame("design", "create", folder, "--name", "central")
    drawn = [flame("schema", "draw", source) for source in (str(flame.folder / "schema.yaml"), folder, "central")]
    assert "trainer" in drawn[0]
    assert drawn[0] == drawn[1] == drawn[2]


def test_datasets(flame: Any, server: Any) -> None:
    file = flame.folder / "dataset.json"
    file.write_text(json.dumps({"name": "north", "url": "https://example.org/north.csv", "realm": "us"}))
    made = flame.json("dataset", "create", str(file))
    assert made["dataset"]["realm"] == "us"
    file.write_text(json.dumps({"name": "north", "url": "https://example.org/else.csv"}))
    assert flame.json("dataset", "update", "north", str(file))["dataset"]["url"] == "https://example.org/else.csv"
    assert flame.json("dataset", "get", made["id"])["id"] == made["id"]
    assert "https://example.org/else.csv" in flame("dataset", "list")
    flame("dataset", "delete", "north")
    assert flame.json("dataset", "list") == []


def test_computes(flame: Any, server: Any) -> None:
    assert flame.json("compute", "list")[0]["name"] == "local"
    assert flame.json("compute", "update", "local", "--slots", "4")["capacity"]["slots"] == 4
    made = flame.json("compute", "create", "west", "--kind", "local", "--region", "us/west", "--config", "slots=2")
    assert (made["region"], made["config"], made["state"]) == ("default/us/west", {"slots": 2}, "ready")
    environment = flame.json("compute", "update", "west", "--config", "environment.A=b", "--memory", "1Gi")
    assert environment["config"] == {"slots": 2, "environment": {"A": "b"}}
    assert environment["capacity"]["memory"] == 1 << 30
    assert flame.json("compute", "drain", "west")["state"] == "drained"
    assert flame.json("compute", "drain", "west", "--undo")["state"] == "ready"
    table = flame("compute", "list").splitlines()
    assert table[0].split() == ["NAME", "KIND", "REGION", "STATE", "WORKERS", "CPU", "MEMORY", "GPU"]
    assert [line.split()[0] for line in table[1:]] == ["local", "west"]
    assert "0/1Gi" in table[2]
    assert "default/us/west" in flame("compute", "get", "west")
    file = flame.folder / "computes.yaml"
    file.write_text("- {name: a, kind: local}\n- {name: b, kind: local, region: eu}\n")
    assert [one["name"] for one in flame.json("compute", "create", str(file))] == ["a", "b"]
    assert "give its --kind" in flame.refused("compute", "create", "c", status=2)
    assert "Nothing is to be changed" in flame.refused("compute", "update", "a", status=2)
    assert "no kind of compute 'cloud'" in flame.refused("compute", "create", "c", "--kind", "cloud")
    flame("compute", "delete", "a", "b", "west")
    assert [one["name"] for one in flame.json("compute", "list")] == ["local"]


def test_the_configuration_is_written_read_and_never_shows_a_token(flame: Any) -> None:
    flame("config", "set", "server", "http://127.0.0.1:1")
    flame("config", "set", "token", "very-secret")
    assert flame.json("config", "show")["server"] == "http://127.0.0.1:1"
    assert "very-secret" not in flame("config", "show")
    assert "127.0.0.1:1 (connection refused)" in flame.refused("job", "list")
    assert "no setting 'sever'" in flame.refused("config", "set", "sever", "x")
    flame("config", "set", "server", "")
    assert flame.json("config", "show")["server"] is None


def test_yaml_is_printed_where_it_is_asked_for(flame: Any) -> None:
    import yaml

    assert yaml.safe_load(flame("version", "-o", "yaml")) == flame.json("version")


@pytest.mark.parametrize(
    "arguments", [["job", "nothing"], ["run"], ["job", "list", "--state", "odd"], ["-x"], ["nothing"]]
)
def test_wrong_usage_has_status_2_and_says_how(flame: Any, arguments: list[str]) -> None:
    assert "Usage: flame" in flame.refused(*arguments, status=2)


def test_a_fault_of_flame_itself_is_one_sentence_and_a_file(flame: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import flame.client.config as c\n\ndef broken(*_): raise ZeroDivisionError('a fault')\n\nc.resolve = broken\n"
    )
    flame.environment |= {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    said = flame.refused("config", "show", status=70)
    assert said.count("\n") == 1
    assert "ZeroDivisionError: a fault" in said
    path = re.search(r"in (\S+\.txt)", said)
    assert path
    assert "Traceback" in Path(path.group(1)).read_text()


def test_a_reader_who_leaves_early_ends_it_without_a_word(flame: Any) -> None:
    process = flame.begin("job", "expand", flame.job("digits"), "-o", "json")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(20) == 1


def test_ctrl_c_ends_a_command_without_a_traceback(flame: Any, server: Any) -> None:
    flame("job", "create", flame.job("slow", trainer=WAITS, aggregator=WAITS), "--start")
    process = flame.begin("job", "logs", "-f", "slow")
    assert process.stdout.readline().endswith("up\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    flame("job", "stop", "slow", "--wait")


def test_serve_says_in_a_sentence_why_it_cannot(flame: Any, server: Any) -> None:
    assert "Another server uses" in flame.refused("serve", "--port", "0", "--data-dir", str(flame.data_dir))
    port = server.url.rpartition(":")[2]
    other = str(flame.folder / "other")
    assert "cannot listen on" in flame.refused("serve", "--port", port, "--data-dir", other, status=2)


def test_the_entry_point_is_installed() -> None:
    import sys

    command = Path(sys.executable).with_name("flame")
    assert subprocess.run([command, "version"], capture_output=True, text=True, check=True).stdout.startswith("flame ")
