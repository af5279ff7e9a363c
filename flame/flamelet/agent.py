"""The order of things in a worker: connect, wait for ``start``, run, report, leave.

Manifest and code are fetched while the event stream is being opened, so that nothing is left to do but run
when ``start`` comes. The end has its order too: first the whole log, then the final report, so that whoever learns that
a task has ended can read all of its log.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from flame.client.follow import insist, resumed
from flame.client.http import Session
from flame.errors import FlameError, Forbidden, NotFound, ServerUnreachable, Unauthorized
from flame.flamelet.child import Child
from flame.flamelet.fetch import CHECKPOINTS, fetch
from flame.flamelet.memory import Memory, read_memory
from flame.flamelet.outbox import Outbox
from flame.flamelet.output import Output
from flame.flamelet.settings import Settings
from flame.spec.quantities import show_bytes
from flame.spec.records import Manifest, Record

T = TypeVar("T")
Final = dict[str, Any]

#: How Python runs a role's script.
LAUNCHER = ("-m", "flame.sdk.launch")
#: What is the flamelet's alone, and not for the code that it runs.
_OWN_SECRETS = frozenset({"FLAME_TASK_KEY", "FLAME_TLS_KEY"})
#: What the child says that the server is told as it is.
_REPORTS = frozenset({"metrics", "round", "warning", "waiting", "model", "owes", "join", "leave"})
#: Seconds that the server may take to grant the first lease; afterwards it is a part of the lease's length, but never less than a second.
_FIRST_LEASE = 5.0
_SHORTEST = 1.0
#: Seconds for a process that left the child's group and still holds the link.
_STRAGGLERS = 5.0
#: Seconds for the child, and for the last words to the server, once a signal has asked the flamelet itself to end.
_HURRIED_GRACE = 3.0
_HURRIED_WORDS = 1.5


class Lease(Record, kw_only=True):
    """The server's answer: for how many seconds the worker counts as alive without another word."""

    seconds: float


class Artifact(Record, kw_only=True):
    """The server's answer: where it keeps the artifact."""

    path: str


class Adopted(Record, kw_only=True):
    """The server's answer: it has found the file where this worker says that it is."""

    kept: bool


class Agent:
    """One worker's agent, for one attempt of one task.

    :param settings: who it works for.
    :param environment: what the child's environment is made of.
    """

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        self._settings = settings
        self._environment = {name: value for name, value in environment.items() if name not in _OWN_SECRETS}
        self._patience = settings.orphan_after
        self._work_dir = Path(settings.work_dir).absolute()
        self._work_dir.mkdir(parents=True, exist_ok=True)
        self._url = f"/v1/tasks/{settings.task}"
        self._query = {"attempt": settings.attempt}
        self._session = session = Session(settings.server, settings.task_key)
        self._outbox = Outbox(session, f"{self._url}/reports", self._query, patience=self._patience)
        log = self._work_dir / "task.log"
        self._output = Output(log, session, f"{self._url}/log", self._query, patience=self._patience)
        self._child: Child | None = None
        self._alone = False  # the others have done the work
        self._uploads: set[asyncio.Task[None]] = set()
        self._failure: str | None = None  # the child's own sentence
        self._neighbour = True  # as far as is known, the server sees this worker's files
        self._memory = Memory()
        self._started = asyncio.Event()
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._hurried = asyncio.Event()

    def stop(self, reason: str, *, hurry: bool = False) -> None:
        """End the child, report, leave. Asking twice is asking once.

        :param hurry: leave soon, even if the server cannot be told.
        """
        if hurry:
            self._hurried.set()
        if not self._stopped.done():
            self._stopped.set_result(reason)

    async def run(self) -> bool:
        """From the first connection to the acknowledged end of the task.

        :returns: whether the server knows all; False only when it was away and a signal left no time.
        :raises flame.errors.FlameError: the server refuses this attempt, or was away for too long. The child is ended then.
        """
        async with self._session:
            try:
                return await _beside(self._life(), self._outbox.run(), self._output.ship())
            finally:
                self._output.close()

    async def _life(self) -> bool:
        final = await _beside(self._work(), self._listen(), self._renew())
        saying = asyncio.create_task(self._say(final))
        hurried = asyncio.create_task(self._hurried.wait())
        await asyncio.wait([saying, hurried], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([saying], timeout=_HURRIED_WORDS)
        hurried.cancel()
        return not saying.cancel()

    async def _say(self, final: Final) -> None:
        await self._output.flush()
        self._outbox.put("state", final)
        await self._outbox.flush()

    async def _listen(self) -> None:
        """Take the server's orders."""
        path = f"{self._url}/events"
        async with aclosing(resumed(self._session, path, query=self._query, patience=self._patience)) as events:
            async for event in events:
                if event.type == "start":
                    self._started.set()
                elif event.type == "stop":
                    self.stop(event.data.get("reason") or "It was stopped.")
                elif event.type == "peers" and self._child is not None:
                    self._child.send({"type": "peers", **event.data})
                elif event.type == "done":
                    self._alone = True
                    if self._child is not None:
                        self._child.send({"type": "done"})

    async def _renew(self) -> None:
        """Renew the lease, well before it ends.

        A connection can die in silence. Who waited on it as long as for any other answer would lose the lease meanwhile, so what is
        not answered soon is asked again, on another connection.
        """
        limit = _FIRST_LEASE

        async def lease() -> Lease:
            try:
                async with asyncio.timeout(limit):
                    return await self._session.call("POST", f"{self._url}/lease", query=self._query, into=Lease)
            except TimeoutError as error:
                await self._session.distrust()
                raise ServerUnreachable(f"{self._session.server} has not renewed the lease in {limit:g} s.") from error

        while True:
            granted = await insist(lease, patience=self._patience)
            limit = max(granted.seconds / 4, _SHORTEST)
            await asyncio.sleep(granted.seconds / 4)

    async def _work(self) -> Final:
        """From the first connection to the end of the child; gives what the final report says."""
        mark = self._work_dir / "started"
        if mark.exists():
            # To the server the worker that ran it is lost: the policy decides whether there is a next attempt.
            return {
                "state": "terminated",
                "message": "Its worker was restarted in the middle; an attempt is never run twice.",
            }
        fetching = asyncio.create_task(fetch(self._session, self._url, self._query, self._settings))
        try:
            if not await self._unless_stopped(self._started.wait()):
                return self._terminated()
            fetched = await self._unless_stopped(fetching)
        except (Unauthorized, Forbidden, NotFound):
            raise
        except FlameError as error:
            return {"state": "failed", "message": error.message}
        finally:
            fetching.cancel()
        if fetched is None:
            return self._terminated()
        mark.touch()
        return await self._execute(*fetched)

    async def _execute(self, manifest: Manifest, folder: Path) -> Final:
        """Run the role's code and see it through."""
        output = self._output.pipe()
        self._memory = read_memory()
        try:
            child = await Child.start(
                [sys.executable, *LAUNCHER, "main.py", "config.json"],
                folder=folder,
                environment=self._child_environment(manifest),
                output=output,
            )
        except OSError as error:
            return {"state": "failed", "message": f"Its process could not be started: {error}."}
        finally:
            os.close(output)
        self._child = child
        if self._alone:
            child.send({"type": "done"})
        self._outbox.put("state", {"state": "running"})
        heeding = asyncio.create_task(self._heed(child))
        status = None
        try:
            status = await self._unless_stopped(child.wait())
        finally:
            ended = await child.end(self._grace())
            await asyncio.wait([heeding], timeout=_STRAGGLERS)
            heeding.cancel()
            await asyncio.wait([heeding])
            if status == 0 and self._uploads:
                await asyncio.wait(self._uploads)
            for upload in self._uploads:
                upload.cancel()
            await child.close()
            await self._output.finish()
        return self._terminated(ended) if status is None else self._ended(status)

    def _grace(self) -> float:
        grace = self._settings.stop_grace
        return min(grace, _HURRIED_GRACE) if self._hurried.is_set() else grace

    def _child_environment(self, manifest: Manifest) -> dict[str, str]:
        artifacts = self._work_dir / "artifacts"
        artifacts.mkdir(exist_ok=True)
        return {
            **self._environment,
            "FLAME_JOB_KEY": manifest.job_key,
            "FLAME_TASK": self._settings.task,
            "FLAME_ATTEMPT": str(self._settings.attempt),
            "FLAME_ARTIFACTS": str(artifacts),
            **self._p2p_tls(manifest),
            "FLAME_CHECKPOINTS": str(self._work_dir / CHECKPOINTS),
        }

    def _p2p_tls(self, manifest: Manifest) -> dict[str, str]:
        """The files with which the child speaks TLS with its peers. Those that its machine's owner names come first."""
        given = manifest.p2p_tls
        if given is None or "FLAME_P2P_TLS_CERT" in self._environment:
            return {}
        named = {}
        for name, text in (("cert", given.cert), ("key", given.key), ("ca", given.ca)):
            path = self._work_dir / f"p2p-{name}.pem"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
                file.write(text)
            named[f"FLAME_P2P_TLS_{name.upper()}"] = str(path)
        return named

    async def _heed(self, child: Child) -> None:
        """Act on what the child says on the link."""
        async for message in child.messages():
            kind = message.pop("type", None)
            if kind in _REPORTS:
                self._outbox.put(kind, message)
            elif kind == "artifact":
                self._beside(self._upload(child, str(message.get("name")), str(message.get("path"))))
            elif kind == "checkpoint" and isinstance(message.get("round"), int):
                self._beside(self._keep(child, message["round"], Path(str(message.get("path")))))
            elif kind == "failure":
                self._failure = str(message.get("message"))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        upload = asyncio.create_task(work)
        self._uploads.add(upload)
        upload.add_done_callback(self._uploads.discard)

    async def _keep(self, child: Child, number: int, path: Path) -> None:
        """Hand a checkpoint to the server and tell the child. A server on this machine is told where it lies.

        What was reported before goes first: a successor goes on behind the checkpoint's round, and reports none of the rounds before it.
        """
        url = f"{self._url}/checkpoints/{number}"

        async def put() -> None:
            if await self._adopted(url, path):
                return
            with path.open("rb") as file:
                await self._session.call("PUT", url, query=self._query, data=file)

        try:
            await self._outbox.delivered()
            await insist(put, patience=self._patience)
            path.unlink(missing_ok=True)
            child.send({"type": "artifact", "name": path.name, "path": url})
        except (FlameError, OSError) as error:
            child.send({"type": "artifact", "name": path.name, "path": url, "error": str(error)})

    async def _adopted(self, url: str, path: Path) -> bool:
        """Whether the server has found the file by itself, which spares it a copy."""
        if not self._neighbour:
            return False
        body = {"file": path.name, "size": path.stat().st_size}
        kept = await self._session.call("POST", url, query=self._query, body=body, into=Adopted)
        self._neighbour = kept.kept
        return kept.kept

    async def _upload(self, child: Child, name: str, path: str) -> None:
        """Hand an artifact to the server and tell the child."""

        async def put() -> Artifact:
            with open(path, "rb") as file:  # noqa: ASYNC230
                url = f"{self._url}/artifacts/{name}"
                return await self._session.call("PUT", url, query=self._query, data=file, into=Artifact)

        try:
            kept = await insist(put, patience=self._patience)
            child.send({"type": "artifact", "name": name, "path": kept.path})
        except (FlameError, OSError) as error:
            child.send({"type": "artifact", "name": name, "path": path, "error": str(error)})

    def _terminated(self, status: int | None = None) -> Final:
        return {"state": "terminated", "message": self._stopped.result(), **_status(status)}

    def _ended(self, status: int) -> Final:
        if status == 0:
            return {"state": "completed", "exitCode": 0}
        how = _status(status)
        message = self._failure
        if message is None and status > 0:
            message = f"Its main.py ended with exit code {status}."
        elif message is None:
            hint = self._memory_hint() if status == -signal.SIGKILL else ""
            message = f"Its process was killed by {how['signal']}{hint}."
        return {"state": "failed", "message": message, "log": self._output.tail(), **how}

    def _memory_hint(self) -> str:
        """Why the kernel has sent SIGKILL, as far as the control group tells."""
        before, now = self._memory.kills, read_memory()
        if before is None or now.kills is None:
            return " (out of memory, perhaps)"
        if now.kills == before:
            return ""
        return ": it was out of memory" + (f", of which it may use {show_bytes(now.limit)}" if now.limit else "")

    async def _unless_stopped(self, awaited: Awaitable[T]) -> T | None:
        """The result of an awaitable, or None if a stop came first."""
        waiting = asyncio.ensure_future(awaited)
        try:
            either: list[asyncio.Future[Any]] = [waiting, self._stopped]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()


def _status(status: int | None) -> Final:
    if status is None:
        return {}
    if status >= 0:
        return {"exitCode": status}
    try:
        return {"signal": signal.Signals(-status).name}
    except ValueError:  # a real-time signal has no name
        return {"signal": f"signal {-status}"}


async def _beside(main: Coroutine[Any, Any, T], *services: Coroutine[Any, Any, None]) -> T:
    """The result of a coroutine beside which others run, which never end by themselves. The failure of any is the failure of all."""
    first = asyncio.create_task(main)
    others = [asyncio.create_task(service) for service in services]
    tasks: list[asyncio.Future[Any]] = [first, *others]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            if other.done():
                other.result()
        return first.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
