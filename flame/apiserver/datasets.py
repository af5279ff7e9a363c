"""Datasets: data registered by URL and realm."""

from __future__ import annotations

from flame.apiserver.paging import Page, PageQuery, page
from flame.apiserver.routes import Access, Call, NewQuery, NoQuery, Route
from flame.spec.nouns import Dataset
from flame.spec.records import DatasetRecord


async def create(call: Call[Dataset, NewQuery]) -> DatasetRecord:
    """Register a dataset."""
    return await call.api.controller.catalog.create_dataset(call.body, project=call.project, owner=call.principal.name)


async def find(call: Call[None, PageQuery]) -> Page[DatasetRecord]:
    """List datasets."""
    return await page(call.api.controller.catalog.datasets, call.query, lambda record: record.id, call.sees)


async def get(call: Call[None, NoQuery]) -> DatasetRecord:
    """Give a dataset."""
    return await call.api.controller.catalog.dataset(call.path("id"))


async def update(call: Call[Dataset, NoQuery]) -> DatasetRecord:
    """Change a dataset."""
    return await call.api.controller.catalog.update_dataset(call.path("id"), call.body)


async def delete(call: Call[None, NoQuery]) -> None:
    """Remove a dataset."""
    await call.api.controller.catalog.delete_dataset(call.path("id"))


_ONE = "/v1/datasets/{id}"

ROUTES = [
    Route(
        method="POST",
        path="/v1/datasets",
        handler=create,
        summary="Register a dataset. The same one registered again keeps its id.",
        access=Access.OFFER,
        query=NewQuery,
        body=Dataset,
        answer=DatasetRecord,
        status=201,
        refusals=(409,),
    ),
    Route(
        method="GET",
        path="/v1/datasets",
        handler=find,
        summary="List datasets.",
        access=Access.SHARED,
        query=PageQuery,
        answer=Page[DatasetRecord],
    ),
    Route(
        method="GET",
        path=_ONE,
        handler=get,
        summary="Read a dataset.",
        access=Access.SHARED,
        answer=DatasetRecord,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path=_ONE,
        handler=update,
        summary="Change a dataset; jobs that exist go on with what it was.",
        access=Access.OWNER,
        body=Dataset,
        answer=DatasetRecord,
        refusals=(404,),
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete,
        summary="Remove a dataset that no unfinished job uses.",
        access=Access.OWNER,
        status=204,
        refusals=(404, 409),
    ),
]
