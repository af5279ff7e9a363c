"""Two hundred local workers in one job: that all of them run, what each one costs, and how long they take to start.

A worker is two processes: the flamelet and the role's code. What it costs is held against the least that it could: a bare Python
that has imported numpy, two hundred of which are started in the same run and in the same way. Memory is the proportional share
(PSS), so that what processes have in common counts once; processor time is what all of a worker's processes have used until the job
had its first round. ``python -m benchmarks.fleet [WORKERS]``.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from typing import NamedTuple

import psutil

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.client import Client, load_job
from flame.spec.records import Job, JobState, TaskState

WORKERS = 200
#: The aggregator holds the first round until the file is there.
HOLD = """    def evaluate(self):
        import pathlib, time
        while not pathlib.Path(self.config.hyperparameters.gate).exists():
            time.sleep(0.05)
"""


class Cost(NamedTuple):
    """What a set of processes costs: megabytes that are theirs, and seconds of a processor."""

    processes: int
    memory: float
    processor: float


def cost(processes: list[psutil.Process]) -> Cost:
    """Measure processes that live."""
    memory = sum(each.memory_full_info().pss for each in processes) / 1e6
    times = [each.cpu_times() for each in processes]
    return Cost(len(processes), memory, sum(one.user + one.system for one in times))


def bare(count: int) -> Cost:
    """As many Pythons that have imported numpy and do nothing."""
    code = "import sys, numpy; print(flush=True); sys.stdin.read()"
    started = [
        subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        return cost([psutil.Process(process.pid) for process in started])
    finally:
        for process in started:
            process.communicate()


def workers(data_dir: pathlib.Path) -> list[psutil.Process]:
    """The processes of all workers of the server with this data directory, known by where they work."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(data_dir / "workers")):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def run(
    server: str, folder: pathlib.Path, data_dir: pathlib.Path, count: int
) -> tuple[Job, int, Cost, Cost, float, float]:
    """Run the job; gives its end, how many ran at once, the cost of flamelets and of code, and two times."""
    gate = folder / "gate"
    async with Client(server) as client:
        job = await client.jobs.submit(load_job(folder / "job", [f"hyperparameters.gate={gate}"]))
        began = time.perf_counter()
        await client.jobs.start(job.id)
        running = 0.0
        async with aclosing(client.jobs.events(job.id, follow=True)) as events:
            async for event in events:
                if event.type == "job" and event.data["state"] == JobState.RUNNING.value:
                    running = time.perf_counter() - began
                    break
                if event.type == "job" and JobState(event.data["state"]).ended:
                    return await client.jobs.get(job.id), 0, Cost(0, 0, 0), Cost(0, 0, 0), 0.0, 0.0
        # The aggregator has every update once it evaluates: its log says so.
        tasks = await client.jobs.tasks(job.id)
        at_once = sum(task.state is TaskState.RUNNING for task in tasks)
        (top,) = [task for task in tasks if task.role == "aggregator"]
        async with aclosing(client.tasks.log(top.id, follow=True)) as pieces:
            text = b""
            async for piece in pieces:
                text += piece
                if b"has every update" in text:
                    break
        first = time.perf_counter() - began
        everyone = workers(data_dir)
        agents = [process for process in everyone if "flame.flamelet" in process.cmdline()]
        code = [process for process in everyone if "flame.sdk.launch" in process.cmdline()]
        costs = cost(agents), cost(code)
        gate.touch()
        return await client.jobs.wait(job.id), at_once, *costs, running, first


def main() -> None:
    """Start a server, run the fleet, end the server."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else WORKERS
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        least = bare(count)
        job = no_op_job(folder / "job", trainers=count - 1, rounds=2)
        script = job / "code" / "aggregator" / "main.py"
        hold = HOLD.replace("        while", "        print('has every update', flush=True)\n        while")
        script.write_text(script.read_text().replace("    def evaluate(self):\n", hold))
        environment = os.environ | {"FLAME_CONFIG": str(folder / "config.yaml")}
        data = folder / "data"
        words = ["serve", "--port", "0", "--data-dir", str(data), "--slots", str(count)]
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen([sys.executable, "-m", "flame", *words], env=environment, stderr=log) as server,
        ):
            while not (data / "server.json").exists():
                time.sleep(0.05)
            try:
                url = json.loads((data / "server.json").read_text())["url"]
                ended, at_once, agents, code, running, first = asyncio.run(run(url, folder, data, count))
                peak = psutil.Process(server.pid).memory_full_info().pss / 1e6
            finally:
                server.terminate()
        if ended.state is not JobState.COMPLETED:
            raise SystemExit(
                f"the job ended {ended.state.value}: {ended.failure}; {(folder / 'log').read_text()[-2000:]}"
            )
    per = 1000 / count
    report(
        [
            Figure("workers that ran at once", at_once, "workers", f"= {count}"),
            Figure("start of the job to all running", running, "s"),
            Figure("start of the job to the end of the first round", first, "s"),
            Figure("memory of all workers (PSS)", agents.memory + code.memory, "MB"),
            Figure("memory of a worker", (agents.memory + code.memory) / count, "MB"),
            Figure("memory of its flamelet", agents.memory / count, "MB"),
            Figure("memory of the role's code", code.memory / count, "MB"),
            Figure("memory of a bare Python with numpy", least.memory / count, "MB"),
            Figure("memory of a worker beyond it", (agents.memory + code.memory - least.memory) / count, "MB"),
            Figure("processor time of a worker's start", (agents.processor + code.processor) * per, "ms"),
            Figure("processor time of its flamelet", agents.processor * per, "ms"),
            Figure("processor time of the role's code", code.processor * per, "ms"),
            Figure("processor time of a bare Python with numpy", least.processor * per, "ms"),
            Figure("processor time beyond it", (agents.processor + code.processor - least.processor) * per, "ms"),
            Figure("memory of the server", peak, "MB"),
        ]
    )


if __name__ == "__main__":
    main()
