"""Elastic sessions: many short tasks on warm executors.

>>> import flame.sessions
>>> async with flame.sessions.open(square, max_instances=2) as session:
...     print(await session.invoke(12))
...     print([result async for result in session.map(range(1000))])

What is named in ``__all__`` is what may be relied on.
"""

from __future__ import annotations

from typing import Any

# Each name is imported when it is first used: executors and the server import modules of this package, and none of these.
_HOMES = {
    "Actor": "flame.sessions.actors",
    "ActorLost": "flame.errors",
    "Connection": "flame.sessions.client",
    "Future": "flame.sessions.client",
    "Reference": "flame.sessions.payload",
    "Session": "flame.sessions.client",
    "SessionContext": "flame.sessions.application",
    "Task": "flame.sessions.application",
    "TaskCancelled": "flame.errors",
    "TaskFailed": "flame.errors",
    "actor": "flame.sessions.actors",
    "connect": "flame.sessions.client",
    "open": "flame.sessions.client",
    "sync": "flame.sessions",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - each is imported by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "sync":
        return importlib.import_module("flame.sessions.sync")
    return getattr(importlib.import_module(_HOMES[name]), name)
