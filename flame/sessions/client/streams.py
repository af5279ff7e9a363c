"""Answers as a stream: of many tasks with so many under way, and of futures as they are done."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound="asyncio.Future[Any]")

_END = object()


async def answers(
    submit: Callable[[Any], asyncio.Future[Any]],
    values: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool,
    ahead: int,
) -> AsyncIterator[Any]:
    """Hand in a task for each value, and give the answers.

    :param submit: hands in a task.
    :param ordered: in the order of the values, and not as they come.
    :param ahead: how many tasks are under way at most.
    """
    source = _each(values)
    line: deque[asyncio.Future[Any]] = deque()
    ready: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
    more, count = True, 0
    while more or count:
        while more and count < ahead:
            value = await anext(source, _END)
            if value is _END:
                more = False
                break
            future = submit(value)
            count += 1
            if ordered:
                line.append(future)
            else:
                future.add_done_callback(ready.put_nowait)
            if count % 256 == 0 and line and line[0].done():
                break
        if count:
            count -= 1
            yield await (line.popleft() if ordered else await ready.get())


async def completed(futures: Iterable[F]) -> AsyncIterator[F]:
    """Futures in the order in which they are done."""
    ready: asyncio.Queue[Any] = asyncio.Queue()
    count = 0
    for future in futures:
        future.add_done_callback(ready.put_nowait)
        count += 1
    for _ in range(count):
        yield await ready.get()


async def _each(values: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(values, AsyncIterable):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value
