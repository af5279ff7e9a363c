"""The examples of elastic sessions, as a user runs them: a script, a private server or one that runs, real executors."""

import asyncio
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flame.client import Client
from flame.serve import ServeSettings, serve
from flame.spec.sessions import Application, SessionForm

ROOT = Path(__file__).parents[2] / "examples" / "sessions"


def command(tmp_path, example, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
    kept |= {"FLAME_DATA_DIR": str(tmp_path / "data"), "FLAME_CONFIG": str(tmp_path / "config.yaml")}
    return {
        "args": [sys.executable, "-W", "error", str(ROOT / example / f"{example}.py"), *arguments],
        "cwd": tmp_path,
        "env": kept | environment,
        "capture_output": True,
        "text": True,
        "timeout": 110,
        "check": False,
    }


def run(tmp_path, example, *arguments):
    """What an example prints, with a private server in a folder of its own."""
    done = subprocess.run(**command(tmp_path, example, *arguments))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def module(example):
    spec = importlib.util.spec_from_file_location(f"example_{example}", ROOT / example / f"{example}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_pi_is_what_its_tasks_find_when_they_are_called_here(tmp_path):
    out = run(tmp_path, "pi", "--tasks", "40")
    pi = module("pi")
    here = 4 * sum(map(pi.inside, range(40))) / (40 * pi.POINTS)
    assert f"pi is about {here:.5f}" in out
    assert here == pytest.approx(np.pi, abs=0.01)


async def test_an_example_uses_the_server_that_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    async with serve(ServeSettings(port=0, slots=2), tmp_path / "data") as server:
        try:
            again = command(tmp_path / "data", "pi", "--tasks", "25", FLAME_SERVER=server.url)
            done = await asyncio.to_thread(subprocess.run, **again)
            assert done.returncode == 0, done.stderr
            async with Client(server.url) as client:
                (record,) = await client.sessions.list()
        finally:
            await server.api.sessions.stop_all()
    assert (record.state, record.application.entry) == ("closed", "pi:inside")
    assert (record.counts.total, record.counts.succeed) == (25, 25)


def test_the_actor_remembers_and_refuses_in_order(tmp_path):
    assert run(tmp_path, "actor").splitlines() == [
        "balances: [150, 120, 125]",
        "refused: Ada has only 125",
        "statement: {'owner': 'Ada', 'balance': 125, 'entries': [50, -30, 5]}",
    ]


def test_the_service_loads_once_for_each_executor_and_answers_every_question(tmp_path):
    out = run(tmp_path, "service", "--questions", "150")
    assert out.startswith("150 of 150 questions were answered with the right word\n")
    executors = re.findall(r"executor (\d+): loaded 1 time in \d+ ms, answered (\d+), in [\d.]+ ms each", out)
    assert len(executors) == len({pid for pid, _ in executors}) == len(out.splitlines()) - 1
    assert sum(int(answered) for _, answered in executors) == 150


def test_the_sweeps_table_is_what_its_trainings_reach_when_they_run_here(tmp_path):
    out = run(tmp_path, "sweep", "--runs", "20", "--rounds", "2")
    rows = re.findall(r"^(\w+) +([\d.]+) +(\d+) +(\d+)   ([\d.]+) ± ([\d.]+)$", out, re.MULTILINE)
    assert len(rows) == 8
    assert sum(int(row[3]) for row in rows) == 20
    means = [float(row[4]) for row in rows]
    assert means == sorted(means, reverse=True)

    from sklearn.datasets import load_digits

    sweep = module("sweep")
    images, labels = load_digits(return_X_y=True)
    training = sweep.Training()
    data = {"images": (images / 16).astype(np.float32), "labels": labels}
    training.on_session_enter(SimpleNamespace(common_data=data))
    optimizer, rate, epochs, runs, mean, sd = rows[-1]
    setting = {"optimizer": optimizer, "rate": float(rate), "epochs": int(epochs)}
    reached = [
        training.on_task_invoke(None, SimpleNamespace(input={"setting": setting, "seed": seed, "rounds": 2}))
        for seed in range(int(runs))
    ]
    assert float(mean) == pytest.approx(np.mean(reached), abs=0.005)  # a sum's order may differ, and with it a picture
    assert float(sd) == pytest.approx(np.std(reached, ddof=1), abs=0.005)


def test_the_page_names_every_option_of_a_session():
    page = (ROOT.parents[1] / "docs" / "sessions.md").read_text()
    options = set(SessionForm.__struct_fields__) | set(Application.__struct_fields__)
    said = options - {"app", "application", "common", "common_digest", "entry", "name"}
    assert [option for option in sorted(said) if f"`{option}`" not in page] == []
