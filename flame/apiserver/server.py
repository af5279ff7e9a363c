"""The server itself: health, what it is, attachments, numbers, and the document of the API."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from aiohttp import web

import flame
from flame.apiserver import answers
from flame.apiserver.routes import Access, Call, NoQuery, Route
from flame.errors import ServerUnreachable
from flame.spec.nouns import Registry
from flame.spec.records import Event, Record


class Health(Record, kw_only=True):
    """The server answers."""

    status: str
    version: str


class Compute(Record, kw_only=True):
    """A place that runs workers: how many it takes, and how many there are or have been promised room."""

    name: str
    kind: str
    slots: int | None
    used: int


class Server(Record, kw_only=True):
    """What the server is."""

    version: str
    id: str
    computes: list[Compute]
    registry: Registry
    data_dir: str


class Attachments:
    """Who is attached: a private server lives while somebody is.

    :ivar first: set once somebody has attached.
    :ivar none: set while nobody is attached.
    :ivar over: nobody can attach any more: the server ends.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.none = asyncio.Event()
        self.none.set()
        self.over = False
        self._count = 0
        self._closed = asyncio.Event()

    async def stay(self) -> AsyncGenerator[list[Event], None]:
        """Be attached until the iteration is left, or the server ends."""
        self._count += 1
        self.first.set()
        self.none.clear()
        try:
            yield []
            await self._closed.wait()
        finally:
            self._count -= 1
            if not self._count:
                self.none.set()

    async def unneeded(self) -> None:
        """Wait until all have gone. From then on nobody can attach, so that nobody counts on a server that ends."""
        while not self.none.is_set():
            await self.none.wait()
        self.over = True

    def close(self) -> None:
        """The server ends: let all go."""
        self.over = True
        self._closed.set()


async def health(call: Call[None, NoQuery]) -> Health:
    """Say that the server answers."""
    return Health(status="ok", version=flame.__version__)


async def server(call: Call[None, NoQuery]) -> Server:
    """Say what the server is."""
    controller = call.api.controller
    options = controller.context.options
    computes = [
        Compute(
            name=site.record.name,
            kind=site.record.kind,
            slots=controller.computes.capacity(site).slots,
            used=site.used.workers,
        )
        for site in controller.computes.sites()
    ]
    return Server(
        version=flame.__version__,
        id=call.api.id,
        computes=computes,
        registry=options.registry,
        data_dir=str(options.data_dir),
    )


async def attach(call: Call[None, NoQuery]) -> web.StreamResponse:
    """Keep the server alive."""
    if call.api.attachments.over:
        raise ServerUnreachable("This server is about to end.")
    return await answers.events(call.request, call.stay, call.api.attachments.stay())


async def document(call: Call[None, NoQuery]) -> dict[str, Any]:
    """Give the OpenAPI document."""
    return call.api.document


async def page(call: Call[None, NoQuery]) -> web.Response:
    """Give the page that shows the document."""
    from flame.apiserver.docs import render

    return web.Response(text=render(call.api.document), content_type="text/html")


async def metrics(call: Call[None, NoQuery]) -> web.Response:
    """Numbers for Prometheus."""
    controller = call.api.controller
    jobs = Counter(job.state.value for job in controller.active())
    numbers = call.api.sessions.numbers()
    lines = [
        *_family("flame_jobs", "gauge", "Jobs under way, by state.", "state", jobs),
        *_family("flame_workers", "gauge", "Workers there are, or have been promised room.", None, controller.used),
        *_family("flame_sessions", "gauge", "Sessions that are open.", None, numbers.sessions),
        *_family("flame_session_tasks", "gauge", "Tasks of open sessions, by state.", "state", numbers.tasks),
        *_family("flame_executors", "gauge", "Executors of sessions, by state.", "state", numbers.executors),
        *_family("flame_requests_total", "counter", "Requests answered, by status.", "status", call.api.requests),
    ]
    return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


def _family(name: str, kind: str, says: str, label: str | None, values: Mapping[Any, int] | int) -> list[str]:
    """The lines of one number, or of one for each value of a label."""
    lines = [f"# HELP {name} {says}", f"# TYPE {name} {kind}"]
    if isinstance(values, int):
        return [*lines, f"{name} {values}"]
    return lines + [f'{name}{{{label}="{value}"}} {count}' for value, count in sorted(values.items())]


ROUTES = [
    Route(
        method="GET",
        path="/healthz",
        handler=health,
        summary="Ask whether the server answers.",
        access=Access.OPEN,
        answer=Health,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        handler=document,
        summary="Read this document.",
        access=Access.OPEN,
        answer=dict[str, Any],
    ),
    Route(
        method="GET",
        path="/docs",
        handler=page,
        summary="Read this document as a page.",
        access=Access.OPEN,
        answer=bytes,
        content="text/html",
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=metrics,
        summary="Numbers in Prometheus' text form.",
        access=Access.READ,
        answer=bytes,
        content="text/plain",
    ),
    Route(
        method="GET",
        path="/v1/server",
        handler=server,
        summary="Ask what the server is.",
        access=Access.SIGNED_IN,
        answer=Server,
    ),
    Route(
        method="GET",
        path="/v1/attach",
        handler=attach,
        summary="Be attached while the stream is open: a private server ends once nobody is.",
        access=Access.SIGNED_IN,
        answer=Event,
        content="application/x-ndjson",
        stream=True,
        refusals=(503,),
    ),
]
