"""A real Mosquitto on a free port, with a configuration of its own, and workers that talk through it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flame.sdk.backends.base import BackendContext, Frames, Member
from flame.sdk.backends.mqtt import MqttBackend

KEY = b"j" * 32


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """One broker; may be killed and started again on the same port."""

    def __init__(self, folder: Path, settings: str = "", listener: str = "", persistence: bool = False) -> None:
        self.program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
        if self.program is None:
            pytest.skip("no mosquitto program on this machine")
        self.port = free_port()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # As root it would become the user mosquitto, who may not write here.
        lines = [f"listener {self.port} 127.0.0.1", listener, "user root", settings]
        if "allow_anonymous" not in settings:
            lines.append("allow_anonymous true")
        if persistence:
            lines += [
                "persistence true",
                f"persistence_location {folder}/",
                "autosave_interval 1",
                "autosave_on_changes true",
            ]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        log = (self.folder / "mosquitto.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [str(self.program), "-c", str(self.config)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        for _ in range(1000):
            if self.process.poll() is not None:
                raise RuntimeError((self.folder / "mosquitto.log").read_text())
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            threading.Event().wait(0.01)
        raise RuntimeError("mosquitto does not listen")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Ears:
    """A sink that remembers, and that a test can wait on."""

    def __init__(self, window: int = 16 << 20, hold: bool = False) -> None:
        self.window = window
        self.hold = hold
        self.members: dict[str, Member] = {}
        self.left: list[tuple[str, str]] = []
        self.joins: list[Member] = []
        self.frames: deque[tuple[str, Any, Callable[[], None] | None]] = deque()
        self.order: list[tuple[str, bytes]] = []
        self.on_message: Callable[[str, Any], None] | None = None
        self.changed = threading.Condition()

    def wants(self, member: Member) -> bool:
        return True

    def on_join(self, member: Member) -> None:
        with self.changed:
            self.joins.append(member)
            self.members[member.end] = member
            self.changed.notify_all()

    def on_leave(self, end: str, reason: str) -> None:
        with self.changed:
            self.members.pop(end, None)
            self.left.append((end, reason))
            self.changed.notify_all()

    def on_frames(self, end: str, data: Any, release: Callable[[], None] | None = None) -> None:
        if self.on_message is not None:
            self.on_message(end, data)
        with self.changed:
            self.frames.append((end, data, release))
            self.order.append((end, bytes(data[:64])))
            self.changed.notify_all()
        if release is not None and not self.hold:
            release()

    def wait(self, condition: Callable[[Ears], bool], seconds: float = 60) -> None:
        with self.changed:
            ok = self.changed.wait_for(lambda: condition(self), seconds)
            assert ok, (self.members, self.left, [(end, len(data)) for end, data, _ in self.frames])

    def sees(self, *ends: str, seconds: float = 60) -> None:
        self.wait(lambda ears: set(ears.members) == set(ends), seconds)

    def take(self, seconds: float = 60) -> tuple[str, Any]:
        self.wait(lambda ears: bool(ears.frames), seconds)
        end, data, _ = self.frames.popleft()
        return end, data


class Workers:
    """Backends of several ends in this process; closes them all."""

    def __init__(self, broker: str, **options: Any) -> None:
        self.broker = broker
        self.options = options
        self.open: list[MqttBackend] = []

    def make(self, end: str, *, attempt: int = 1, key: bytes = KEY, job: str = "job", **options: Any) -> MqttBackend:
        member = Member(end=end, role="trainer", attempt=attempt)
        settings = {**self.options, **options}
        backend = MqttBackend(BackendContext(job=job, key=key, me=member, broker=self.broker, options=settings))
        self.open.append(backend)
        return backend

    def join(self, end: str, ears: Ears | None = None, **settings: Any) -> tuple[MqttBackend, Ears]:
        ears = ears or Ears()
        backend = self.make(end, **settings)
        backend.join("param", "default", ears)
        return backend, ears

    def close(self) -> None:
        for backend in self.open:
            backend.close()


def frames(data: bytes | bytearray | memoryview, *more: memoryview) -> Frames:
    buffers = [memoryview(data).cast("B"), *more]
    head = b"head" * 4
    return Frames(head=head, buffers=buffers, nbytes=len(head) + sum(len(each) for each in buffers))


def send(backend: MqttBackend, ends: Sequence[str], data: Any, timeout: float | None = 90) -> dict[str, str]:
    return backend.send("param", "default", ends, frames(data), timeout)
