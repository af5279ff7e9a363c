"""Computes: the places that run workers. Everyone may see which there are; admins say which."""

from __future__ import annotations

from flame.apiserver.paging import Page, PageQuery, page
from flame.apiserver.routes import Access, Call, NoQuery, Route
from flame.spec.nouns import Compute
from flame.spec.records import ComputeStatus


async def create(call: Call[Compute, NoQuery]) -> ComputeStatus:
    """Register a compute."""
    return await call.api.controller.register.create(call.body)


async def find(call: Call[None, PageQuery]) -> Page[ComputeStatus]:
    """List computes."""

    async def read(after: str | None, limit: int) -> list[ComputeStatus]:
        return call.api.controller.register.all(after, limit)

    return await page(read, call.query, lambda record: record.id)


async def get(call: Call[None, NoQuery]) -> ComputeStatus:
    """Give a compute."""
    return call.api.controller.register.get(call.path("id"))


async def update(call: Call[Compute, NoQuery]) -> ComputeStatus:
    """Change a compute."""
    return await call.api.controller.register.update(call.path("id"), call.body)


async def drain(call: Call[None, NoQuery]) -> ComputeStatus:
    """Give a compute no new workers."""
    return await call.api.controller.register.drain(call.path("id"))


async def undrain(call: Call[None, NoQuery]) -> ComputeStatus:
    """Give a compute new workers again."""
    return await call.api.controller.register.drain(call.path("id"), drained=False)


async def delete(call: Call[None, NoQuery]) -> None:
    """Remove a compute."""
    await call.api.controller.register.delete(call.path("id"))


_ONE = "/v1/computes/{id}"

ROUTES = [
    Route(
        method="POST",
        path="/v1/computes",
        handler=create,
        summary="Register a compute. One that cannot be reached is kept, says why, and is tried again.",
        access=Access.ADMIN,
        body=Compute,
        answer=ComputeStatus,
        status=201,
        refusals=(409,),
    ),
    Route(
        method="GET",
        path="/v1/computes",
        handler=find,
        summary="List computes. Secrets in their configurations are `***`.",
        access=Access.READ,
        query=PageQuery,
        answer=Page[ComputeStatus],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get,
        summary="Read a compute: whether it can be reached, what it has and what of it is taken.",
        access=Access.READ,
        answer=ComputeStatus,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=update,
        summary="Change a compute. Secrets that are sent as `***` stay; kind and configuration change while it has no workers.",
        access=Access.ADMIN,
        body=Compute,
        answer=ComputeStatus,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/drain",
        handler=drain,
        summary="Give a compute no new workers; those that are there go on.",
        access=Access.ADMIN,
        answer=ComputeStatus,
        refusals=(404,),
    ),
    Route(
        method="POST",
        path=f"{_ONE}/undrain",
        handler=undrain,
        summary="Give a compute new workers again.",
        access=Access.ADMIN,
        answer=ComputeStatus,
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a compute that has no workers.",
        access=Access.ADMIN,
        status=204,
        refusals=(404, 409),
    ),
]
