"""A MongoDB server for the tests: the one of FLAME_TEST_MONGODB, else a private FerretDB where the engines are at hand."""

import asyncio
import contextlib
import os
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from pymongo import AsyncMongoClient

MONGO_UP = Path(__file__).parents[3] / "shared" / "engines" / "mongo-up"
PORT = "27118"  # not the one that other tests and demos use: these tests also kill it


def mongo_up() -> str:
    done = subprocess.run([MONGO_UP, PORT], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def mongo_server() -> str:
    """The address of a server of MongoDB's protocol."""
    if address := os.environ.get("FLAME_TEST_MONGODB"):
        return address
    if MONGO_UP.exists():
        return mongo_up()
    pytest.skip("no MongoDB: FLAME_TEST_MONGODB is not set, and there is no mongo-up")


@pytest.fixture
async def mongo_url(mongo_server: str) -> AsyncIterator[str]:
    """The URL of a database that is empty, and removed after the test."""
    name = f"flame-test-{uuid.uuid4().hex[:12]}"
    yield urlsplit(mongo_server)._replace(path=f"/{name}").geturl()
    async with AsyncMongoClient(mongo_server) as client:
        await client.drop_database(name)


class PrivateMongo:
    """A FerretDB of our own, which can be killed and started again."""

    url: str = ""

    async def start(self) -> None:
        self.url = await asyncio.to_thread(mongo_up)

    async def kill(self) -> None:
        home = Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "flame-engines")
        pid_file = home / "run" / f"mongo-{PORT}.pid"
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid_file.read_text()))
            process.kill()
            await asyncio.to_thread(process.wait)
        pid_file.unlink()


@pytest.fixture
async def private_mongo() -> AsyncIterator[PrivateMongo]:
    if not MONGO_UP.exists():
        pytest.skip("no mongo-up, so no MongoDB that may be killed")
    private = PrivateMongo()
    await private.start()
    yield private
    await private.start()
