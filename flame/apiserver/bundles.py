"""Code bundles: zip files by their digest."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from flame.apiserver.routes import Access, Call, NoQuery, Route
from flame.errors import NotFound, SpecError
from flame.spec.bundle import MAX_PACKED


async def put(call: Call[Any, NoQuery]) -> None:
    """Keep an uploaded bundle."""
    digest = call.path("sha256")
    data = bytearray()
    async for piece in call.request.content.iter_any():
        data += piece
        if len(data) > MAX_PACKED:
            raise SpecError(f"the bundle is larger than the {MAX_PACKED >> 20} MiB that are allowed.")
    if not data:
        raise SpecError("the request has no body; send the bytes of a zip file.")
    await call.api.controller.catalog.put_bundle(digest, bytes(data))


async def get(call: Call[None, NoQuery]) -> web.Response:
    """Give a bundle's bytes, to whoever sees a design or a job that has it."""
    if not call.principal.admin:
        digest, context = call.path("sha256"), call.api.controller.context
        designs, jobs = await context.designs.all({"code": digest}), await context.jobs.all({"code": digest})
        having = [*(saved.record for saved in designs), *(saved.record for saved in jobs)]
        if not any(map(call.sees, having)):
            raise NotFound(f"There is no code bundle {digest}; upload it first.")
    data = await call.api.controller.catalog.bundle(call.path("sha256"))
    return web.Response(body=data, content_type="application/zip")


ROUTES = [
    Route(
        method="PUT",
        path="/v1/bundles/{sha256}",
        handler=put,
        summary="Upload the code of a design's roles: a zip with one folder a role. Its digest is checked.",
        access=Access.WRITE,
        body=bytes,
        status=204,
        refusals=(422,),
    ),
    Route(
        method="HEAD",
        path="/v1/bundles/{sha256}",
        handler=get,
        summary="Ask whether a bundle is there.",
        access=Access.READ,
        content="application/zip",
        answer=bytes,
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/v1/bundles/{sha256}",
        handler=get,
        summary="Download a bundle.",
        access=Access.READ,
        content="application/zip",
        answer=bytes,
        refusals=(404,),
    ),
]
