"""From ``flame job start`` to the end of the first round, over what importing the user's libraries takes: local, Docker, Kubernetes.

A job of two trainers and an aggregator that train nothing runs several times on each compute that there is. What its
workers would need anyway is measured beside it: as many Python processes as the job has workers, started at once, that import the
same libraries and end. On Kubernetes the time counts from the moment at which the last pod was scheduled.

Docker and Kubernetes are measured where ``FLAME_BENCH_IMAGE`` names an image that has Flame (and PyTorch, with ``--torch``), and their
engine answers. ``FLAME_BENCH_SERVER_HOST`` is the address of this host as containers and pods see it (default: the route's source address).
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec

from benchmarks.jobs import no_op_job
from benchmarks.report import Figure, report
from flame.client import Client
from flame.errors import FlameError
from flame.spec.load import load_job
from flame.spec.nouns import Compute, Placement
from flame.spec.records import JobState

RUNS = int(os.environ.get("FLAME_BENCH_RUNS", "7"))
WORKERS = 3
LIMITS = {"local": "<= 1", "docker": "<= 3", "kubernetes": "<= 5"}


@contextmanager
def server(data_dir: pathlib.Path, host: str) -> Iterator[tuple[str, int]]:
    """``flame serve`` that containers can reach, too."""
    command = [sys.executable, "-m", "flame", "serve", "--port", "0", "--data-dir", str(data_dir)]
    if host != "127.0.0.1":
        command += ["--host", "0.0.0.0", "--allow-anyone"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
    with (data_dir.parent / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        said = data_dir / "server.json"
        while not said.exists():
            if process.poll() is not None:
                raise SystemExit((data_dir.parent / "server.log").read_text())
            time.sleep(0.05)
        there = json.loads(said.read_text())
        yield there["url"], there["pid"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def processor_time(pid: int) -> float:
    """Seconds of processor time of a process and those of its children that have ended."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def imports(libraries: str, image: str | None = None) -> float:
    """Seconds until as many processes as the job has workers have imported its libraries, here or each in a container."""
    command = [sys.executable, "-c", f"import {libraries}"]
    if image is not None:
        command = ["docker", "run", "--rm", "--entrypoint", "python", image, *command[1:]]
    began = time.perf_counter()
    for process in [subprocess.Popen(command) for _ in range(WORKERS)]:
        process.wait()
    return time.perf_counter() - began


async def first_round(client: Client, form: Any, kubernetes: Any) -> float:
    """Seconds from the start of a job to the end of its first round."""
    job = await client.jobs.create(form)
    began, wall = time.perf_counter(), time.time()
    await client.jobs.start(job.id)
    seconds = None
    async for event in client.jobs.events(job.id, follow=True):
        if event.type == "round" and seconds is None:
            seconds = time.perf_counter() - began
            if kubernetes is not None:
                seconds -= await kubernetes(job.id) - wall
    ended = await client.jobs.wait(job.id)
    if ended.state is not JobState.COMPLETED or seconds is None:
        raise SystemExit(f"the job is {ended.state.value}: {ended.failure}")
    await client.jobs.delete(job.id)
    return seconds


async def scheduled(job: str) -> float:
    """When the last pod of a job was scheduled, in whole seconds of the cluster's clock."""
    process = await asyncio.create_subprocess_exec(
        "kubectl", "get", "pods", "-A", "-l", f"flame-job={job}", "-o", "json", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    times = [
        datetime.fromisoformat(condition["lastTransitionTime"].replace("Z", "+00:00")).timestamp()
        for pod in json.loads(output)["items"]
        for condition in pod["status"].get("conditions", ())
        if condition["type"] == "PodScheduled"
    ]
    return max(times)


def computes(names: list[str]) -> list[Compute]:
    """The computes to measure on, beside the local one."""
    image = os.environ.get("FLAME_BENCH_IMAGE")
    if image is None:
        return []
    configs: dict[str, dict[str, Any]] = {
        "docker": {"image": image, "pullPolicy": "never"},
        "kubernetes": {"image": image, "imagePullPolicy": "Never"},
    }
    return [Compute(name=kind, kind=kind, config=config) for kind, config in configs.items() if kind in names]


def own_address() -> str:
    """This host as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


async def measure(
    url: str, pid: int, scratch: pathlib.Path, *, libraries: str, others: list[Compute], host: str
) -> list[Figure]:
    """All figures for one set of libraries."""
    figures = []
    job = no_op_job(scratch / f"job-{libraries}", trainers=WORKERS - 1, rounds=1)
    for main in job.glob("code/*/main.py"):
        main.write_text(f"import {libraries}\n{main.read_text()}")
    loaded = load_job(str(job), [])
    assert loaded.archive is not None
    assert loaded.form.schema is not None
    async with Client(url) as client:
        await client.code.upload(loaded.archive)
        for name in ["local", *(one.name for one in others)]:
            if name != "local":
                there = next(one for one in others if one.name == name)
                port = url.rsplit(":", 1)[1]
                there = Compute(name=name, kind=name, config=there.config, server=f"http://{host}:{port}")
                try:
                    made = await client.computes.create(there)
                except FlameError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
                if made.problem:
                    print(f"{name}: {made.problem}", file=sys.stderr)
                    continue
            placement = {role.name: Placement(realm=name) for role in loaded.form.schema.roles}
            form = msgspec.structs.replace(loaded.form, placement=placement)
            since = scheduled if name == "kubernetes" else None
            await first_round(client, form, since)  # the first time files are read from the disk
            alone, whole, spent, bare = [], [], [], []
            for _ in range(RUNS):  # one after the other, as other programs make both slower at times
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                alone.append(await asyncio.to_thread(imports, libraries))
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                server = processor_time(pid)
                whole.append(await first_round(client, form, since))
                if name == "docker":
                    bare.append(await asyncio.to_thread(imports, libraries, str(there.config["image"])))
                own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                spent.append(processor_time(pid) - server - own)
            over = statistics.median(both - one for both, one in zip(whole, alone, strict=True))
            figures.append(Figure(f"{WORKERS} processes import {libraries}", statistics.median(alone), "s"))
            figures.append(Figure(f"start to first round, {name}, {libraries}", statistics.median(whole), "s"))
            figures.append(Figure(f"over the imports, {name}, {libraries}", over, "s", LIMITS[name]))
            if bare:
                engine = statistics.median(bare)
                figures.append(Figure(f"{WORKERS} containers import {libraries}, by docker run", engine, "s"))
            if name == "local":  # the workers are the server's children; less disturbed by what else runs than a clock
                cores = statistics.median(spent)
                figures.append(Figure(f"processor time over the imports, whole job, {libraries}", cores, "s"))
            else:
                await client.computes.delete(name)
    return figures


def main() -> None:
    """Measure with numpy alone, and with PyTorch where it is asked for."""
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or ["local", "docker", "kubernetes"]
    others = computes(names)
    host = os.environ.get("FLAME_BENCH_SERVER_HOST") or (own_address() if others else "127.0.0.1")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        (scratch / "data").mkdir()
        with server(scratch / "data", host) as (url, pid):
            for libraries in ["numpy", "torch"] if "--torch" in sys.argv else ["numpy"]:
                figures += asyncio.run(measure(url, pid, scratch, libraries=libraries, others=others, host=host))
    report(figures)


if __name__ == "__main__":
    main()
