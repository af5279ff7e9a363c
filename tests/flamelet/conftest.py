"""A stand-in for the server, with the routes that a flamelet uses, over real sockets; and flamelets as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import textwrap
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from flame.spec.bundle import digest
from flame.spec.nouns import BaseModel, JobRef, Registry, Sorted, TaskConfig
from flame.spec.records import Event, Manifest

# A flamelet whose child has the bare link, without the SDK's reader on it.
BARE = """
import sys
from flame.flamelet import __main__, agent
agent.LAUNCHER = ("-u",)
sys.exit(__main__.main())
"""
TASK = "t" * 40
KEY = "the-task-key"


def config(role: str = "trainer") -> TaskConfig:
    return TaskConfig(
        taskid=TASK,
        role=role,
        job=JobRef(id="j" * 24, name="test"),
        realm="default",
        backend="p2p",
        brokers=[],
        channels=[],
        group_association={},
        dataset="",
        hyperparameters={"rounds": 1},
        base_model=BaseModel(),
        optimizer=Sorted(sort="fedavg"),
        selector=Sorted(sort="default"),
        registry=Registry(),
        dependencies=[],
        max_run_time=None,
    )


class FakeServer:
    """What the server would keep of one attempt, and switches for what may go wrong with it."""

    def __init__(self, main: str) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("trainer/main.py", textwrap.dedent(main))
            archive.writestr("aggregator/main.py", "raise SystemExit('not mine')")
        self.code = buffer.getvalue()
        self.promised = digest(self.code)
        self.events: list[Event] = []
        self.reports: list[dict[str, Any]] = []
        self.acked = 0
        self.log = b""
        self.log_at_end: bytes | None = None
        self.artifacts: dict[str, bytes] = {}
        self.checkpoints: dict[int, int] = {}  # how many rounds had been reported when each one came
        self.slow_reports = False  # let checkpoints pass if they do
        self.leases = 0
        self.lease_seconds = 60.0
        self.dead_connections = 0  # how many connections by which a lease is renewed go silent under that
        self.refusal: tuple[int, str] | None = None
        self.refuse_artifacts = False
        self.newer: dict[str, Any] = {}  # what only a later version of Flame knows of a task
        self.swallow = 0  # answers that get lost after the request has had its effect
        self.connections = 0
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def up(self) -> None:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 30)
        task = f"/v1/tasks/{TASK}"
        app.add_routes(
            [
                web.get(f"{task}/events", self._get_events),
                web.get(f"{task}/manifest", self._get_manifest),
                web.get(f"{task}/code", self._get_code),
                web.post(f"{task}/reports", self._post_reports),
                web.post(f"{task}/log", self._post_log),
                web.put(f"{task}/artifacts/{{name:.+}}", self._put_artifact),
                web.post(f"{task}/checkpoints/{{round}}", self._post_checkpoint),
                web.post(f"{task}/lease", self._post_lease),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def down(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def send(self, type: str, **data: Any) -> None:
        async with self._changed:
            self.events.append(Event(seq=len(self.events) + 1, time=0.0, type=type, data=data))
            self._changed.notify_all()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(condition)

    def states(self) -> list[str]:
        return [report["data"]["state"] for report in self.reports if report["type"] == "state"]

    async def until_state(self, state: str) -> dict[str, Any]:
        await self.until(lambda: state in self.states())
        return next(r["data"] for r in self.reports if r["type"] == "state" and r["data"]["state"] == state)

    async def until_said(self, type: str) -> dict[str, Any]:
        await self.until(lambda: any(report["type"] == type for report in self.reports))
        return next(report["data"] for report in self.reports if report["type"] == type)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        if self.refusal is not None:
            status, kind = self.refusal
            return web.json_response({"error": {"type": kind, "message": "Attempt 1 is over."}}, status=status)
        response: web.StreamResponse = await handler(request)
        if request.method == "POST" and self.swallow:
            self.swallow -= 1
            assert request.transport is not None
            request.transport.close()
        return response

    async def _get_events(self, request: web.Request) -> web.StreamResponse:
        after = int(request.query["after"])
        self.connections += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"\n")
        sent = self.events[:after]
        while True:
            for event in self.events[len(sent) :]:
                await response.write(msgspec.json.encode(event) + b"\n")
                sent.append(event)
            async with self._changed:
                await self._changed.wait_for(lambda: len(self.events) > len(sent))

    async def _get_manifest(self, _: web.Request) -> web.Response:
        manifest = msgspec.to_builtins(Manifest(config=config(), code=self.promised, job_key="ab" * 32, attempt=1))
        manifest["config"] |= self.newer
        return web.Response(body=msgspec.json.encode(manifest), content_type="application/json")

    async def _get_code(self, _: web.Request) -> web.Response:
        return web.Response(body=self.code)

    async def _post_reports(self, request: web.Request) -> web.Response:
        if self.slow_reports:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3), self._changed:
                    await self._changed.wait_for(lambda: self.checkpoints)
        async with self._changed:
            for report in await request.json():
                if report["seq"] > self.acked:
                    assert report["seq"] == self.acked + 1
                    self.acked += 1
                    self.reports.append(report)
                    if report["type"] == "state" and report["data"]["state"] != "running":
                        self.log_at_end = self.log
            self._changed.notify_all()
        return web.json_response({"acked": self.acked})

    async def _post_log(self, request: web.Request) -> web.Response:
        data = await request.read()
        async with self._changed:
            if int(request.query["offset"]) == len(self.log):
                self.log += data
            self._changed.notify_all()
        return web.json_response({"size": len(self.log)})

    async def _put_artifact(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.refuse_artifacts:
            error = {"error": {"type": "Conflict", "message": f"{name} is too big."}}
            return web.json_response(error, status=409)
        self.artifacts[name] = await request.read()
        return web.json_response({"path": f"/kept/{name}"})

    async def _post_checkpoint(self, request: web.Request) -> web.Response:
        async with self._changed:
            rounds = sum(report["type"] == "round" for report in self.reports)
            self.checkpoints[int(request.match_info["round"])] = rounds
            self._changed.notify_all()
        return web.json_response({"kept": True})

    async def _post_lease(self, request: web.Request) -> web.Response:
        if self.dead_connections:
            self.dead_connections -= 1
            while request.transport is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        async with self._changed:
            self.leases += 1
            self._changed.notify_all()
        return web.json_response({"seconds": self.lease_seconds})


class Worker:
    """A flamelet's process."""

    def __init__(self, process: asyncio.subprocess.Process, work: Path) -> None:
        self.process = process
        self.work = work

    async def exit(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()


Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a server and a flamelet for a role with the given main.py."""
    servers: list[FakeServer] = []
    workers: list[Worker] = []

    async def begin(
        server: FakeServer | str, work: Path | None = None, *, sdk: bool = False, **variables: str
    ) -> tuple[FakeServer, Worker]:
        if isinstance(server, str):
            server = FakeServer(server)
            servers.append(server)
            await server.up()
            await server.send("start", attempt=1)
        work = work or tmp_path / "work"
        environment = {
            **os.environ,
            "FLAME_SERVER": server.url,
            "FLAME_TASK": TASK,
            "FLAME_TASK_KEY": KEY,
            "FLAME_ATTEMPT": "1",
            "FLAME_WORK_DIR": str(work),
            **variables,
        }
        program = ["-m", "flame.flamelet"] if sdk else ["-c", BARE]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *program, env=environment, start_new_session=True
        )
        worker = Worker(process, work)
        workers.append(worker)
        return server, worker

    yield begin
    for worker in workers:
        if worker.process.returncode is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            await worker.process.wait()
    for server in servers:
        await server.down()
