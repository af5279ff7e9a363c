"""Tasks' logs on the screen: one as it is, several line by line with their names before them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing

from flame.cli import names
from flame.cli.output import note
from flame.cli.running import Lost
from flame.client import Client
from flame.errors import NotFound
from flame.spec.records import Task


async def copy(client: Client, tasks: Sequence[Task], *, follow: bool, attempt: int | None = None) -> None:
    """Copy logs to standard output.

    :param tasks: whose logs. Several are followed at the same time, else they come one after the other.
    :param follow: go on until the tasks have ended.
    :param attempt: which start; None for the newest.
    """
    lost = Lost(note)
    width = max((len(names.label(task)) for task in tasks), default=0)

    async def one(task: Task) -> None:
        prefix = f"{names.label(task).ljust(width)} | ".encode() if len(tasks) > 1 else None
        rest = b""
        try:
            log = client.tasks.log(task.id, attempt=attempt, follow=follow, on_lost=lost)
            async with aclosing(log) as pieces:
                async for piece in pieces:
                    rest = _write(rest + piece, prefix)
        except NotFound:
            if len(tasks) == 1:
                raise
        if rest:
            _write(rest + b"\n", prefix)

    if follow:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(one(task))
    else:
        for task in tasks:
            await one(task)


def _write(data: bytes, prefix: bytes | None) -> bytes:
    """Write what can be written; gives the beginning of a line that has to wait for its end."""
    rest = b""
    if prefix is not None:
        *lines, rest = data.split(b"\n")
        data = b"".join(prefix + line + b"\n" for line in lines)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return rest
