"""Lists: a page of items, and where the next one begins."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Generic, TypeVar

import msgspec

from flame.apiserver.routes import Query
from flame.spec.records import Record

T = TypeVar("T")

Limit = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class PageQuery(Query, frozen=True, kw_only=True):
    """Which part of a list: at most ``limit`` items, behind the one with the id ``after``."""

    after: str | None = None
    limit: Limit = 100


class Page(Record, Generic[T], kw_only=True):
    """A part of a list. ``next`` is the ``after`` of the following part; null at the end."""

    items: list[T]
    next: str | None = None


async def page(
    read: Callable[[str | None, int], Awaitable[Sequence[T]]],
    query: PageQuery,
    id_of: Callable[[T], str],
    shown: Callable[[T], bool] = lambda _: True,
) -> Page[T]:
    """Read one item more than is wanted: whether it is there says whether there is a next page.

    :param shown: which items who asks may see (:meth:`flame.apiserver.routes.Call.sees`).
    """
    found: list[T] = []
    after = query.after
    while len(found) <= query.limit:
        more = await read(after, query.limit + 1)
        found += filter(shown, more)
        if len(more) <= query.limit:
            break
        after = id_of(more[-1])
    found = found[: query.limit + 1]
    items = found[: query.limit]
    return Page(items=items, next=id_of(items[-1]) if len(found) > len(items) else None)
