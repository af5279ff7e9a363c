"""The API's own promises: who is let in, what is documented, what is refused and how."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from waiting import until

from flame.apiserver.app import ROUTES
from flame.apiserver.limiter import Limiter
from flame.apiserver.routes import Access
from flame.controller.keys import Keys
from flame.errors import Conflict, NotFound, SpecError, StoreError, Unauthorized, UsageError
from flame.process import run_server
from flame.serve import ServeSettings
from flame.spec.nouns import Dataset
from flame.spec.records import JobState

PATH = re.compile(r"{(\w+)}")


async def test_a_task_s_key_opens_nothing_of_another_task(served: Any, make_code: Any, make_form: Any) -> None:
    served.server.api.guard.limiter = Limiter(burst=10_000)
    digest = await served.client.code.upload(make_code("import time; time.sleep(60)", "import time; time.sleep(60)"))
    job = await served.client.jobs.create(make_form(digest))
    await served.client.jobs.start(job.id)
    one, two, _ = await served.client.jobs.tasks(job.id)
    keys = Keys.load(served.data_dir / "secret")
    for route in ROUTES:
        if route.access is not Access.WORKER:
            continue
        body = (
            {} if route.body in (None, bytes) else {"json": [] if "reports" in route.path else {"file": "x", "size": 1}}
        )
        path = PATH.sub("1", route.path.replace("{id}", two.id))
        query = "?attempt=1&offset=0" if path.endswith("/log") else "?attempt=1"
        for key in (keys.task(one.id, 1), keys.task(two.id, 2), keys.job(job.id), ""):
            headers = {"Authorization": f"Bearer {key}"}
            status, answer = await served.call(route.method, path + query, headers=headers, **body)
            assert status == 401, answer
        headers = {"Authorization": f"Bearer {keys.task(two.id, 2)}"}
        status, answer = await served.call(route.method, path + query.replace("1", "2", 1), headers=headers, **body)
        assert (status, answer["error"]["type"]) == (403, "Forbidden")
    await served.client.jobs.stop(job.id)
    await served.client.jobs.wait(job.id)


async def test_pages_of_other_sites_are_turned_away(served: Any) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example:80"}):
        status, answer = await served.call("GET", "/v1/server", headers=headers)
        assert (status, answer["error"]["type"]) == (403, "Forbidden"), headers
    for headers in ({"Origin": served.url}, {"Host": "localhost:10100"}, {"Host": "[::1]:10100"}):
        status, _ = await served.call("GET", "/v1/server", headers=headers)
        assert status == 200, headers


async def test_a_wrong_token_is_refused_with_a_sentence(make_server: Any) -> None:
    from flame.client import Client

    async with make_server(token="secret") as served:
        assert (await served.client.info()).version
        for token, words in ((None, "needs a token"), ("wrong", "not this server's token")):
            async with Client(served.url, token) as stranger:
                with pytest.raises(Unauthorized, match=words):
                    await stranger.info()


def test_a_server_for_everyone_must_be_asked_for_in_so_many_words(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="for anyone on the way to read"):
        run_server(ServeSettings(host="0.0.0.0", port=0, data_dir=tmp_path))


async def test_the_document_says_exactly_what_there_is(served: Any) -> None:
    _, document = await served.call("GET", "/openapi.json")
    assert document["openapi"] == "3.1.0"
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert documented == {(route.method, route.path) for route in ROUTES}
    routed = {
        (route.method, route.resource.canonical)
        for route in served.server.api.application().router.routes()
        if route.resource is not None
    }
    assert documented == routed
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids)
    for path, item in document["paths"].items():
        for operation in item.values():
            named = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
            assert named == set(PATH.findall(path))
            assert operation["summary"]
            assert any(status.startswith("2") or status == "101" for status in operation["responses"])


async def test_the_documents_references_lead_somewhere_and_its_types_are_json_schema(served: Any) -> None:
    _, document = await served.call("GET", "/openapi.json")
    schemas = document["components"]["schemas"]
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert used <= set(schemas)
    assert {"Job", "JobForm", "Task", "Schema", "Event", "Manifest", "ErrorAnswer"} <= used
    known = {"object", "array", "string", "integer", "number", "boolean", "null"}

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            kind = schema.get("type")
            if isinstance(kind, str):
                assert kind in known, schema
            for key, value in schema.items():
                if key in ("properties", "anyOf", "items", "additionalProperties"):
                    for one in value.values() if key == "properties" else value if key == "anyOf" else [value]:
                        walk(one)

    for schema in schemas.values():
        walk(schema)


async def test_the_page_shows_every_route_and_needs_nothing_from_outside(served: Any) -> None:
    async with served.http.get(served.url + "/docs") as response:
        assert response.content_type == "text/html"
        page = await response.text()
    for route in ROUTES:
        assert route.path in page

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: Any) -> None:
            for name, value in attributes:
                if name in ("src", "href"):
                    assert value.startswith(("#", "/openapi.json")), value
            assert tag not in ("script", "link", "img", "iframe")

    Links().feed(page)


async def test_what_is_not_there_is_answered_in_the_same_form(served: Any) -> None:
    status, answer = await served.call("GET", "/v1/nothing")
    assert (status, answer["error"]["type"]) == (404, "NotFound")
    status, answer = await served.call("PATCH", "/v1/jobs")
    assert status == 405
    assert "takes no PATCH" in answer["error"]["message"]


async def test_a_fault_of_the_server_shows_a_number_and_nothing_else(
    served: Any, monkeypatch: Any, caplog: Any
) -> None:
    async def broken() -> None:
        raise RuntimeError("the inside of the server")

    monkeypatch.setattr(served.server.controller, "jobs", lambda *_: broken())
    status, answer = await served.call("GET", "/v1/jobs")
    assert (status, answer["error"]["type"]) == (500, "ServerError")
    assert "inside" not in json.dumps(answer)
    number = re.search(r"fault (\w+)", answer["error"]["message"])
    assert number is not None
    assert number[1] in caplog.text
    assert "the inside of the server" in caplog.text


async def test_a_bundle_is_kept_under_its_digest_alone(served: Any, make_code: Any) -> None:
    data = make_code()
    digest = hashlib.sha256(data).hexdigest()
    assert (await served.call("GET", f"/v1/bundles/{digest}"))[0] == 404
    for wrong, sent in (("0" * 64, data), (hashlib.sha256(b"no zip").hexdigest(), b"no zip")):
        status, answer = await served.call("PUT", f"/v1/bundles/{wrong}", data=sent)
        assert (status, answer["error"]["type"]) == (422, "SpecError")
    assert await served.call("PUT", f"/v1/bundles/{digest}", data=data) == (204, b"")
    assert await served.call("GET", f"/v1/bundles/{digest}") == (200, data)
    assert (await served.call("HEAD", f"/v1/bundles/{digest}"))[0] == 200
    status, _ = await served.call("PUT", f"/v1/bundles/{digest}", data=b"")
    assert status == 422


async def test_a_body_that_is_too_large_is_refused(served: Any) -> None:
    status, answer = await served.call(
        "POST", "/v1/designs", data=io.BytesIO(b" " * (17 << 20)), headers={"Content-Type": "application/json"}
    )
    assert (status, answer["error"]["type"]) == (413, "UsageError")


async def test_designs_are_registered_changed_and_removed(served: Any, make_code: Any, make_form: Any) -> None:
    designs, schemas, code = served.client.designs, served.client.schemas, served.client.code
    design = await designs.create("mnist", "digits")
    with pytest.raises(Conflict, match="named 'mnist' already"):
        await designs.create("mnist")
    with pytest.raises(NotFound, match="no schema yet"):
        await schemas.get(design.id)
    digest = await code.put(design.id, make_code())
    schema = make_form(digest).schema
    await schemas.put(design.id, schema)
    assert await schemas.get(design.id) == schema
    assert await code.get(design.id) == make_code()
    other = await designs.create("other")
    with pytest.raises(Conflict):
        await designs.update(other.id, name="mnist")
    await designs.update(design.id, name="renamed", description="new")
    assert {one.name for one in await designs.list()} == {"renamed", "other"}
    job = await served.client.jobs.create(make_form(None, schema=None, design_id=design.id))
    assert job.code == digest
    with pytest.raises(Conflict):
        await designs.delete(design.id)
    await served.client.jobs.delete(job.id)
    await code.delete(design.id)
    with pytest.raises(SpecError, match="has no code yet"):
        await served.client.jobs.create(make_form(None, schema=None, design_id=design.id))
    await schemas.delete(design.id)
    await designs.delete(design.id)
    with pytest.raises(NotFound):
        await designs.get(design.id)


async def test_datasets_are_found_again_by_their_content(served: Any) -> None:
    datasets = served.client.datasets
    one = await datasets.create(Dataset(name="a", url="file:///a"))
    assert (await datasets.create(Dataset(name="a", url="file:///a"))).id == one.id
    named = await datasets.create(Dataset(id="my-own", name="a", url="file:///a"))
    assert named.id == "my-own"
    with pytest.raises(Conflict, match="belongs to another dataset"):
        await datasets.create(Dataset(id="my-own", name="b", url="file:///b"))
    await datasets.update(one.id, Dataset(name="a", url="file:///elsewhere"))
    assert (await datasets.create(Dataset(name="a", url="file:///a"))).id not in (one.id, "my-own")
    with pytest.raises(SpecError, match="must not be empty"):
        await datasets.create(Dataset(name="a", url=" "))
    for name in ("", ".", ".."):  # none of them could be read again
        status, _ = await served.call("POST", "/v1/datasets", json={"id": name, "name": "c", "url": "file:///c"})
        assert status == 422
    await datasets.delete("my-own")
    assert len(await datasets.list()) == 2


async def test_numbers_are_there_for_a_monitor(served: Any) -> None:
    await served.call("GET", "/healthz")
    _, text = await served.call("GET", "/metrics")
    assert b'flame_requests_total{status="200"}' in text
    assert b"flame_workers 0" in text


async def test_a_stream_says_that_it_lives_and_its_end_frees_everything(
    served: Any, make_code: Any, make_form: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("flame.apiserver.answers.KEEP_ALIVE", 0.02)
    digest = await served.client.code.upload(make_code())
    job = await served.client.jobs.create(make_form(digest))
    notifier = served.server.controller.context.notifier
    async with served.http.get(f"{served.url}/v1/jobs/{job.id}/events?follow=true") as response:
        assert response.content_type == "application/x-ndjson"
        assert await response.content.readline() == b"\n"
        assert notifier._streams
    await until(lambda: not notifier._streams)


async def test_a_stream_that_fails_in_the_middle_is_not_taken_for_a_whole_one(
    served: Any, make_code: Any, make_form: Any, monkeypatch: Any, caplog: Any
) -> None:
    import aiohttp

    digest = await served.client.code.upload(make_code())
    job = await served.client.jobs.create(make_form(digest))

    async def torn(*_: Any) -> Any:
        yield []
        raise StoreError("The disk is gone.")

    monkeypatch.setattr(served.server.controller.context.notifier, "batches", torn)
    async with served.http.get(f"{served.url}/v1/jobs/{job.id}/events?follow=true") as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    assert "The disk is gone." in caplog.text


async def test_streams_end_when_the_server_does(make_server: Any, make_code: Any, make_form: Any) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as http:
        async with make_server() as served:
            digest = await served.client.code.upload(make_code())
            job = await served.client.jobs.create(make_form(digest))
            response = await http.get(f"{served.url}/v1/jobs/{job.id}/events?follow=true")
        async with asyncio.timeout(5):
            assert await response.content.read() in (b"", b"\n")
    assert job.state is JobState.READY
