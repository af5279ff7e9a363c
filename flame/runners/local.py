"""Workers as processes of this host.

Each worker leads a session of its own, so that neither the end of the server nor a Ctrl-C in its terminal
takes it along. The server keeps no list of them: it finds them by a mark in their environment (see
:mod:`flame.runners.processes`), also after it was killed and started again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import psutil

from flame.errors import RunnerError
from flame.runners.base import Capacity, ExitCallback, Runner, WorkerInfo, WorkerSpec
from flame.runners.environments import Environments
from flame.runners.processes import MARK, MODULE, Leader, ProcessTable, leaders


class LocalConfig(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Configuration of the kind ``local``.

    :ivar slots: most workers at once; None for no limit.
    :ivar python: the interpreter that runs them; None for the server's own.
    :ivar work_dir: where they get their working directories; None for ``workers`` in the data directory.
    :ivar environment: variables for every worker, beside those that the server has.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)] | None = None
    python: str | None = None
    work_dir: str | None = None
    environment: dict[str, str] = msgspec.field(default_factory=dict)


class _Worker:
    """A worker that runs: who it is, its first process, and the task that waits for its end."""

    def __init__(self, info: WorkerInfo, leader: Leader) -> None:
        self.info = info
        self.leader = leader
        self.ending = False  # on our own demand, so nobody needs to be told
        self.watch: asyncio.Task[None]


class LocalRunner(Runner):
    """Runs workers as processes of this host."""

    kind: ClassVar[str] = "local"
    Config: ClassVar[type[msgspec.Struct]] = LocalConfig

    def __init__(self, config: LocalConfig, *, instance: str, data_dir: Path) -> None:
        """See the base class."""
        super().__init__(config, instance=instance, data_dir=data_dir)
        self._config = config
        self._root = Path(config.work_dir).expanduser() if config.work_dir else data_dir / "workers"
        self._root = self._root.absolute()
        self._environments = Environments(data_dir / "environments", config.python)
        self._table = ProcessTable()
        self._workers: dict[str, _Worker] = {}
        self._starting: dict[str, asyncio.Task[WorkerInfo]] = {}
        self._on_exit: ExitCallback | None = None

    async def open(self, on_exit: ExitCallback) -> None:
        """See the base class. Workers that an earlier process of the server started are adopted here already."""
        self._on_exit = on_exit
        await self.list()

    async def start(self, spec: WorkerSpec) -> WorkerInfo:
        """See the base class. The first start with new dependencies takes as long as pip needs to install them."""
        if spec.name in self._workers:
            return self._workers[spec.name].info
        if spec.name not in self._starting:
            task = self._starting[spec.name] = asyncio.create_task(self._start(spec))
            task.add_done_callback(lambda _: self._starting.pop(spec.name))
        # Shielded: half a start would leave a process that nobody knows.
        return await asyncio.shield(self._starting[spec.name])

    async def list(self) -> Sequence[WorkerInfo]:
        """See the base class."""
        found = await self._table.snapshot()
        for mark, process in leaders(found, self.instance).items():
            _, job, task, attempt = mark.split("/")
            info = WorkerInfo(task, job, int(attempt), str(process.pid))
            if _name(info) not in self._workers and _name(info) not in self._starting:
                self._adopt(info, process, mark)
        return [worker.info for worker in self._workers.values()]

    async def end(self, worker: WorkerInfo, *, grace: float = 5.0) -> None:
        """See the base class."""
        if start := self._starting.get(_name(worker)):
            await asyncio.wait([start])
        if _name(worker) not in self._workers:
            await self.list()
        running = self._workers.get(_name(worker))
        if running is None:  # its first process is gone; others may not be
            await self._table.sweep(self._mark(worker))
            return
        running.ending = True
        running.leader.terminate()
        done, _ = await asyncio.wait([running.watch], timeout=grace)
        if not done:
            await self._table.sweep(self._mark(worker), running.leader.session)
        await asyncio.shield(running.watch)

    async def logs(self, worker: WorkerInfo) -> AsyncIterator[bytes]:
        """See the base class. Kept until :meth:`clean`."""
        try:
            with (self._work_dir(worker) / "flamelet.log").open("rb") as file:
                while piece := await asyncio.to_thread(file.read, 1 << 16):
                    yield piece
        except FileNotFoundError:
            return

    async def clean(self, worker: WorkerInfo) -> None:
        """Remove the working directory of a worker that has ended."""
        try:
            await asyncio.to_thread(shutil.rmtree, self._work_dir(worker))
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunnerError(f"The working directory of {_name(worker)} cannot be removed: {error}.") from error

    async def capacity(self) -> Capacity:
        """See the base class."""
        return Capacity(self._config.slots)

    async def close(self) -> None:
        """See the base class."""
        starting = list(self._starting.values())
        self._environments.close()
        if starting:
            await asyncio.wait(starting)
        watches = [worker.watch for worker in self._workers.values()]
        for watch in watches:
            watch.cancel()
        if watches:
            await asyncio.wait(watches)

    async def _start(self, spec: WorkerSpec) -> WorkerInfo:
        info = WorkerInfo(spec.task, spec.job, spec.attempt, "")
        work_dir = self._work_dir(info)
        python = await self._environments.python(spec.dependencies)
        # What FLAME_ variables the server has are for the server.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        environment |= {**self._config.environment, **spec.environment}
        environment |= {"FLAME_WORK_DIR": str(work_dir), MARK: self._mark(info), MODULE: spec.module}
        try:
            pid = await asyncio.to_thread(_spawn, [python, "-P", "-m", spec.module], environment, work_dir)
            info = info._replace(handle=str(pid))
            self._watch(info, Leader(pid))
        except OSError as error:
            raise RunnerError(f"The worker {spec.name} could not be started: {error}.") from error
        return info

    def _adopt(self, info: WorkerInfo, process: psutil.Process, mark: str) -> None:
        try:
            leader = Leader(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        try:  # now that it is held, make sure that it is still the process that was seen
            same = process.environ().get(MARK) == mark
        except psutil.Error:
            same = False
        if same:
            self._watch(info, leader)
        else:
            leader.release()

    def _watch(self, info: WorkerInfo, leader: Leader) -> None:
        worker = self._workers[_name(info)] = _Worker(info, leader)
        worker.watch = asyncio.create_task(self._see_off(worker))

    async def _see_off(self, worker: _Worker) -> None:
        """Wait for the end of a worker, end what it left behind, and report it."""
        try:
            await worker.leader.ended()
            await self._table.sweep(self._mark(worker.info), worker.leader.session)
            how = worker.leader.reap()
        except RunnerError as error:
            how = worker.leader.reap()._replace(message=error.message)
        finally:
            worker.leader.release()
        del self._workers[_name(worker.info)]
        if not worker.ending and self._on_exit:
            self._on_exit(worker.info, how)

    def _mark(self, worker: WorkerInfo) -> str:
        return f"{self.instance}/{worker.job}/{worker.task}/{worker.attempt}"

    def _work_dir(self, worker: WorkerInfo) -> Path:
        for name in (worker.task, worker.job):
            if not name or "/" in name or name.startswith("."):
                raise RunnerError(f"{name!r} cannot name a task or a job of a local worker.")
        return self._root / _name(worker)


def _name(worker: WorkerInfo) -> str:
    return f"{worker.task}.{worker.attempt}"


def _spawn(command: Sequence[str], environment: dict[str, str], work_dir: Path) -> int:
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (work_dir / "flamelet.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=work_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Popen only starts it: the leader waits for it. Without this, Popen would reap it behind our back.
    process.returncode = 0
    return process.pid
