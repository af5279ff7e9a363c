"""An application in an executor: a class that is told when it is bound and unbound, or simply a function.

>>> class Squares:
...     def on_session_enter(self, ctx): self.offset = ctx.common_data
...     def on_task_invoke(self, ctx, task): return task.input ** 2 + self.offset
...     def on_session_leave(self): ...

All three are there or not as the class likes, but for ``on_task_invoke``. A function is called with the task's input alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flame.errors import SpecError
from flame.sessions.payload import Reference, loads


class SessionContext:
    """What an application knows of the session that it serves.

    :ivar session_id: the session.
    """

    __slots__ = ("_common", "_loaded", "_put", "session_id")

    def __init__(self, session_id: str, common: bytes | None, put: Callable[[Any], Reference]) -> None:
        self.session_id = session_id
        self._put = put
        self._common = common
        self._loaded: Any = None

    @property
    def common_data(self) -> Any:
        """What the session was opened with for all its tasks; decoded once."""
        if self._common is not None:
            self._loaded, self._common = loads(self._common), None
        return self._loaded

    def put(self, value: Any) -> Reference:
        """Keep a value once for the whole session, instead of sending it along; whoever gets the reference as input gets the value.

        :raises flame.errors.FlameError: something in it cannot travel, or the server cannot take it.
        """
        return self._put(value)


class Task:
    """A task as its application sees it.

    :ivar id: its number in the session, from 1.
    :ivar attempt: which try this is, from 1.
    :ivar input: what it was given.
    """

    __slots__ = ("attempt", "id", "input")

    def __init__(self, id: int, attempt: int, input: Any) -> None:
        self.id = id
        self.attempt = attempt
        self.input = input


def echo(value: Any) -> Any:
    """The application of ``flame ping``: answers with what it is given."""
    return value


def load(entry: str, arguments: Mapping[str, Any]) -> Application:
    """The application that an entry names.

    :raises flame.errors.SpecError: the module has no such thing, or it is no application.
    """
    return Application(find(entry), arguments)


def find(entry: str) -> Any:
    """What an entry names.

    :param entry: ``module:Name``.
    :raises flame.errors.SpecError: the module has no such thing.
    """
    module, _, path = entry.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise SpecError(f"The module {module!r} has no {path!r}.") from None
    return found


class Application:
    """A class or a function, behind one face."""

    def __init__(self, what: Any, arguments: Mapping[str, Any]) -> None:
        self._function: Callable[..., Any] | None = None
        self._arguments = arguments
        if inspect.isclass(what):
            self._instance = what(**arguments)
            invoke = getattr(self._instance, "on_task_invoke", None)
            if not callable(invoke):
                raise SpecError(f"The class {what.__qualname__} has no method on_task_invoke(ctx, task).")
            self._invoke = invoke
        elif callable(what):
            self._instance = None
            self._function = what
        else:
            raise SpecError(f"{what!r} is neither a class nor a function.")

    def enter(self, ctx: SessionContext) -> None:
        """It is bound to a session."""
        if method := getattr(self._instance, "on_session_enter", None):
            method(ctx)

    def invoke(self, ctx: SessionContext, id: int, attempt: int, payload: bytes) -> Any:
        """A task."""
        value = loads(payload)
        if self._function is not None:
            return self._function(value, **self._arguments)
        return self._invoke(ctx, Task(id, attempt, value))

    def leave(self) -> None:
        """It is unbound."""
        if method := getattr(self._instance, "on_session_leave", None):
            method()
