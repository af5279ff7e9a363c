"""Users, tokens, projects, and the log of who did what."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec

from flame.apiserver.audit import Deed
from flame.apiserver.paging import Page
from flame.apiserver.routes import Access, Call, NoQuery, Query, Route
from flame.errors import Conflict
from flame.spec.people import (
    Known,
    NewToken,
    NewUser,
    Project,
    ProjectForm,
    Token,
    TokenForm,
    User,
    UserChange,
    UserForm,
)


class AuditQuery(Query, frozen=True, kw_only=True):
    """How many lines, and which."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    who: str | None = None
    refused: bool = False


class RevokeQuery(Query, frozen=True, kw_only=True):
    """``descendants``: also the tokens that were made with it, and with those."""

    descendants: bool = False


async def whoami(call: Call[None, NoQuery]) -> Known:
    """Say who the server takes the caller for."""
    who = call.principal
    return Known(name=who.name, role=who.role, projects=list(who.projects))


async def create_user(call: Call[UserForm, NoQuery]) -> NewUser:
    """Make a user."""
    return await call.api.controller.accounts.create_user(call.body, call.principal)


async def find_users(call: Call[None, NoQuery]) -> Page[User]:
    """List users."""
    return Page(items=call.api.controller.accounts.users())


async def get_user(call: Call[None, NoQuery]) -> User:
    """Give a user."""
    return call.api.controller.accounts.user(call.path("name"))


async def update_user(call: Call[UserChange, NoQuery]) -> User:
    """Change a user."""
    return await call.api.controller.accounts.update_user(call.path("name"), call.body)


async def delete_user(call: Call[None, NoQuery]) -> None:
    """Remove a user."""
    await call.api.controller.accounts.delete_user(call.path("name"))


async def create_token(call: Call[TokenForm, NoQuery]) -> NewToken:
    """Make a token."""
    return await call.api.controller.accounts.create_token(call.body, call.principal)


async def find_tokens(call: Call[None, NoQuery]) -> Page[Token]:
    """List tokens."""
    return Page(items=call.api.controller.accounts.tokens(call.principal))


async def revoke(call: Call[None, RevokeQuery]) -> None:
    """Revoke a token."""
    accounts = call.api.controller.accounts
    await accounts.revoke(call.path("id"), call.principal, descendants=call.query.descendants)


async def create_project(call: Call[ProjectForm, NoQuery]) -> Project:
    """Make a project."""
    return await call.api.controller.accounts.create_project(call.body)


async def find_projects(call: Call[None, NoQuery]) -> Page[Project]:
    """List projects."""
    return Page(items=call.api.controller.accounts.projects(call.principal))


async def delete_project(call: Call[None, NoQuery]) -> None:
    """Remove a project."""
    name = call.path("name")
    if within := await call.api.controller.things_of(name):
        raise Conflict(f"Project {name!r} has {within}; remove them first.")
    await call.api.controller.accounts.delete_project(name)


async def audit(call: Call[None, AuditQuery]) -> Page[Deed]:
    """Give the last lines of the log."""
    query = call.query
    return Page(items=await asyncio.to_thread(call.api.audit.last, query.limit, query.who, refused=query.refused))


ROUTES = [
    Route(
        method="GET",
        path="/v1/whoami",
        handler=whoami,
        summary="Ask whom the server takes you for.",
        access=Access.SIGNED_IN,
        answer=Known,
    ),
    Route(
        method="POST",
        path="/v1/users",
        handler=create_user,
        summary="Make a user and their first token, which is shown this once. The first user must be an admin.",
        access=Access.ADMIN,
        body=UserForm,
        answer=NewUser,
        status=201,
        refusals=(409,),
    ),
    Route(
        method="GET",
        path="/v1/users",
        handler=find_users,
        summary="List users.",
        access=Access.ADMIN,
        answer=Page[User],
    ),
    Route(
        method="GET",
        path="/v1/users/{name}",
        handler=get_user,
        summary="Read a user.",
        access=Access.ADMIN,
        answer=User,
        refusals=(404,),
    ),
    Route(
        method="PUT",
        path="/v1/users/{name}",
        handler=update_user,
        summary="Give a user another role or other projects; what is left out stays.",
        access=Access.ADMIN,
        body=UserChange,
        answer=User,
        refusals=(404, 409),
    ),
    Route(
        method="DELETE",
        path="/v1/users/{name}",
        handler=delete_user,
        summary="Remove a user with all their tokens. What they own stays. The last admin cannot go.",
        access=Access.ADMIN,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path="/v1/tokens",
        handler=create_token,
        summary="Make a token, which is shown this once; an admin may make one for another user.",
        access=Access.SIGNED_IN,
        body=TokenForm,
        answer=NewToken,
        status=201,
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/v1/tokens",
        handler=find_tokens,
        summary="List your tokens; an admin sees all.",
        access=Access.SIGNED_IN,
        answer=Page[Token],
    ),
    Route(
        method="DELETE",
        path="/v1/tokens/{id}",
        handler=revoke,
        summary="Revoke one of your tokens; an admin may revoke any. With descendants, also what was made with it.",
        query=RevokeQuery,
        access=Access.SIGNED_IN,
        status=204,
        refusals=(404,),
    ),
    Route(
        method="POST",
        path="/v1/projects",
        handler=create_project,
        summary="Make a project.",
        access=Access.ADMIN,
        body=ProjectForm,
        answer=Project,
        status=201,
        refusals=(409,),
    ),
    Route(
        method="GET",
        path="/v1/projects",
        handler=find_projects,
        summary="List your projects; an admin sees all.",
        access=Access.SIGNED_IN,
        answer=Page[Project],
    ),
    Route(
        method="DELETE",
        path="/v1/projects/{name}",
        handler=delete_project,
        summary="Remove a project that has neither users nor things.",
        access=Access.ADMIN,
        status=204,
        refusals=(404, 409),
    ),
    Route(
        method="GET",
        path="/v1/audit",
        handler=audit,
        summary="Read who did what: changes and refusals, the newest last.",
        access=Access.ADMIN,
        query=AuditQuery,
        answer=Page[Deed],
    ),
]
