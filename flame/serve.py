"""One server process, put together: store, notifier, runner, controller, HTTP.

The data directory is locked for as long as the process lives, so there is one server to a directory. What is in it outlives
the process, and so do the workers: a server that ends, however it does, is followed by one that takes up where it
was. Only a private server, which somebody has started for the moment, takes its jobs with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import hashlib
import importlib.util
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flame.apiserver.oidc import OidcSettings
from flame.apiserver.tls import ServerTls
from flame.errors import Conflict, StoreError, UsageError

if TYPE_CHECKING:
    from flame.apiserver.access import Guard
    from flame.apiserver.app import Api
    from flame.artifacts import Artifacts
    from flame.controller.controller import Controller
    from flame.store import ServerLock

log = logging.getLogger("flame.serve")

#: Seconds that a private server waits for the first one to attach.
PRIVATE_PATIENCE = 30.0
#: Seconds that a worker of a private server goes on without it.
ORPHAN_PATIENCE = 60.0
#: Seconds that open requests get to end when the server does.
CLOSING = 2.0


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What an operator chooses.

    :ivar host: the address to listen on.
    :ivar port: the port to listen on; 0 takes any that is free.
    :ivar data_dir: the data directory.
    :ivar db: where the state is; None: ``flame.db`` in the data directory.
    :ivar artifacts: the URL of the bucket or folder where models, checkpoints, code and past logs are kept; None: the data directory.
    :ivar standby: where another server works on the database, wait and take over when it ends or falls silent.
    :ivar takeover: seconds from the last word of a silent server until a standby works in its stead.
    :ivar token: what users must show.
    :ivar computes: a file with computes that are registered when the server starts; None: none.
    :ivar slots: how many workers may be there at once; None: eight a core.
    :ivar lease: seconds of silence after which a worker counts as lost.
    :ivar private: live while somebody is attached, and take all jobs along.
    :ivar advertise: the URL at which workers and users reach the server, where it is not the one it listens on.
    :ivar mqtt: ``host:port`` of the broker for jobs that use mqtt and name none.
    :ivar allow_anyone: listen beyond this machine without users, token or TLS.
    :ivar insecure_plain_http: listen beyond this machine without TLS.
    :ivar tls: certificates.
    :ivar oidc: the identity provider whose tokens are accepted.
    :ivar p2p_tls: workers of a job speak TLS with each other, by an authority that exists for the job alone.
    :ivar drain: see the jobs that run to their end, start no others, and end; another server on the data directory is told to.
    :ivar keep_jobs: for how many seconds jobs that have ended are kept; None: for ever.
    :ivar keep_size: how many bytes those may have; None: any number.
    :ivar verbose: log what only developers want to read.
    """

    host: str = "127.0.0.1"
    port: int = 10100
    data_dir: Path = field(default_factory=lambda: Path("~/.flame/data").expanduser())
    db: str | None = None
    artifacts: str | None = None
    standby: bool = False
    takeover: float = 20.0
    token: str | None = None
    computes: Path | None = None
    slots: int | None = None
    lease: float = 20.0
    private: bool = False
    advertise: str | None = None
    mqtt: str | None = None
    allow_anyone: bool = False
    insecure_plain_http: bool = False
    tls: ServerTls = field(default_factory=ServerTls)
    oidc: OidcSettings | None = None
    p2p_tls: bool = False
    drain: bool = False
    keep_jobs: float | None = None
    keep_size: int | None = None
    verbose: bool = False


def run_server(settings: ServeSettings) -> int:
    """Serve until a signal, or until nobody needs a private server any more.

    :returns: the exit status.
    :raises flame.errors.FlameError: the server cannot start: the directory is taken, the port is taken, the database fails.
    """
    _log_to_stderr(verbose=settings.verbose)
    _refuse_plain_http(settings)
    os.umask(0o077)  # whatever this process and its workers write is for their account alone
    data_dir = settings.data_dir.expanduser().absolute()
    if settings.drain and _tell_to_drain(data_dir):
        return 0
    _allow_connections()
    _seek_garbage_seldom()
    with locked(data_dir):
        return asyncio.run(_serve(settings, data_dir))


def _allow_connections() -> None:
    """Each flamelet holds a connection or two; the usual limit of open files is for programs that have a few."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a limit that the system does not grant stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(least, min(most, 65536) if most > 0 else 65536), most))


def _seek_garbage_seldom() -> None:
    """With thousands of connections a look at all objects takes a quarter of a second, in which the server does nothing else.

    What is there from the start is not looked at again, and the rest after ten times as many new objects as usual: most garbage
    is freed without.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


async def _serve(settings: ServeSettings, data_dir: Path) -> int:
    stopping, draining = asyncio.Event(), asyncio.Event()
    _on_signals(stopping, draining)
    if settings.drain:
        draining.set()
    async with contextlib.AsyncExitStack() as stack:
        # A standby may wait for days, and is told to end meanwhile like any other server.
        entering = asyncio.ensure_future(stack.enter_async_context(serve(settings, data_dir)))
        await _first(asyncio.wait([entering]), stopping.wait())
        if not entering.done():
            while not entering.done():  # a cancellation can get lost in a driver that waits with a timeout of its own
                entering.cancel()
                await asyncio.wait([entering], timeout=1.0)
            return 0
        server = await entering
        if settings.private:
            _say(json.dumps({"url": server.url, "pid": os.getpid()}))
            await _first(stopping.wait(), _unneeded(server, stopping))
            jobs = len(server.controller.active())
            if jobs:
                log.info("private server ends: stopping %d jobs", jobs)
            await server.api.sessions.stop_all()
            await server.controller.stop_all()
        else:
            if settings.keep_jobs is not None or settings.keep_size is not None:
                from flame.controller.retention import Retention

                retention = Retention(server.controller, settings.keep_jobs, settings.keep_size)
                server.controller.context.background.spawn(retention.run())
            if settings.keep_jobs is not None:
                server.controller.context.background.spawn(server.api.sessions.register.retire(settings.keep_jobs))
            await _first(stopping.wait(), server.lost(), _drained(server.controller, draining))
            if not stopping.is_set() and not server.controller.drained.is_set():
                raise StoreError("Another server has taken over the database; this one ends. Its workers go on.")
            left = server.controller.used
            log.info("the server ends%s", f"; {left} workers go on, and the next server finds them" if left else "")
    return 0


@dataclass(frozen=True)
class Server:
    """A server that listens.

    :ivar url: its address.
    :ivar controller: its jobs.
    :ivar api: what answers.
    :ivar lock: of a database that other servers can reach.
    """

    url: str
    controller: Controller
    api: Api
    lock: ServerLock | None = None

    async def lost(self) -> None:
        """Wait until another server has taken over."""
        await (self.lock.lost if self.lock is not None else asyncio.Event()).wait()


@contextlib.asynccontextmanager
async def serve(settings: ServeSettings, data_dir: Path) -> AsyncIterator[Server]:
    """A server within this event loop, for as long as the context lasts. The data directory must be locked already.

    :param settings: the operator's choices.
    :param data_dir: the data directory.
    :raises flame.errors.FlameError: it cannot start.
    """
    from aiohttp import web

    from flame.apiserver.access import Guard
    from flame.apiserver.app import Api
    from flame.apiserver.audit import Audit
    from flame.apiserver.doorman import PATIENCE, Doorman, is_ours
    from flame.apiserver.oidc import Oidc
    from flame.artifacts import open_artifacts
    from flame.controller.context import Options
    from flame.controller.controller import Controller
    from flame.controller.identity import identify, kept
    from flame.notifier import Notifier
    from flame.runners import Runner, make_runner
    from flame.sessions.manager import Manager
    from flame.spec.load import load_computes
    from flame.spec.nouns import Broker
    from flame.spec.records import ComputeRecord
    from flame.store import DEFAULT_URL, open_store, take_lock

    database = settings.db or DEFAULT_URL
    declared = load_computes(settings.computes) if settings.computes else ()
    async with contextlib.AsyncExitStack() as stack:
        store = open_store(database, data_dir)
        try:
            place = kept(data_dir, "place")
            lock = await take_lock(database, store, place=place, takeover=settings.takeover, wait=settings.standby)
        except BaseException:
            await store.close()
            raise
        if lock is not None:  # closed last: the next server begins as soon as it is
            stack.push_async_callback(lock.close)
        stack.push_async_callback(store.close)
        who = await identify(data_dir, store if lock is not None else None)
        artifacts = open_artifacts(settings.artifacts, data_dir)
        stack.push_async_callback(artifacts.close)
        await artifacts.check()
        notifier = Notifier(store)
        # The port is taken before workers are adopted, so that they find it when the first of them comes back.
        listener = _listen_again(settings, data_dir)
        stack.callback(listener.close)
        port = listener.getsockname()[1]
        tls = settings.tls.context()
        url = (settings.advertise or _url(settings.host, port, tls=tls is not None)).rstrip("/")
        options = Options(
            data_dir=data_dir,
            server=settings.advertise or _url(_reachable(settings.host), port, tls=tls is not None),
            slots=settings.slots,
            lease=settings.lease,
            registry=_registry(data_dir, artifacts),
            brokers=(Broker(sort="mqtt", host=settings.mqtt),) if settings.mqtt else (),
            worker_environment=settings.tls.for_workers(),
            p2p_tls=settings.p2p_tls,
        )
        # Who has started a private server starts it again when it is killed, at once or, having gone too, never.
        environment = {"FLAME_ORPHAN_AFTER": f"{ORPHAN_PATIENCE:g}"} if settings.private else {}

        def make(compute: ComputeRecord) -> Runner:
            config = dict(compute.config)
            if compute.kind == "local":
                config["environment"] = {**environment, **config.get("environment", {})}
            instance = f"{who.id}-{hashlib.sha256(compute.name.encode()).hexdigest()[:8]}"  # two may be one machine
            return make_runner(compute.kind, config, instance=instance, data_dir=data_dir)

        controller = Controller(store, notifier, make, who.keys, options, artifacts=artifacts)
        manager = Manager(controller)
        stack.push_async_callback(controller.close)
        await controller.accounts.open()
        names = frozenset(name for name in (urlsplit(url).hostname, settings.host) if name)
        guard = Guard(
            controller.accounts,
            settings.token,
            names,
            verifier=Oidc(settings.oidc) if settings.oidc is not None else None,
            certificates=settings.tls.client_ca is not None,
        )
        _refuse_openness(settings, guard)
        await controller.open(declared)
        audit = Audit(data_dir / "audit.log")
        stack.callback(audit.close)
        stack.push_async_callback(manager.close)
        await manager.open()
        api = Api(controller, guard, who.id, audit, manager)
        web_runner = web.AppRunner(
            api.application(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=CLOSING,
            keepalive_timeout=75,
        )
        await web_runner.setup()
        stack.push_async_callback(web_runner.cleanup)
        assert web_runner.server is not None
        doorman = Doorman(web_runner.server)
        api.heard = doorman.heard
        logging.getLogger("aiohttp.server").addFilter(is_ours)
        patience = PATIENCE if tls is not None else None
        doors = await asyncio.get_running_loop().create_server(
            doorman, sock=listener, ssl=tls, ssl_handshake_timeout=patience, backlog=4096
        )
        stack.callback(doors.close)
        controller.context.leases.prolong(options.reunion)

        def release() -> None:
            """Streams come to their end, so that nobody waits for them."""
            notifier.close()
            controller.context.logs.release()
            api.attachments.close()
            manager.disconnect()

        stack.callback(release)
        _write_atomically(data_dir / "server.json", json.dumps({"url": url, "pid": os.getpid()}))
        stack.callback((data_dir / "server.json").unlink, missing_ok=True)
        log.info("listening on %s (data in %s)", url, data_dir)
        yield Server(url, controller, api, lock)


# ------------------------------------------------------------------------------------------- small pieces


def _refuse_openness(settings: ServeSettings, guard: Guard) -> None:
    """Whoever reaches a server that has no users can run code on it."""
    if not guard.trusting or settings.allow_anyone or _is_loopback(settings.host):
        return
    raise UsageError(
        f"Anyone who reaches {settings.host} could run code here: make users first (`flame user create NAME --role admin`, "
        "with the server on this machine alone), or give it a token (--token or FLAME_TOKEN), or say --allow-anyone."
    )


def _refuse_plain_http(settings: ServeSettings) -> None:
    """Without TLS whoever is on the way reads every token and model."""
    if settings.tls.on or settings.insecure_plain_http or settings.allow_anyone or _is_loopback(settings.host):
        return
    raise UsageError(
        f"Tokens and models would travel to {settings.host} for anyone on the way to read: give --tls-cert and --tls-key "
        "(`flame cert` makes them for a trial), or say --insecure-plain-http, such as behind a proxy that does TLS."
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(host: str) -> str:
    """Where a worker on this machine reaches a server that listens on ``host``."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host


def _url(host: str, port: int, *, tls: bool) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _listen_again(settings: ServeSettings, data_dir: Path) -> socket.socket:
    """Listen. Where any port will do, it is the one of the server before this, if it is free: its workers call there."""
    kept = data_dir / "port"
    listener = None
    if settings.port == 0:
        with contextlib.suppress(OSError, ValueError, UsageError):
            listener = _listen(settings.host, int(kept.read_text()))
    listener = listener or _listen(settings.host, settings.port)
    _write_atomically(kept, str(listener.getsockname()[1]))
    return listener


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(4096)  # thousands of flamelets come back in the same second
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {reason}. Choose another --host or --port."
        ) from error
    return listener


def _registry(data_dir: Path, artifacts: Artifacts) -> Any:
    """Where metrics and models go when a job does not say: MLflow where it is installed, else files."""
    from flame.spec.nouns import Registry

    if importlib.util.find_spec("mlflow") is not None:
        place = f"{artifacts.url}/mlflow" if artifacts.apart else ""
        return Registry(sort="mlflow", uri=f"sqlite:///{data_dir / 'mlflow.db'}", artifacts=place)
    return Registry(sort="local", uri=str(data_dir / "registry"))


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


@contextlib.contextmanager
def locked(data_dir: Path) -> Any:
    """Hold the data directory, as every process does that writes to it.

    :raises flame.errors.Conflict: another server holds it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock: IO[str] = (data_dir / "lock").open("a")
    except OSError as error:
        raise StoreError(f"The data directory {data_dir} cannot be used: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another server uses {data_dir}{_who(data_dir)}. Use that one, or another --data-dir."
            ) from None
        yield


def _who(data_dir: Path) -> str:
    try:
        there = json.loads((data_dir / "server.json").read_text())
        return f": process {there['pid']} at {there['url']}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""


async def _drained(controller: Controller, draining: asyncio.Event) -> None:
    """Once that is wanted, start nothing any more; over when nothing runs."""
    await draining.wait()
    controller.drain()
    log.info("no jobs are started any more; the server ends when those that run have ended")
    await controller.drained.wait()


def _tell_to_drain(data_dir: Path) -> bool:
    """Tell the server that uses a data directory to start nothing any more, and wait for its end. False: there is none."""
    try:
        with locked(data_dir):
            return False
    except Conflict:
        pass
    try:
        pid = int(json.loads((data_dir / "server.json").read_text())["pid"])
        os.kill(pid, signal.SIGUSR1)
        log.info("server %d has been told; it ends when the jobs that run have ended", pid)
        with (data_dir / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"The server that uses {data_dir} cannot be told to end: {error}.") from error
    return True


def _on_signals(stopping: asyncio.Event, draining: asyncio.Event) -> None:
    """The first signal ends the server in order, the second at once. SIGUSR1 lets it end once the jobs that run have."""
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        if stopping.is_set():
            log.warning("%s again: the server ends at once", number.name)
            os._exit(128 + number)
        log.info("%s: the server ends", number.name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGUSR1, draining.set)


async def _unneeded(server: Server, stopping: asyncio.Event) -> None:
    """Wait until a private server is of no use any more."""
    try:
        async with asyncio.timeout(PRIVATE_PATIENCE):
            await server.api.attachments.first.wait()
    except TimeoutError:
        log.info("nobody has attached within %g s", PRIVATE_PATIENCE)
    await server.api.attachments.unneeded()


async def _first(*works: Any) -> None:
    """Wait for the first of several."""
    tasks = [asyncio.ensure_future(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _say(line: str) -> None:
    """The one line that a private server prints. Who has started it may have gone."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class _Lines(logging.Formatter):
    """One line an entry: time, level, part, what."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")


def _log_to_stderr(*, verbose: bool) -> None:
    root = logging.getLogger("flame")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("aiohttp").addHandler(handler)
