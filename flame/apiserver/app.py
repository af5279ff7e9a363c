"""The application: the table of routes, and the one way that every request takes through it.

In order: who asks, what for, the parameters, the body, the handler, the answer; and whatever is raised on the way becomes an
answer with the status of its class. What nobody has foreseen is logged with an id, and the caller gets the id alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from flame.apiserver import (
    answers,
    bundles,
    computes,
    datasets,
    designs,
    jobs,
    participants,
    people,
    server,
    sessions,
    tasks,
    workers,
)
from flame.apiserver.access import Guard, bearer
from flame.apiserver.audit import Audit
from flame.apiserver.permissions import Access, check_role, check_scope
from flame.apiserver.routes import Call, Route
from flame.apiserver.scopes import SCOPES
from flame.apiserver.server import Attachments
from flame.apiserver.workers import AttemptQuery
from flame.controller.controller import Controller
from flame.controller.participants import named
from flame.controller.standing import Right, Stay
from flame.errors import FlameError, NotFound, ServerError, Unauthorized, UsageError
from flame.sessions.manager import Manager
from flame.spec.nesting import check_nesting
from flame.spec.people import Principal, UserRole
from flame.spec.shape import shape

log = logging.getLogger("flame.apiserver")

#: The most bytes that aiohttp itself reads of a body; each route has its own, smaller limit.
MAX_BODY = 16 << 20
#: Seconds in which a JSON body must have come.
PATIENCE = 60.0

ROUTES: tuple[Route, ...] = (
    *server.ROUTES,
    *people.ROUTES,
    *bundles.ROUTES,
    *designs.ROUTES,
    *datasets.ROUTES,
    *computes.ROUTES,
    *jobs.ROUTES,
    *tasks.ROUTES,
    *workers.ROUTES,
    *participants.ROUTES,
    *sessions.ROUTES,
)

Endpoint = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """What handlers work with.

    :param controller: the jobs.
    :param guard: who may call.
    :param id: the server's id.
    :param audit: where it is written who did what.
    :param manager: the elastic sessions.
    """

    def __init__(
        self, controller: Controller, guard: Guard, id: str, audit: Audit | None = None, manager: Manager | None = None
    ) -> None:
        self.controller = controller
        self.sessions = manager or Manager(controller)
        self.guard = guard
        self.id = id
        self.audit = audit or Audit(None)
        self.attachments = Attachments()
        self.requests: Counter[int] = Counter()
        #: Told of the connection of each request.
        self.heard: Callable[[Any], None] = lambda _: None
        self._documents: dict[bool, dict[str, Any]] = {}

    @property
    def document(self) -> dict[str, Any]:
        """The OpenAPI document; made when somebody asks for it. It says whether users need a token here."""
        trusting = self.guard.trusting
        if trusting not in self._documents:
            from flame.apiserver.openapi import describe

            self._documents[trusting] = describe(ROUTES, trusting=trusting)
        return self._documents[trusting]

    def application(self) -> web.Application:
        """The application for aiohttp's runner."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._unrouted])
        for route in ROUTES:
            app.router.add_route(route.method, route.path, self._endpoint(route))
        return app

    def _endpoint(self, route: Route) -> Endpoint:
        read = _reader(route)
        ask = _asker(route)
        permit = self._permitter(route)

        async def serve(request: web.Request, asking: list[Principal], stay: Stay) -> web.StreamResponse:
            principal = await self.guard.admit(request, route.access)
            if route.stream:
                stay.under(*_rights(request, route.access, principal), until=principal.until)
            invite = None
            if route.access is Access.INVITED:
                invite = await self.controller.participants.open(bearer(request))
                principal = Principal(f"invite {invite.id}", UserRole.PARTICIPANT, ())
            asking.append(principal)
            await permit(request, principal)
            query = ask(request)
            if isinstance(query, AttemptQuery) and route.access is Access.WORKER:  # nothing of a stranger's is read
                self.controller.door.check_key(request.match_info["id"], query.attempt, bearer(request))
            body = await read(request) if read is not None else None
            result = await route.handler(Call(self, request, body, query, stay, principal, invite))
            if isinstance(result, web.StreamResponse):
                return result
            return answers.answer(result, route.status)

        async def endpoint(request: web.Request) -> web.StreamResponse:
            asking: list[Principal] = []  # who it is, once that is known
            reason = ""
            try:
                with self.controller.context.standing.stay() as stay:
                    if route.stream:
                        response = await serve(request, asking, stay)
                    else:  # begun is done, even if the caller hangs up in the middle
                        response = await asyncio.shield(_observed(serve(request, asking, stay)))
            except FlameError as error:
                if isinstance(error, Unauthorized):
                    error = self.guard.refused(request, error)
                reason = error.message
                response = self._refuse(request, error)
            except ConnectionError as error:
                response = answers.refusal(UsageError(f"The request broke off: {error}."))
            except web.HTTPException:
                raise
            except Exception:
                number = secrets.token_hex(4)
                log.exception("request %s %s failed; its number is %s", request.method, request.path, number)
                fault = ServerError(f"The server made a mistake. Its log says more about fault {number}.")
                response = answers.refusal(fault, 500)
            self.requests[response.status] += 1
            who = asking[0] if asking else None
            self.audit.note(route, who, request, response.status, reason)
            return response

        return endpoint

    def _permitter(self, route: Route) -> Callable[[web.Request, Principal], Awaitable[None]]:
        """What refuses those who may not call a route, or not about this thing."""
        tag, one = route.tag, route.names_one
        guarded = route.access not in (Access.OPEN, Access.WORKER, Access.INVITED)
        if guarded and one is not None and tag not in SCOPES:
            raise LookupError(f"{route.method} {route.path}: say in flame/apiserver/scopes.py to whom {tag} belong.")
        find = SCOPES[tag] if guarded and one is not None else None

        async def permit(request: web.Request, principal: Principal) -> None:
            if not guarded or principal.admin:
                return
            check_role(principal, route.access)
            if find is not None and one is not None:
                name = request.match_info[one]
                what = f"{tag.removesuffix('s')} {name!r}"
                scope = await find(self.controller, name, principal)
                if scope is None:
                    raise NotFound(f"There is no {what}.")
                check_scope(principal, route.access, scope, what)

        return permit

    def _refuse(self, request: web.Request, error: FlameError) -> web.StreamResponse:
        if error.status >= 500:
            log.error("request %s %s failed: %s", request.method, request.path, error)
        else:
            log.debug("request %s %s refused: %s", request.method, request.path, error)
        return answers.refusal(error)

    @web.middleware
    async def _unrouted(self, request: web.Request, handler: Endpoint) -> web.StreamResponse:
        """What aiohttp itself refuses is answered in the same form."""
        self.heard(request.protocol)
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            self.requests[error.status] += 1
            refused: FlameError
            if error.status == 404:
                refused = NotFound(f"There is nothing at {request.path}; /docs shows what there is.")
            elif error.status == 405:
                refused = UsageError(f"{request.path} takes no {request.method}; /docs shows what it takes.")
            elif error.status == 413:
                refused = UsageError(f"The body is larger than the {MAX_BODY} bytes that are allowed.")
            else:
                refused = UsageError(f"The request is refused: {error.reason}.")
            response = answers.refusal(refused, error.status)
            if allow := error.headers.get("Allow"):
                response.headers["Allow"] = allow
            return response


def _reader(route: Route) -> Callable[[web.Request], Awaitable[Any]] | None:
    """What reads the body of a route's requests; None where there is none, or the handler does it."""
    if route.body is None or route.body is bytes:
        return None
    decoder = msgspec.json.Decoder(route.body)

    async def read(request: web.Request) -> Any:
        if request.content_type != "application/json":
            raise UsageError(f"The body must be JSON (Content-Type: application/json), not {request.content_type}.")
        data = await _body(request, route.limit)
        check_nesting(data)
        try:
            try:
                return decoder.decode(data)
            except msgspec.ValidationError:
                return shape(msgspec.json.decode(data), route.body)  # says in plain words what does not fit
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"The body cannot be read as JSON: {error}.") from error

    return read


async def _body(request: web.Request, limit: int) -> bytes:
    """A body that is no larger than it may be, and does not take forever to come."""
    if (request.content_length or 0) <= limit:
        data = bytearray()
        try:
            async with asyncio.timeout(PATIENCE):
                async for piece in request.content.iter_any():
                    data += piece
                    if len(data) > limit:
                        break
        except TimeoutError:
            raise UsageError(f"The body did not come within {PATIENCE:g} s.") from None
        if len(data) <= limit:
            return bytes(data)
    raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=request.content_length or limit + 1)


def _asker(route: Route) -> Callable[[web.Request], Any]:
    """What reads the parameters of a route's requests."""

    def ask(request: web.Request) -> Any:
        given = request.query
        if len(set(given)) != len(given):
            raise UsageError("A parameter stands twice in the address; give it once.")
        try:
            return msgspec.convert(dict(given), route.query, strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(f"The parameters of {route.method} {route.path} are wrong: {error}.") from error

    return ask


def _rights(request: web.Request, access: Access, principal: Principal) -> list[Right]:
    """By which rights a request is made, be they good or not: that is looked at next."""
    if access is Access.OPEN:
        return []
    if access is Access.INVITED:
        return [("invite", named(bearer(request)) or "")]
    if access is Access.WORKER:
        attempt = request.query.get("attempt", "")
        return [("task", request.match_info["id"], int(attempt))] if attempt.isdecimal() else []
    return [("user", principal.name), *([("token", principal.token)] if principal.token else [])]


def _observed(work: Awaitable[web.StreamResponse]) -> asyncio.Future[web.StreamResponse]:
    """Work whose failure is seen even when nobody waits for it any more."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(_look)
    return future


def _look(future: asyncio.Future[web.StreamResponse]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None and not isinstance(error, FlameError):
        log.debug("a request whose caller has gone failed: %r", error)
