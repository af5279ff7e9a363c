"""Whatever is sent, the server answers in its own form, and never with a fault of its own."""

from __future__ import annotations

import json
import os
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame.apiserver.app import ROUTES
from flame.errors import SpecError
from flame.spec.nouns import Role, Schema

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
