"""Manifest and code: fetched, checked, and laid out in the folder in which the child runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from flame.client.follow import insist
from flame.client.http import Query, Session
from flame.errors import SpecError
from flame.spec import bundle
from flame.spec.records import Manifest


async def fetch(session: Session, url: str, query: Query, work: Path, *, patience: float) -> tuple[Manifest, Path]:
    """Fetch what the task is, and lay out the role's folder with its code and ``config.json``.

    :param url: the task's address, ``/v1/tasks/ID``.
    :param work: the worker's directory; the role's folder is made in it.
    :param patience: seconds without an answer after which this gives up.
    :returns: the manifest, and the role's folder.
    :raises flame.errors.SpecError: the code is not what the manifest promises.
    :raises flame.errors.FlameError: the server refuses it, or was away for too long.
    """

    async def manifest() -> Manifest:
        return await session.call("GET", f"{url}/manifest", query=query, into=Manifest)

    async def code() -> bytes:
        return await session.call("GET", f"{url}/code", query=query, into=bytes)

    task, data = await asyncio.gather(insist(manifest, patience=patience), insist(code, patience=patience))
    digest = bundle.digest(data)
    if digest != task.code:
        raise SpecError(f"The code's digest is {digest}, the manifest promises {task.code}; it was not run.")
    folder = bundle.extract(data, task.config.role, work, "the job's code")
    (folder / "config.json").write_bytes(msgspec.json.encode(task.config))
    return task, folder
