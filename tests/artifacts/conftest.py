"""A real server of the S3 protocol for the tests, which can be killed and started again."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

S3_UP = Path(__file__).parents[3] / "shared" / "engines" / "s3-up"
HOME = Path(os.environ.get("ENGINES_HOME") or Path.home() / ".cache" / "flame-engines")
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")


class S3:
    """A server on a port of its own, with one bucket. Its objects are files of a folder, so a test sees what is really there."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
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
            [S3_UP, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60, check=True
        )

    def kill(self) -> None:
        pid_file = HOME / "run" / f"s3-{self.port}.pid"
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid_file.read_text()))
            process.kill()
            process.wait()
        pid_file.unlink()

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
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        (HOME / "log" / f"s3-{self.port}.log").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    if not S3_UP.exists():
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
