"""Manifest and code: fetched, checked, and laid out in the folder in which the child runs."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import msgspec

import flame
from flame.client.follow import insist
from flame.client.http import Query, Session
from flame.errors import ServerError, SpecError
from flame.flamelet.settings import Settings
from flame.spec import bundle
from flame.spec.records import Manifest

#: The folder in the worker's directory in which the checkpoints of earlier attempts are laid out.
CHECKPOINTS = "checkpoints"


async def fetch(session: Session, url: str, query: Query, settings: Settings) -> tuple[Manifest, Path]:
    """Fetch what the task is, and lay out the role's folder with its code and ``config.json``.

    :param url: the task's address, ``/v1/tasks/ID``.
    :param settings: the worker's directory, in which the role's folder is made; the owner's conditions and data.
    :returns: the manifest, and the role's folder.
    :raises flame.errors.SpecError: the code is not what the manifest promises, or not what the machine's owner has agreed to.
    :raises flame.errors.FlameError: the server refuses it, or was away for too long.
    """

    async def manifest() -> Manifest:
        try:
            return await session.call("GET", f"{url}/manifest", query=query, into=Manifest)
        except ServerError as error:
            if not isinstance(error.__cause__, msgspec.ValidationError):
                raise
            raise SpecError(  # trying again would not change it
                f"The Flame {flame.__version__} that this worker has (in its image?) is of another version than the server's: {error.__cause__}."
            ) from error

    async def code() -> bytes:
        return await session.call("GET", f"{url}/code", query=query, into=bytes)

    patience = settings.orphan_after
    task, data = await asyncio.gather(insist(manifest, patience=patience), insist(code, patience=patience))
    digest = bundle.digest(data)
    if digest != task.code:
        raise SpecError(f"The code's digest is {digest}, the manifest promises {task.code}; it was not run.")
    if settings.accept is not None and digest != settings.accept:
        raise SpecError(f"The code's digest is {digest}, agreed to was {settings.accept}; it was not run.")
    own = {name: value for name in ("dataset", "realm") if (value := getattr(settings, name)) is not None}
    if "dataset" in own:
        own["dataset_sha256"] = ""  # what the server promised of another one
    task.config = msgspec.structs.replace(task.config, **own)
    folder = bundle.extract(data, task.config.role, Path(settings.work_dir).absolute(), "the job's code")
    (folder / "config.json").write_bytes(msgspec.json.encode(task.config))
    kept = Path(settings.work_dir).absolute() / CHECKPOINTS
    for number in task.checkpoints:
        kept.mkdir(exist_ok=True)
        path = kept / f"{number}.safetensors"
        await insist(partial(_download, session, f"{url}/checkpoints/{number}", query, path), patience=patience)
    return task, folder


async def _download(session: Session, url: str, query: Query, path: Path) -> None:
    """Lay out one file, whole."""
    beside = path.with_suffix(".part")
    async with session.open("GET", url, query=query) as answer:
        with beside.open("wb") as file:
            async for piece in answer.chunks():
                file.write(piece)
    beside.replace(path)
