"""The Python client of Flame: everything that the `flame` command does, for scripts and notebooks.

>>> import flame.client
>>> job = await flame.client.run("examples/digits")

or step by step:

>>> async with flame.client.Client("http://127.0.0.1:10100") as client:
...     job = await client.jobs.submit(flame.client.load_job("examples/digits"))
...     await client.jobs.start(job.id)
...     job = await client.jobs.wait(job.id)

Answers are :mod:`flame.spec.records`, errors :mod:`flame.errors`. What is named in ``__all__`` is what may be relied on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame.client.client import Client
    from flame.client.running import run
    from flame.spec.load import JobBundle, load_job

__all__ = ["Client", "JobBundle", "load_job", "run"]

# Each name is imported when it is first used: a flamelet needs none of them, and `flame run` starts a server first.
_HOMES = {
    "Client": "flame.client.client",
    "JobBundle": "flame.spec.load",
    "load_job": "flame.spec.load",
    "run": "flame.client.running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
