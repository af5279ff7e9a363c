"""Whatever is sent, the server answers in its own form, and never with a fault of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import string
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame import sessions
from flame.apiserver import doorman
from flame.apiserver.app import ROUTES
from flame.errors import SpecError, UsageError
from flame.spec.nouns import ModelSpec, Role, Schema
from flame.spec.sessions import Application

texts = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
NAMES = [
    "name", "schema", "code", "datasets", "dataSpec", "roles", "channels", "pair", "url", "id", "designId", "priority",
    "modelSpec", "hyperparameters", "seq", "type", "data", "replica", "groupBy", "value", "policy", "maxRunTime",
]  # fmt: skip
forms = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)
segments = st.text(alphabet=string.printable + "%\x00é😀", min_size=1, max_size=12)


@settings(max_examples=int(os.environ.get("FLAME_FUZZ", "300")), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    route=st.sampled_from([route for route in ROUTES if not route.stream]),
    parts=st.lists(segments, min_size=2, max_size=2),
    query=st.dictionaries(st.sampled_from(["after", "limit", "state", "attempt", "offset", "follow"]), segments),
    body=forms | documents,
)
async def test_nothing_that_is_sent_is_a_fault_of_the_server(
    served: Any, route: Any, parts: list[str], query: dict[str, str], body: Any
) -> None:
    from yarl import URL

    path = route.path
    for name, value in zip(("{id}", "{name}"), parts, strict=True):
        path = path.replace(name, URL.build(path="/" + value).raw_path[1:].replace("/", "%2F") or "x")
    url = URL(served.url + path.replace("{sha256}", "0" * 64), encoded=True).update_query(query)
    sent: dict[str, Any] = {}
    if route.body is not None and route.body is not bytes:
        sent = {"data": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}}
    elif route.body is bytes:
        sent = {"data": json.dumps(body).encode()}
    async with served.http.request(route.method, url, **sent) as response:
        data = await response.read()
        assert response.status < 500, data
        if response.status >= 400 and route.method != "HEAD":
            error = json.loads(data)["error"]
            assert error["type"]
            assert error["message"]


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"name": 1' + b"0" * 5000 + b"}", b"\xff\xfe", b"", b"null"])
async def test_a_body_that_is_a_bomb_is_refused(served: Any, data: bytes) -> None:
    status, answer = await served.call("POST", "/v1/jobs", data=data, headers={"Content-Type": "application/json"})
    assert status in (400, 422), answer


@pytest.mark.parametrize("where", ["jobs", "apps", "link"])
async def test_data_that_are_nested_so_deep_that_the_next_reader_breaks_are_refused(
    served: Any, make_code: Any, make_form: Any, where: str
) -> None:
    """They would be stored, and every list that has them be a fault of the server, or of its clients."""

    def nest(levels: int) -> dict[str, Any]:
        value: dict[str, Any] = {"text": "]}" * 1000}
        for _ in range(levels - 1):
            value = {"a": value}
        return value

    async def send(levels: int) -> None:
        if where == "jobs":
            form = make_form(await served.client.code.upload(make_code()))
            await served.client.jobs.create(
                msgspec.structs.replace(form, model_spec=ModelSpec(hyperparameters=nest(levels)))
            )
        elif where == "apps":
            await served.client.apps.create(Application(name=f"a{levels}", entry="json:dumps", arguments=nest(levels)))
        else:
            application = Application(name="a", entry="json:dumps", arguments=nest(levels))
            async with sessions.connect(served.url) as connection, connection.open(application):
                pass

    await send(90)
    for levels in (101, 400):
        with pytest.raises(UsageError, match="deeper than the 100 levels"):
            await send(levels)
    assert len(await served.client.jobs.list()) == (where == "jobs")


async def test_who_connects_and_says_nothing_is_cut_off(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman, "PATIENCE", 0.5)
    async with make_server() as served:
        port = int(served.url.rpartition(":")[2])
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        slow[1][1].write(b"GET /healthz HT")
        slow[2][1].write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-More: ")
        async with served.client._session.open("GET", "/v1/attach") as answer:
            lines = answer.lines()
            for reader, writer in slow:
                assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
            with pytest.raises(TimeoutError):  # who has said what they want may take as long as it takes
                await asyncio.wait_for(anext(lines), 1)


async def test_of_those_who_say_nothing_there_may_be_so_many(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorman, "MOST", 5)
    async with make_server() as served:
        port = int(served.url.rpartition(":")[2])
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
        assert await asyncio.wait_for(silent[0][0].read(), 10) == b""
        assert (await served.call("GET", "/healthz"))[0] == 200
        for _, writer in silent:
            writer.close()


@pytest.mark.parametrize(
    "head", [b"X: " + b"a" * 100_000, b"\r\n".join(b"X-%d: 1" % i for i in range(10_000)), b"no header"]
)
async def test_a_head_that_is_none_is_refused_and_does_not_fill_the_log(
    served: Any, head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(served.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        assert (await asyncio.wait_for(reader.read(), 20)).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    writer.close()
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_job_of_more_tasks_than_anyone_can_want_is_refused(served: Any, make_code: Any, make_form: Any) -> None:
    digest = await served.client.code.upload(make_code())
    form = make_form(digest)
    assert form.schema is not None
    roles = [
        Role(name=role.name, is_data_consumer=role.is_data_consumer, group_association=role.group_association)
        if role.is_data_consumer
        else Role(name=role.name, replica=10**9, group_association=role.group_association)
        for role in form.schema.roles
    ]
    schema = Schema(name="big", roles=roles, channels=form.schema.channels)
    with pytest.raises(SpecError, match="1000000002 tasks"):
        await served.client.jobs.create(make_form(digest, schema=schema))


async def test_an_artifact_stays_in_its_folder(served: Any, make_code: Any, make_form: Any) -> None:
    digest = await served.client.code.upload(make_code())
    job = await served.client.jobs.create(make_form(digest))
    for name in ("..%2F..%2Fsecret", "%2e%2e%2Fsecret", "%2Fetc%2Fpasswd", ".hidden", "a%00b"):
        from yarl import URL

        url = URL(f"{served.url}/v1/jobs/{job.id}/artifacts/{name}", encoded=True)
        async with served.http.get(url) as response:
            assert response.status in (404, 422)
