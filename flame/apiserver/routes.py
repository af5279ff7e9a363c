"""What a route is. The table of all routes makes the application, its OpenAPI document, and the page to read it.

A route says who may call it, what it takes and what it answers; its handler gets all of that checked and typed. So nothing is
said twice, and nothing can be forgotten: a route without a permission cannot be written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import msgspec

from flame.apiserver.permissions import Access, may_see, scope_of
from flame.errors import SpecError
from flame.spec.people import DEFAULT_PROJECT, NOBODY, Plain, Principal

if TYPE_CHECKING:
    from aiohttp import web

    from flame.apiserver.app import Api
    from flame.controller.context import StoredInvite
    from flame.controller.shelf import Saved
    from flame.controller.standing import Stay

__all__ = ["Access", "Call", "Handler", "NewQuery", "NoQuery", "Ordinal", "Query", "Route"]

B = TypeVar("B")
Q_co = TypeVar("Q_co", bound="Query", covariant=True)

#: The number of an event, of a round, or of a task of a session, as a caller gives it. It goes into a database's query,
#: and a larger integer than a database has (64 bits) would fail there, so it is refused here. The bound is lower: up to
#: it a reader of JSON that knows but floats, such as a browser, has every integer exactly, and no count gets that far.
Ordinal = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class Query(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of the parameters behind the question mark. Unknown ones are refused."""


class NewQuery(Query, frozen=True, kw_only=True):
    """Of what makes a thing: the project it belongs to; without it the first one of who asks."""

    project: Plain | None = None


class NoQuery(Query, frozen=True, kw_only=True):
    """No parameters."""


@dataclass(slots=True)
class Call(Generic[B, Q_co]):
    """A request that was let in and read.

    :ivar api: the server's parts.
    :ivar request: the request itself, for handlers that read or write streams.
    :ivar body: what was sent, decoded to the route's type.
    :ivar query: the parameters.
    :ivar stay: what a stream is written within: it is interrupted when the caller's right ends.
    :ivar principal: who asks; on a route for workers or for anyone nobody in particular.
    :ivar invite: the invite that the caller came with, on a route for those.
    """

    api: Api
    request: web.Request
    body: B
    query: Q_co
    stay: Stay
    principal: Principal = NOBODY
    invite: Saved[StoredInvite] | None = None

    def path(self, name: str) -> str:
        """A part of the path, such as the job's ``id``."""
        return self.request.match_info[name]

    def sees(self, thing: Any) -> bool:
        """Whether who asks may see a record that says its ``project`` and ``owner``; for lists."""
        return may_see(self.principal, scope_of(thing))

    @property
    def project(self) -> str:
        """The project of what this request makes (its query is a :class:`NewQuery`).

        :raises flame.errors.SpecError: there is no such project, or it is not one of who asks.
        """
        given: str | None = getattr(self.query, "project", None)
        mine = self.principal.projects
        if given is None:
            return mine[0] if mine else DEFAULT_PROJECT
        known = self.api.controller.accounts.has_project(given)
        if not known or not (self.principal.admin or given in mine):
            raise SpecError(f"there is no project {given!r} for {self.principal.name!r}.", "project")
        return given


Handler = Callable[[Call[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One row of the table.

    :ivar handler: what answers; gives an object of the ``answer`` type, or a response of its own making.
    :ivar summary: one line for the document.
    :ivar access: who may call. There is no default: each route says it.
    :ivar body: the type of the JSON that is sent; ``bytes`` for a body that the handler reads itself; None for none.
    :ivar answer: the type of the JSON that is answered; ``bytes`` for others; None for an empty answer (204).
    :ivar content: the content type of an answer that is no JSON.
    :ivar query: the parameters.
    :ivar status: the status of success.
    :ivar stream: the handler may run for long and is ended when the caller goes; others are always run to their end.
    :ivar limit: the most bytes of a JSON body.
    :ivar refusals: statuses with which the route may refuse, beside those of every route.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    access: Access
    body: Any = None
    answer: Any = None
    content: str = "application/json"
    query: type[Query] = NoQuery
    status: int = 200
    stream: bool = False
    limit: int = 1 << 20
    refusals: tuple[int, ...] = field(default=())

    @property
    def tag(self) -> str:
        """The resource that it belongs to, such as ``jobs``."""
        parts = self.path.strip("/").split("/")
        return parts[1] if parts[0] == "v1" else "server"

    @property
    def names_one(self) -> str | None:
        """The parameter of the path that says which one of the resource it is about, such as ``id``; None for no one."""
        parts = self.path.strip("/").split("/")
        one = len(parts) > 2 and parts[0] == "v1" and parts[2].startswith("{")
        return parts[2].strip("{}") if one else None
