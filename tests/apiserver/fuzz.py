"""Schemathesis against a server's own OpenAPI document, with all of its checks, as often as wanted.

``python tests/apiserver/fuzz.py --requests 20000 --seed 1`` starts a server with users and some things on it, and lets the fuzzer
loose, again with the next seed until the server has answered as many requests. It ends with one line of JSON, and with status 1
where anything failed: a 5xx, an answer that is not documented, one that does not fit its schema, a good request that is refused or a bad
one that is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from flame.apiserver.app import ROUTES
from flame.apiserver.limiter import Limiter
from flame.apiserver.permissions import Access
from flame.client import Client
from flame.serve import Server, ServeSettings, serve
from flame.spec import bundle
from flame.spec.nouns import Channel, Dataset, DatasetGroups, JobForm, Role, Schema
from flame.spec.people import UserForm, UserRole
from flame.spec.records import TaskState

#: All that the fuzzer has: borders of what is allowed, chance, and chains of requests.
PHASES = "examples,coverage,fuzzing,stateful"
#: Never ends, by design.
_ENDLESS = (
    "/v1/attach",
    "/v1/session-link",
    "/v1/executors/{id}/link",
    "/v1/sessions/{id}/events",
    "/v1/join/events",
    "/v1/tasks/{id}/events",
)
#: Would end the token with which the fuzzer comes.
_SAWING = ("/v1/tokens/{id}", "/v1/users/{name}")
#: 422 is Flame's answer to what has the right form and cannot be all the same, such as a job of a design that is not there.
_CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 409, 422, 429]
"""
#: A new design has neither schema nor code, so there is nothing at their addresses yet, whatever the fuzzer thinks of that.
_EXPECTED = re.compile(
    r"ST302 Created resource not found.*Not available with: `GET /v1/designs/\{id\}/(schema|code)`", re.DOTALL
)
_WAITS = "import signal; print('up', flush=True); signal.pause()\n"


def _form(code: str) -> JobForm:
    place = [{"param": "default"}]
    return JobForm(
        name="fuzzed",
        code=code,
        schema=Schema(
            name="two tiers",
            roles=[
                Role(name="trainer", is_data_consumer=True, group_association=place),
                Role(name="aggregator", group_association=place),
            ],
            channels=[Channel(name="param", pair=["trainer", "aggregator"])],
        ),
        datasets=[Dataset(id="d0", name="site", url="file:///site")],
        data_spec=[DatasetGroups(role="trainer", dataset_groups={"default": ["d0"]})],
    )


def _code(folder: Path) -> bytes:
    for role in ("trainer", "aggregator"):
        (folder / role).mkdir(parents=True)
        (folder / role / "main.py").write_text(_WAITS)
    return bundle.pack(folder)


@contextlib.asynccontextmanager
async def target(folder: Path, seed: int) -> AsyncIterator[tuple[Server, dict[str, Any]]]:
    """A server with users, a job that runs, one that waits; and what the fuzzer is to know of it."""
    (folder / "data").mkdir()
    async with serve(ServeSettings(port=0, slots=2), folder / "data") as server:
        server.api.guard.limiter = Limiter(burst=1 << 30)  # the fuzzer tries wrong tokens all the time
        async with Client(server.url) as local:
            made = await local.users.create(UserForm(name="ada", role=UserRole.ADMIN))
        async with Client(server.url, made.token.token) as client:
            digest = await client.code.upload(_code(folder / "code"))
            running = await client.jobs.create(_form(digest))
            await client.jobs.start(running.id)
            async with asyncio.timeout(60):
                async for event in client.jobs.events(running.id, follow=True):
                    if event.type == "task" and event.data["state"] == TaskState.RUNNING.value:
                        break
            ready = await client.jobs.create(msgspec.structs.replace(_form(digest), name="ready"))
            task = (await client.jobs.tasks(running.id))[0]
            others = [one.id for one in await client.jobs.tasks(ready.id)]
            known = {
                "seed": seed,
                "token": made.token.token,
                "key": server.controller.context.keys.task(task.id, 1),
                "workers": [f"{route.method} {route.path}" for route in ROUTES if route.access is Access.WORKER],
                "things": {
                    "designs.id": [running.design_id],
                    "datasets.id": [one.id for one in await client.datasets.list()],
                    "jobs.id": [ready.id, running.id],
                    "tasks.id": [task.id, *others],
                    "bundles.sha256": [digest],
                    "computes.name": ["local"],
                    "projects.name": ["default"],
                },
            }
            yield server, known
        await server.controller.stop_all()


def _command(
    url: str, known: dict[str, Any], *, examples: int, seconds: int | None, phases: str, folder: Path
) -> list[str]:
    limits = ["--max-examples", str(examples)] + (["--max-time", str(seconds)] if seconds else [])
    excluded = [f"--exclude-path={path}" for path in (*_ENDLESS, *_SAWING)]
    (folder / "schemathesis.toml").write_text(_CONFIG)
    return [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")),
        *("run", f"{url}/openapi.json"),
        *(
            "--checks",
            "all",
            "--phases",
            phases,
            "--seed",
            str(known["seed"]),
            "--workers",
            "1",
            "--continue-on-failure",
        ),
        *("-H", f"Authorization: Bearer {known['token']}", "--request-timeout", "30", "--warnings", "off"),
        *("--suppress-health-check", "all", "--generation-database", "none", "--no-color"),
        *("--report", "junit", "--report-junit-path", str(folder / "report.xml")),
        *limits,
        *excluded,
    ]


def _all_expected(said: str) -> bool:
    """Whether all that failed is what is meant to be so."""
    found = re.findall(r"^- (ST\d+ .*?)(?=^- ST|^_____|^=====)", said, re.DOTALL | re.MULTILINE)
    return bool(found) and "= ERRORS =" not in said and all(_EXPECTED.match(one) for one in found)


async def fuzz(
    requests: int, seed: int, *, examples: int, seconds: int | None = None, phases: str = PHASES
) -> dict[str, Any]:
    """Let the fuzzer loose until the server has answered so many requests.

    :param examples: how many for each operation in one go.
    :param seconds: how long one go may take.
    :param phases: which of the fuzzer's phases.
    :returns: how many requests, which statuses, and what the fuzzer had to say where it found something.
    """
    began = time.monotonic()
    statuses: dict[str, int] = {}
    complaints: list[str] = []
    while sum(statuses.values()) < requests and not complaints:
        with tempfile.TemporaryDirectory(prefix="flame-fuzz-") as name:
            folder = Path(name)
            async with target(folder, seed) as (server, known):
                command = _command(server.url, known, examples=examples, seconds=seconds, phases=phases, folder=folder)
                environment = {
                    **os.environ,
                    "FLAME_FUZZ": json.dumps(known),
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
                    "SCHEMATHESIS_HOOKS": "fuzz_hooks",
                    "PYTHONWARNINGS": "ignore",
                }
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=folder,
                )
                said = (await process.communicate())[0].decode(errors="replace")
                if process.returncode and not _all_expected(said):
                    complaints.append(said)
                for status, count in server.api.requests.items():
                    statuses[str(status)] = statuses.get(str(status), 0) + count
        seed += 1
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "fiveHundreds": sum(count for status, count in statuses.items() if status[0] == "5"),
        "seconds": round(time.monotonic() - began, 1),
        "complaints": complaints,
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seconds", type=int)
    given = parser.parse_args()
    result = asyncio.run(fuzz(given.requests, given.seed, examples=given.examples, seconds=given.seconds))
    for complaint in result["complaints"]:
        print(complaint)
    print(json.dumps({**result, "complaints": len(result["complaints"])}))
    return 1 if result["complaints"] or result["fiveHundreds"] else 0


if __name__ == "__main__":
    sys.exit(main())
