"""The watch of a cluster's pods does not end: not by a timeout, a broken connection, or an API server that has forgotten."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from waiting import until

pytest.importorskip("kubernetes_asyncio")

from flame.errors import RunnerError
from flame.runners.kubernetes_cluster import Cluster, Refused, Watch
from flame.runners.kubernetes_config import KubernetesConfig
from flame.runners.secret import Secret


class ApiServer:
    """Says what a test puts into its queue, on one watch after another, and notes what it is asked."""

    def __init__(self) -> None:
        self.lists: list[str] = []
        self.watches: list[str] = []
        self.tokens: list[str | None] = []
        self.down = False
        self.accepted = "Bearer one"
        self.version = 10
        self.says: asyncio.Queue[dict[str, Any] | str] = asyncio.Queue()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(request.headers.get("Authorization"))
        if request.headers.get("Authorization") != self.accepted:
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        if self.down:
            assert request.transport
            request.transport.close()
            return web.Response()
        if "watch" not in request.query:
            self.lists.append(request.query["labelSelector"])
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": [pod("listed", 1)]})
        self.watches.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            said = await self.says.get()
            if said == "break":
                assert request.transport
                request.transport.abort()
            if isinstance(said, str):
                return response
            await response.write(json.dumps(said).encode() + b"\n")


def pod(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def change(type: str, name: str, version: int) -> dict[str, Any]:
    return {"type": type, "object": pod(name, version)}


class Notes:
    """What a watch told."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.news = asyncio.Condition()

    def listed(self, items: Any) -> None:
        self._note("list:" + ",".join(one["metadata"]["name"] for one in items))

    def changed(self, type: str, one: Any) -> None:
        self._note(f"{type}:{one['metadata']['name']}")

    def _note(self, what: str) -> None:
        self.heard.append(what)
        self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def until(self, what: list[str]) -> None:
        async with asyncio.timeout(10):
            async with self.news:
                await self.news.wait_for(lambda: self.heard == what)


@pytest.fixture
async def api() -> ApiServer:
    return ApiServer()


@pytest.fixture
async def cluster(api: ApiServer) -> AsyncIterator[Cluster]:
    application = web.Application()
    application.router.add_get("/api/v1/namespaces/place/pods", api.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = runner.addresses[0]
    text = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "place"}}],
        "clusters": [{"name": "k", "cluster": {"server": f"http://127.0.0.1:{address[1]}"}}],
        "users": [{"name": "u", "user": {"token": "one"}}],
    }
    cluster = await Cluster.connect(KubernetesConfig(credentials=Secret(json.dumps(text))))
    yield cluster
    await cluster.close()
    await runner.cleanup()


@pytest.fixture
async def notes() -> Notes:
    return Notes()


@pytest.fixture
async def watch(cluster: Cluster, notes: Notes) -> AsyncIterator[Watch]:
    watch = Watch(cluster, cluster.pods, "a=b", listed=notes.listed, changed=notes.changed)
    await watch.refresh()
    yield watch
    await watch.close()


async def test_it_begins_with_a_list_and_goes_on_from_there(api: ApiServer, watch: Watch, notes: Notes) -> None:
    await api.says.put(change("ADDED", "x", 11))
    await api.says.put(change("BOOKMARK", "", 15))
    await api.says.put("end")  # as the API server does after a while
    await api.says.put(change("DELETED", "x", 16))
    await notes.until(["list:listed", "ADDED:x", "DELETED:x"])
    assert api.watches == ["10", "15"]
    assert api.lists == ["a=b"]


async def test_a_broken_connection_is_taken_up_where_it_was(api: ApiServer, watch: Watch, notes: Notes) -> None:
    await api.says.put(change("ADDED", "x", 11))
    await notes.until(["list:listed", "ADDED:x"])
    api.down = True
    await api.says.put("break")
    await until(lambda: len(api.tokens) >= 5)  # it tries again
    api.down = False
    await api.says.put(change("MODIFIED", "x", 12))
    await notes.until(["list:listed", "ADDED:x", "MODIFIED:x"])
    assert len(api.lists) == 1
    assert api.watches == ["10", "11"]


@pytest.mark.parametrize("code", [410, 500])
async def test_where_the_api_server_has_forgotten_it_lists_again(
    api: ApiServer, watch: Watch, notes: Notes, code: int
) -> None:
    api.version = 100
    await api.says.put(
        {"type": "ERROR", "object": {"kind": "Status", "code": code, "message": "too old", "reason": "x"}}
    )
    await api.says.put("end")
    await api.says.put(change("ADDED", "x", 101))
    await notes.until((["list:listed"] * 2 if code == 410 else ["list:listed"]) + ["ADDED:x"])
    assert api.watches == ["10", "100" if code == 410 else "10"]


async def test_a_new_list_is_had_when_it_is_asked_for(api: ApiServer, watch: Watch, notes: Notes) -> None:
    await asyncio.gather(watch.refresh(), watch.refresh())
    assert notes.heard == ["list:listed"] * len(notes.heard)
    assert 2 <= len(notes.heard) <= 3
    api.down = True
    with pytest.raises(RunnerError, match="does not answer"):
        await watch.refresh()
    api.down = False
    await watch.refresh()


async def test_a_refused_token_is_renewed_once_and_then_said(api: ApiServer, cluster: Cluster) -> None:
    api.accepted = "Bearer two"
    with pytest.raises(Refused, match="Unauthorized"):
        await cluster.call("GET", cluster.pods)
    assert api.tokens == ["Bearer one"] * 2
