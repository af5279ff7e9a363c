"""Workers as processes of this host.

Each worker leads a session of its own, so that neither the end of the server nor a Ctrl-C in its terminal
takes it along. The server keeps no list of them: it finds them by a mark in their environment (see
:mod:`flame.runners.processes`), also after it was killed and started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import psutil

from flame.errors import RunnerError
from flame.runners.base import Capacity, ExitCallback, Runner, WorkerExit, WorkerInfo, WorkerSpec
from flame.runners.cgroups import Group, Limits, group_of, limit, make_group
from flame.runners.environments import Environments
from flame.runners.host import VISIBLE, gpus, host_capacity
from flame.runners.processes import MARK, MODULE, Leader, ProcessTable, leaders
from flame.spec.quantities import show_bytes

log = logging.getLogger("flame.runners")


class LocalConfig(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Configuration of the kind ``local``.

    :ivar slots: most workers at once; None: eight a core.
    :ivar python: the interpreter that runs them; None for the server's own.
    :ivar work_dir: where they get their working directories; None for ``workers`` in the data directory.
    :ivar environment: variables for every worker, beside those that the server has.
    """

    slots: Annotated[int, msgspec.Meta(ge=1)] | None = None
    python: str | None = None
    work_dir: str | None = None
    environment: dict[str, str] = msgspec.field(default_factory=dict)


#: In a worker's environment: the GPUs that it was given, for the next server.
GPUS = "FLAME_WORKER_GPUS"


class _Worker:
    """A worker that runs: who it is, its first process, its control group and GPUs, and the task that waits for its end."""

    def __init__(self, info: WorkerInfo, leader: Leader, group: Group | None, devices: Sequence[str]) -> None:
        self.info = info
        self.leader = leader
        self.group = group
        self.devices = devices
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
        self._promised: dict[str, Sequence[str]] = {}
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
        return host_capacity(self._config.slots)

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
        python = await self._before(
            info,
            f"Its dependencies are being installed: {', '.join(spec.dependencies)}.",
            self._environments.python(spec.dependencies),
        )
        # What FLAME_ variables the server has are for the server.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("FLAME_") or name.startswith("FLAME_CACHE_")
        }
        environment |= _threads(spec) | {**self._config.environment, **spec.environment}
        devices = self._devices(spec)
        if devices:
            environment[VISIBLE] = ",".join(devices)
            environment[GPUS] = environment[VISIBLE]
        environment |= {"FLAME_WORK_DIR": str(work_dir), MARK: self._mark(info), MODULE: spec.module}
        try:
            command = [python, "-P", "-m", spec.module]
            limits = Limits(spec.resources.cpu, spec.resources.memory_bytes)
            name = f"{self.instance}.{spec.name}"
            pid, group = await asyncio.to_thread(_spawn, command, environment, work_dir, limits, name)
            info = info._replace(handle=str(pid))
            self._watch(info, Leader(pid), group, devices)
        except OSError as error:
            raise RunnerError(f"The worker {spec.name} could not be started: {error}.") from error
        finally:
            self._promised.pop(spec.name, None)
        return info

    def _devices(self, spec: WorkerSpec) -> Sequence[str]:
        """GPUs for a worker that asks for some: those that no other worker has."""
        wanted = spec.resources.gpu
        if not wanted:
            return ()
        given = [worker.devices for worker in self._workers.values()] + list(self._promised.values())
        taken = {name for devices in given for name in devices}
        free = [name for name in gpus() if name not in taken]
        if len(free) < wanted:
            raise RunnerError(f"The worker {spec.name} needs {wanted} GPUs, and {len(free)} of this host are free.")
        self._promised[spec.name] = free[:wanted]
        return free[:wanted]

    def _adopt(self, info: WorkerInfo, process: psutil.Process, mark: str) -> None:
        try:
            leader = Leader(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        try:  # now that it is held, make sure that it is still the process that was seen
            environment = process.environ()
        except psutil.Error:
            environment = {}
        if environment.get(MARK) == mark:
            devices = [name for name in environment.get(GPUS, "").split(",") if name]
            self._watch(info, leader, group_of(process.pid), devices)
        else:
            leader.release()

    def _watch(self, info: WorkerInfo, leader: Leader, group: Group | None, devices: Sequence[str]) -> None:
        worker = self._workers[_name(info)] = _Worker(info, leader, group, devices)
        worker.watch = asyncio.create_task(self._see_off(worker))

    async def _see_off(self, worker: _Worker) -> None:
        """Wait for the end of a worker, end what it left behind, and report it."""
        try:
            await worker.leader.ended()
            await self._table.sweep(self._mark(worker.info), worker.leader.session)
            how = _with_cause(worker.leader.reap(), worker.group)
            if worker.group is not None:
                worker.group.remove()
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


def _threads(spec: WorkerSpec) -> dict[str, str]:
    """Numeric libraries start a thread for each core of the host; more than it may use only get in each other's way."""
    return {} if spec.resources.cpu is None else {"OMP_NUM_THREADS": str(max(1, math.ceil(spec.resources.cpu)))}


def _with_cause(how: WorkerExit, group: Group | None) -> WorkerExit:
    """How a worker ended, with the sentence that only its control group knows."""
    if group is None or how.signal != "SIGKILL" or not group.kills:
        return how
    most = "" if group.memory is None else f", of which it may use {show_bytes(group.memory)}"
    return how._replace(message=f"Its worker was out of memory{most}.")


def _spawn(
    command: Sequence[str], environment: dict[str, str], work_dir: Path, limits: Limits, name: str
) -> tuple[int, Group | None]:
    """Start a worker's first process, and hold it to its limits before it has done anything of note.

    :returns: its pid, and its control group where it has limits and may have one.
    """
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    group: Group | None = None
    if limits:
        try:
            group = make_group(name, limits)
        except OSError as error:
            log.debug("no control group for %s (%s); each of its processes is limited by itself", name, error)
    with (work_dir / "flamelet.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=work_dir,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Popen only starts it: the leader waits for it. Without this, Popen would reap it behind our back.
    process.returncode = 0
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended already, which the leader will tell
            if sys.platform == "linux":  # a core would hold the task's key, and its data
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
            if group is not None:
                group.take(process.pid)
            else:
                limit(process.pid, limits)
    except OSError:
        os.killpg(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)
        raise
    return process.pid, group
