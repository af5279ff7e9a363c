"""Real engines for the tests that ask for them: servers of the S3 protocol and of MongoDB's, which can be killed and started again."""

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import hypothesis
import psutil
import pytest

#: Any test may import what lies beside this file.
sys.path.insert(0, str(Path(__file__).parent))

ENGINES = Path(__file__).parents[2] / "shared" / "engines"
HOME = Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "flame-engines")
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")


# How long an example takes is the machine's affair; what hangs is ended by the timeout of its test.
hypothesis.settings.register_profile("flame", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("flame")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def end(engine: str) -> None:
    """Kill an engine that was started by its script."""
    pid_file = HOME / "run" / f"{engine}.pid"
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        process = psutil.Process(int(pid_file.read_text()))
        process.kill()
        process.wait()
    pid_file.unlink(missing_ok=True)


def forget(engine: str) -> None:
    end(engine)
    shutil.rmtree(HOME / engine, ignore_errors=True)
    (HOME / "log" / f"{engine}.log").unlink(missing_ok=True)


class S3:
    """A server on a port of its own, with one bucket. Its objects are files of a folder, so a test sees what is really there."""

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = HOME / f"s3-{self.port}"
        self.bucket = f"flame-{uuid.uuid4().hex[:8]}"
        self.start()
        (self.folder / self.bucket).mkdir()

    @property
    def environment(self) -> dict[str, str]:
        values = ("flame", "flame-secret", f"http://127.0.0.1:{self.port}", "us-east-1")
        return dict(zip(NAMES, values, strict=True))

    def start(self) -> None:
        # Its output is inherited by the server, so a pipe would stay open for as long as that lives.
        subprocess.run(
            [ENGINES / "s3-up", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )

    def kill(self) -> None:
        end(f"s3-{self.port}")

    async def restart(self, pause: float = 0.0) -> None:
        await asyncio.to_thread(self.kill)
        await asyncio.sleep(pause)
        await asyncio.to_thread(self.start)

    def objects(self) -> dict[str, int]:
        """What is in the bucket, with sizes."""
        root = self.folder / self.bucket
        return {
            path.relative_to(root).as_posix(): path.stat().st_size
            for path in root.rglob("*")
            if path.is_file() and ".sgwtmp" not in path.parts
        }

    def close(self) -> None:
        forget(f"s3-{self.port}")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    if not (ENGINES / "s3-up").exists():
        pytest.skip("no S3: there is no s3-up")
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, with its credentials in the environment as a user has them."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


def mongo_up(port: int) -> str:
    done = subprocess.run([ENGINES / "mongo-up", str(port)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[str]:
    """The address of a server of MongoDB's protocol: the one of FLAME_TEST_MONGODB, else a FerretDB of this process."""
    if address := os.environ.get("FLAME_TEST_MONGODB"):
        yield address
    elif (ENGINES / "mongo-up").exists():
        port = free_port()
        yield mongo_up(port)
        forget(f"mongo-{port}")
    else:
        pytest.skip("no MongoDB: FLAME_TEST_MONGODB is not set, and there is no mongo-up")


@pytest.fixture
async def mongo_url(mongo_server: str) -> AsyncIterator[str]:
    """The URL of a database that is empty, and removed after the test."""
    name = f"flame-test-{uuid.uuid4().hex[:12]}"
    yield urlsplit(mongo_server)._replace(path=f"/{name}").geturl()
    from pymongo import AsyncMongoClient

    async with AsyncMongoClient(mongo_server) as client:
        await client.drop_database(name)


def let_sockets_go() -> None:
    """pymongo leaves the socket of an attempt to connect, which its own end has cancelled, to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def sockets_may_stay() -> Iterator[None]:
    """For tests in which MongoDB cannot be reached."""
    yield
    let_sockets_go()


class PrivateMongo:
    """A FerretDB of a test's own, which can be killed and started again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = ""

    async def start(self) -> None:
        self.url = await asyncio.to_thread(mongo_up, self.port)

    async def kill(self) -> None:
        await asyncio.to_thread(end, f"mongo-{self.port}")


@pytest.fixture
async def private_mongo() -> AsyncIterator[PrivateMongo]:
    if not (ENGINES / "mongo-up").exists():
        pytest.skip("no mongo-up, so no MongoDB that may be killed")
    private = PrivateMongo()
    await private.start()
    yield private
    await asyncio.to_thread(forget, f"mongo-{private.port}")
    let_sockets_go()
