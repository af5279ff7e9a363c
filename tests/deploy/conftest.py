"""A server that containers and pods reach, with real engines as its computes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import engines

from flame.client import Client
from flame.spec.nouns import Compute

TOKEN = uuid.uuid4().hex


@functools.cache
def host_address() -> str:
    """This host as containers and pods see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; only the route is looked up
        return str(probe.getsockname()[0])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def data_url() -> Iterator[str]:
    """Where the digits of each site are to be had over HTTP."""
    folder = engines.ROOT / "examples" / "digits" / "data"
    with http.server.ThreadingHTTPServer((host_address(), 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://{host_address()}:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace of our own in the cluster."""
    engines.kubeconfig()
    name = f"flame-test-{uuid.uuid4().hex[:8]}"
    engines.kubectl("create", "namespace", name)
    yield name
    engines.kubectl("delete", "namespace", name, "--wait=false")
    engines.kubectl("delete", "pods", "--all", "-n", name, "--grace-period=0", "--force", check=False)


@pytest.fixture
async def three(namespace: str) -> tuple[Compute, Compute]:
    """The computes beside the local one: a Docker engine, and a Kubernetes cluster."""
    image = await asyncio.to_thread(engines.docker_image)
    known = await asyncio.to_thread(engines.kubernetes_image)
    config = {"image": known, "namespace": namespace, "imagePullPolicy": "Never"}
    return (
        Compute(name="docker", kind="docker", region="site/docker", config={"image": image, "pullPolicy": "never"}),
        Compute(name="kubernetes", kind="kubernetes", region="site/kubernetes", config=config),
    )


@pytest.fixture
def database(mongo_server: str) -> Iterator[str]:
    """The URL of a MongoDB database that is empty, and removed after the test."""
    from pymongo import MongoClient

    name = f"flame-test-{uuid.uuid4().hex[:12]}"
    yield urlsplit(mongo_server)._replace(path=f"/{name}").geturl()
    with MongoClient(mongo_server) as client:
        client.drop_database(name)


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@pytest.fixture
def serving(tmp_path: Path) -> Serve:
    """Start ``flame serve`` so that other machines reach it, as its own process; gives a client of it."""

    @contextlib.asynccontextmanager
    async def serve(*options: str) -> AsyncIterator[Client]:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        url = f"http://{host_address()}:{port}"
        data_dir = tmp_path / f"data-{port}"
        data_dir.mkdir()
        command = [sys.executable, "-m", "flame", "serve", "--host", "0.0.0.0", "--port", str(port)]
        command += ["--advertise", url, "--insecure-plain-http", "--data-dir", str(data_dir), *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        log = tmp_path / f"server-{port}.log"
        with log.open("wb") as file:
            process = await asyncio.to_thread(
                subprocess.Popen, command, env={**environment, "FLAME_TOKEN": TOKEN}, stderr=file
            )
        try:
            async with asyncio.timeout(60):
                while not (data_dir / "server.json").exists():
                    assert process.poll() is None, log.read_text()
                    await asyncio.sleep(0.05)
            async with Client(url, TOKEN) as client:
                yield client
                for job in await client.jobs.list():
                    if not job.state.ended and job.state.value != "ready":
                        await client.jobs.stop(job.id)
                        await client.jobs.wait(job.id)
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)

    return serve


class Joined:
    """``flame join`` as a process."""

    def __init__(self, server: str, token: str, dataset: str, folder: Path, digest: str) -> None:
        self.log = folder / "join.log"
        command = [sys.executable, "-m", "flame", "join", "--server", server, "--dataset", dataset]
        command += ["--work-dir", str(folder / "join"), "--accept-digest", digest]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env={**environment, "FLAME_INVITE": token}, stdout=file, stderr=file, start_new_session=True
            )

    async def ended(self) -> int:
        """Wait for its end; gives the status."""
        return await asyncio.to_thread(self.process.wait, 60)


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[..., Joined]]:
    """Take part in a job, with a machine and data of one's own."""
    started: list[Joined] = []

    def begin(server: str, token: str, dataset: str, digest: str) -> Joined:
        started.append(Joined(server, token, dataset, tmp_path, digest))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGINT)
        one.process.wait()
