"""One server, put together: store, notifier, runners, controller, sessions, HTTP; what an operator chooses of it, and where it listens.

:func:`serve` makes it within an event loop and takes it apart again. Whose process that is, is the matter of :mod:`flame.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import ipaddress
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flame.apiserver.oidc import OidcSettings
from flame.apiserver.tls import ServerTls
from flame.errors import UsageError

if TYPE_CHECKING:
    from flame.apiserver.access import Guard
    from flame.apiserver.app import Api
    from flame.artifacts import Artifacts
    from flame.controller.controller import Controller
    from flame.store import ServerLock

log = logging.getLogger("flame.serve")

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


def refuse_plain_http(settings: ServeSettings) -> None:
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
    partial = path.with_name(f"{path.name}.new")  # the same each time: what a killed server leaves is the next one's
    partial.write_text(text)
    partial.replace(path)
