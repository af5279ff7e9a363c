"""Designs, with their schema and code."""

from __future__ import annotations

from functools import partial

from flame.apiserver.paging import Page, PageQuery, page
from flame.apiserver.routes import Access, Call, NewQuery, NoQuery, Route
from flame.errors import NotFound
from flame.spec.nouns import Form, Name, Schema
from flame.spec.records import Design, Record


class DesignForm(Form, frozen=True, kw_only=True):
    """What a user says of a design."""

    name: Name
    description: str = ""


class Code(Record, kw_only=True):
    """The SHA-256 of the bundle that holds a design's code."""

    code: str


class DesignQuery(PageQuery, frozen=True, kw_only=True):
    """Part of the list, or the one of a name."""

    name: str | None = None


async def create(call: Call[DesignForm, NewQuery]) -> Design:
    """Register a design."""
    return await call.api.controller.catalog.create_design(
        call.body.name, call.body.description, project=call.project, owner=call.principal.name
    )


async def find(call: Call[None, DesignQuery]) -> Page[Design]:
    """List designs."""
    read = partial(call.api.controller.catalog.designs, call.query.name)
    return await page(read, call.query, lambda design: design.id, call.sees)


async def get(call: Call[None, NoQuery]) -> Design:
    """Give a design."""
    return await call.api.controller.catalog.design(call.path("id"))


async def update(call: Call[DesignForm, NoQuery]) -> Design:
    """Change a design's name and description."""
    return await call.api.controller.catalog.update_design(call.path("id"), call.body.name, call.body.description)


async def delete(call: Call[None, NoQuery]) -> None:
    """Remove a design."""
    await call.api.controller.catalog.delete_design(call.path("id"))


async def get_schema(call: Call[None, NoQuery]) -> Schema:
    """Give a design's schema."""
    design = await get(call)
    if design.schema is None:
        raise NotFound(f"Design {design.name!r} has no schema yet.")
    return design.schema


async def put_schema(call: Call[Schema, NoQuery]) -> Schema | None:
    """Give a design a schema."""
    return (await call.api.controller.catalog.set_schema(call.path("id"), call.body)).schema


async def delete_schema(call: Call[None, NoQuery]) -> None:
    """Take a design's schema away."""
    await call.api.controller.catalog.set_schema(call.path("id"), None)


async def get_code(call: Call[None, NoQuery]) -> Code:
    """Give the digest of a design's code."""
    design = await get(call)
    if design.code is None:
        raise NotFound(f"Design {design.name!r} has no code yet.")
    return Code(code=design.code)


async def put_code(call: Call[Code, NoQuery]) -> Code:
    """Give a design its code, an uploaded bundle."""
    await call.api.controller.catalog.set_code(call.path("id"), call.body.code)
    return call.body


async def delete_code(call: Call[None, NoQuery]) -> None:
    """Take a design's code away."""
    await call.api.controller.catalog.set_code(call.path("id"), None)


_ONE = "/v1/designs/{id}"

ROUTES = [
    Route(
        method="POST",
        path="/v1/designs",
        handler=create,
        summary="Register a design; its schema and code follow.",
        access=Access.WRITE,
        query=NewQuery,
        body=DesignForm,
        answer=Design,
        status=201,
        refusals=(409,),
    ),
    Route(
        method="GET",
        path="/v1/designs",
        handler=find,
        summary="List designs.",
        access=Access.READ,
        query=DesignQuery,
        answer=Page[Design],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get,
        summary="Read a design.",
        access=Access.READ,
        answer=Design,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=update,
        summary="Change a design's name and description.",
        access=Access.WRITE,
        body=DesignForm,
        answer=Design,
        refusals=(404, 409),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a design that no unfinished job uses.",
        access=Access.WRITE,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/schema",
        handler=get_schema,
        summary="Read a design's schema.",
        access=Access.READ,
        answer=Schema,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/schema",
        handler=put_schema,
        summary="Give a design its schema, or another one.",
        access=Access.WRITE,
        body=Schema,
        answer=Schema,
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path=f"{_ONE}/schema",
        handler=delete_schema,
        summary="Take a design's schema away.",
        access=Access.WRITE,
        status=204,
        refusals=(404,),
    ),
    Route(
        method="GET",
        path=f"{_ONE}/code",
        handler=get_code,
        summary="Read the digest of a design's code.",
        access=Access.READ,
        answer=Code,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=f"{_ONE}/code",
        handler=put_code,
        summary="Give a design its code: the digest of an uploaded bundle.",
        access=Access.WRITE,
        body=Code,
        answer=Code,
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path=f"{_ONE}/code",
        handler=delete_code,
        summary="Take a design's code away.",
        access=Access.WRITE,
        status=204,
        refusals=(404,),
    ),
]
