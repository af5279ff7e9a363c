"""The server itself: health, what it is, attachments, numbers, and the document of the API."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
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
    return await answers.events(call.request, call.api.attachments.stay())


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
    states = Counter(job.state.value for job in controller.active())
    lines = ["# HELP flame_jobs Jobs under way, by state.", "# TYPE flame_jobs gauge"]
    lines += [f'flame_jobs{{state="{state}"}} {count}' for state, count in sorted(states.items())]
    lines += ["# HELP flame_workers Workers there are, or have been promised room.", "# TYPE flame_workers gauge"]
    lines += [f"flame_workers {controller.used}"]
    lines += ["# HELP flame_requests_total Requests answered, by status.", "# TYPE flame_requests_total counter"]
    lines += [
        f'flame_requests_total{{status="{status}"}} {count}' for status, count in sorted(call.api.requests.items())
    ]
    return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")


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
