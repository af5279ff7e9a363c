"""The OpenAPI document, made from the table of routes and the types in it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec

import flame
from flame.apiserver.answers import ErrorAnswer
from flame.apiserver.routes import Access, NewQuery, NoQuery, Route

_TEXTS = {
    400: "The request is malformed.",
    401: "A token is needed, or this is the wrong one.",
    403: "This may not be done; also: the attempt is over.",
    404: "There is no such thing.",
    409: "The state does not allow it.",
    413: "The body is too large.",
    422: "The request has the right form, and something in it cannot be; the sentence says what.",
    429: "Too many wrong tokens came from this address; Retry-After says for how long to wait.",
    500: "The server has failed.",
    503: "The identity provider does not answer, so a token of it cannot be checked; or this server is about to end.",
}


def describe(routes: Iterable[Route], *, trusting: bool = False) -> dict[str, Any]:
    """The document (OpenAPI 3.1) of a table of routes.

    :param trusting: nobody has to say who they are.
    """
    routes = list(routes)
    types = [t for route in routes for t in (route.body, route.answer) if t not in (None, bytes)]
    queries = [route.query for route in routes if route.query is not NoQuery]
    every = [*types, ErrorAnswer, *queries]
    schemas, components = msgspec.json.schema_components(every, ref_template="#/components/schemas/{name}")
    shown = dict(zip((repr(t) for t in every), schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, shown, components, trusting)
    for query in queries:
        components.pop(query.__name__, None)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Flame",
            "version": flame.__version__,
            "description": "The REST API of Flame's control plane. Streams are lines of JSON; an empty line every 10 s "
            "says that the connection lives. Errors are answered with a status and a sentence.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "user": {"type": "http", "scheme": "bearer", "description": "A user's token, where there are users."},
                "worker": {"type": "http", "scheme": "bearer", "description": "The key of one attempt of one task."},
                "invite": {"type": "http", "scheme": "bearer", "description": "The token of an invite to a job."},
            },
        },
    }


def _operation(route: Route, shown: dict[str, Any], components: dict[str, Any], trusting: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.path.lower()).strip('_')}",
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": _parameters(route, components),
        "responses": _responses(route, shown),
    }
    if route.access is Access.WORKER:
        operation["security"] = [{"worker": []}]
    elif route.access is Access.INVITED:
        operation["security"] = [{"invite": []}]
    elif route.access is Access.OPEN:
        operation["security"] = []
    else:
        operation["security"] = [{"user": []}, {}] if trusting else [{"user": []}]
        operation["description"] = f"For {route.access.value}."
    if route.body is bytes:
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        operation["requestBody"] = {"required": True, "content": content}
    elif route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": shown[repr(route.body)]}},
        }
    return operation


def _parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.query is not NoQuery:
        schema = components[route.query.__name__]
        required = schema.get("required", [])
        found += [
            {"name": name, "in": "query", "required": name in required, "schema": kind}
            for name, kind in schema["properties"].items()
        ]
    return found


def _responses(route: Route, shown: dict[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": inspect.cleandoc(route.handler.__doc__ or route.summary)}
    if route.answer is not None and route.method != "HEAD":
        kind = {"type": "string", "format": "binary"} if route.answer is bytes else shown[repr(route.answer)]
        success["content"] = {route.content: {"schema": kind}}
    statuses = {400, 403, 500, *route.refusals}
    if route.access is not Access.OPEN:
        statuses |= {401, 429}
    if route.access not in (Access.OPEN, Access.WORKER):
        statuses.add(503)
    if route.query is NewQuery:
        statuses.add(422)
    if route.body is not None:
        statuses |= {422} if route.body is bytes else {413, 422}
    responses = {str(route.status): success}
    for status in sorted(statuses):
        responses[str(status)] = {"description": _TEXTS[status]}
        if route.method != "HEAD":
            responses[str(status)]["content"] = {"application/json": {"schema": shown[repr(ErrorAnswer)]}}
    return responses
