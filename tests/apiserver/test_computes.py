"""Computes over HTTP, with real workers on them."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame.client import Client
from flame.errors import Conflict, NotFound, SpecError
from flame.runners.cgroups import Limits, make_group
from flame.spec.nouns import Compute, Dataset, Placement, Resources, RestartPolicy
from flame.spec.records import JobState

WAITS = """
import os, time
print("began", flush=True)
while not os.path.exists({gate!r}):
    time.sleep(0.01)
"""

PLUGIN = """
import msgspec
from flame.runners import Secret
from flame.runners.local import LocalConfig, LocalRunner


class Config(LocalConfig, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    token: Secret
    more: dict[str, Secret] = {}


class Runner(LocalRunner):
    kind = "fancy"
    Config = Config

    async def start(self, spec):
        revealed = {"FANCY": self._config.token.reveal(), "REPR": repr(self._config)}
        return await super().start(spec._replace(environment={**spec.environment, **revealed}))
"""


@pytest.fixture
def fancy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package is installed, which brings a kind of compute."""
    site = tmp_path / "site"
    (site / "fancy-1.0.dist-info").mkdir(parents=True)
    (site / "fancy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fancy\nVersion: 1.0\n")
    name = f"fancy_{uuid.uuid4().hex}"
    (site / "fancy-1.0.dist-info" / "entry_points.txt").write_text(f"[flame.runners]\nfancy = {name}:Runner\n")
    (site / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(site))


def sites(*realms: str) -> list[Dataset]:
    return [Dataset(id=f"d{at}", name=f"{at}", url=f"file:///{at}", realm=realm) for at, realm in enumerate(realms)]


async def test_a_kind_of_another_package_runs_jobs_and_its_secrets_are_never_shown(
    served: Any, fancy: None, make_code: Any, make_form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = served.client
    config = {"token": "hush-hush", "more": {"a": "sesame"}, "slots": 5}
    made = await client.computes.create(Compute(name="odd", kind="fancy", region="us/west", config=config))
    shown = {"token": "***", "more": {"a": "***"}, "slots": 5}
    assert (made.state, made.config, made.capacity.slots) == ("ready", shown, 5)
    changed = {**made.config, "slots": 6}
    await client.computes.update("odd", Compute(name="odd", kind="fancy", region="us/west", config=changed))
    assert [one.config for one in await client.computes.list() if one.name == "odd"] == [{**shown, "slots": 6}]
    code = await client.code.upload(make_code("import os; print(os.environ['FANCY'][::-1], os.environ['REPR'])"))
    job = await client.jobs.create(make_form(code, trainers=1, datasets=sites("us"), name="on a plugin"))
    await client.jobs.start(job.id)
    ended = await client.jobs.wait(job.id)
    assert ended.state is JobState.COMPLETED, ended.failure
    trainer = (await client.jobs.tasks(job.id))[1]
    assert trainer.compute == "odd"
    log = b"".join([piece async for piece in client.tasks.log(trainer.id)])
    assert log.startswith(b"hsuh-hsuh "), "it is used"
    assert b"token=***" in log
    for wrong, says in (({"token": 5}, "Expected `str`"), ({"token": "hush-hush", "x": 1}, "unknown field `x`")):
        with pytest.raises(SpecError, match=says):
            await client.computes.create(Compute(name="bad", kind="fancy", config=wrong))
    everything = [await served.call("GET", path) for path in ("/v1/computes", "/v1/computes/odd", "/v1/server")]
    for secret in ("hush-hush", "sesame"):
        assert secret not in json.dumps(everything)
        assert secret not in caplog.text


async def test_what_cannot_be_is_refused_with_a_sentence(served: Any) -> None:
    computes = served.client.computes
    with pytest.raises(SpecError, match="kind: There is no kind of compute 'cloud'; known are: "):
        await computes.create(Compute(name="a", kind="cloud"))
    with pytest.raises(SpecError, match="memory"):
        await computes.create(Compute(name="a", kind="local", memory="much"))
    with pytest.raises(SpecError, match="server: must be an address"):
        await computes.create(Compute(name="a", kind="local", server="nearby"))
    with pytest.raises(Conflict):
        await computes.create(Compute(name="local", kind="local"))
    with pytest.raises(SpecError, match="keeps its name"):
        await computes.update("local", Compute(name="other", kind="local"))
    for call in (computes.get, computes.drain, computes.delete):
        with pytest.raises(NotFound, match="no compute 'nowhere'"):
            await call("nowhere")
    status, answer = await served.call("POST", "/v1/computes", json={"name": "a b", "kind": "local"})
    assert (status, answer["error"]["type"]) == (422, "SpecError")


async def test_a_server_that_is_killed_finds_the_workers_of_all_its_computes_again(
    start_process: Any, make_code: Any, make_form: Any, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start_process()
    async with Client(await first.url()) as client:
        await client.computes.create(Compute(name="second", kind="local", region="us"))
        code = await client.code.upload(make_code(WAITS.format(gate=str(gate)), WAITS.format(gate=str(gate))))
        form = make_form(code, datasets=sites("us", "local"), placement={"aggregator": Placement(realm="us")})
        job = await client.jobs.create(form)
        await client.jobs.start(job.id)
        async for event in client.jobs.events(job.id, follow=True):
            if event.type == "job" and event.data["state"] == "running":
                break
        before = {task.id: (task.compute, task.worker) for task in await client.jobs.tasks(job.id)}
        assert sorted(compute for compute, _ in before.values()) == ["local", "second", "second"]
    first.kill()
    await first.ended()
    assert all(psutil.pid_exists(int(worker)) for _, worker in before.values())
    again = start_process()
    async with Client(await again.url()) as client:
        assert {one.name: one.used.slots for one in await client.computes.list()} == {"local": 1, "second": 2}
        with pytest.raises(Conflict, match="has 2 workers"):
            await client.computes.delete("second")
        gate.touch()
        ended = await client.jobs.wait(job.id)
        assert ended.state is JobState.COMPLETED, ended.failure
        assert {task.id: (task.compute, task.worker) for task in await client.jobs.tasks(job.id)} == before
        assert {one.name: one.used.slots for one in await client.computes.list()} == {"local": 0, "second": 0}
        await client.computes.delete("second")


def groups_can_be_made() -> bool:
    try:
        make_group(f"probe-{uuid.uuid4().hex}", Limits(memory=1 << 26)).remove()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not groups_can_be_made(), reason="control groups cannot be made here")
async def test_code_that_eats_more_than_its_role_may_fails_with_that_cause(
    served: Any, make_code: Any, make_form: Any
) -> None:
    code = await served.client.code.upload(make_code("eaten = b'x' * (300 << 20)"))
    placement = {"trainer": Placement(resources=Resources(memory="128Mi"))}
    form = make_form(code, trainers=1, placement=placement, restart=RestartPolicy(attempts=0))
    job = await served.client.jobs.create(form)
    await served.client.jobs.start(job.id)
    ended = await served.client.jobs.wait(job.id)
    assert ended.state is JobState.FAILED
    assert ended.failure.role == "trainer"
    assert ended.failure.signal == "SIGKILL"
    assert "out of memory, of which it may use 128Mi" in ended.failure.message
