"""What a route is. The table of all routes makes the application, its OpenAPI document, and the page to read it.

A route says who may call it, what it takes and what it answers; its handler gets all of that checked and typed. So nothing is
said twice, and nothing can be forgotten: a route without a permission cannot be written.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from aiohttp import web

    from flame.apiserver.app import Api

B = TypeVar("B")
Q_co = TypeVar("Q_co", bound="Query", covariant=True)


class Access(enum.Enum):
    """Who may call a route."""

    OPEN = "anyone"
    USER = "users: with the server's token, where it has one"
    WORKER = "the task's own worker, with the task's key"


class Query(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of the parameters behind the question mark. Unknown ones are refused."""


class NoQuery(Query, frozen=True, kw_only=True):
    """No parameters."""


@dataclass(slots=True)
class Call(Generic[B, Q_co]):
    """A request that was let in and read.

    :ivar api: the server's parts.
    :ivar request: the request itself, for handlers that read or write streams.
    :ivar body: what was sent, decoded to the route's type.
    :ivar query: the parameters.
    """

    api: Api
    request: web.Request
    body: B
    query: Q_co

    def path(self, name: str) -> str:
        """A part of the path, such as the job's ``id``."""
        return self.request.match_info[name]


Handler = Callable[[Call[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One row of the table.

    :ivar handler: what answers; gives an object of the ``answer`` type, or a response of its own making.
    :ivar summary: one line for the document.
    :ivar body: the type of the JSON that is sent; ``bytes`` for a body that the handler reads itself; None for none.
    :ivar answer: the type of the JSON that is answered; ``bytes`` for others; None for an empty answer (204).
    :ivar content: the content type of an answer that is no JSON.
    :ivar query: the parameters.
    :ivar status: the status of success.
    :ivar stream: the handler may run for long and is ended when the caller goes; others are always run to their end.
    :ivar refusals: statuses with which the route may refuse, beside those of every route.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    access: Access = Access.USER
    body: Any = None
    answer: Any = None
    content: str = "application/json"
    query: type[Query] = NoQuery
    status: int = 200
    stream: bool = False
    refusals: tuple[int, ...] = field(default=())

    @property
    def tag(self) -> str:
        """The resource that it belongs to, such as ``jobs``."""
        parts = self.path.strip("/").split("/")
        return parts[1] if parts[0] == "v1" else "server"
