"""The conversation with a cluster's API server: credentials, requests, and a watch that does not end.

Objects are plain mappings, as they travel: the models of the client library would cost a second to import and copy
everything. What goes wrong is a :class:`~flame.errors.RunnerError` with the cluster's own sentence.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import yaml

from flame.errors import MissingExtra, RunnerError
from flame.runners.kubernetes_config import KubernetesConfig

if TYPE_CHECKING:
    from kubernetes_asyncio.client import ApiClient, Configuration

log = logging.getLogger("flame.runners")

Object = dict[str, Any]
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_ANSWER = 30.0  # seconds for an answer
_WATCH = 60  # seconds that a watch lasts before it is taken up anew, so that a dead connection is noticed
_PAUSES = (0.1, 10.0)


class Refused(RunnerError):
    """The API server's answer is no.

    :param status: the HTTP status.
    :param reason: the word for it, such as ``AlreadyExists``.
    """

    def __init__(self, message: str, code: int, reason: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class Cluster:
    """A cluster, seen from one namespace. Made by :meth:`connect`.

    :ivar namespace: that namespace.
    """

    def __init__(
        self, client: ApiClient, configuration: Configuration, namespace: str, config: KubernetesConfig
    ) -> None:
        self._client = client
        self._configuration = configuration
        self._config = config
        self.namespace = namespace

    @classmethod
    async def connect(cls, config: KubernetesConfig) -> Cluster:
        """Read the credentials; nothing is sent.

        :raises flame.errors.RunnerError: they cannot be read.
        :raises flame.errors.MissingExtra: the client library is not installed.
        """
        try:
            client = await asyncio.to_thread(importlib.import_module, "kubernetes_asyncio.client")
        except ImportError as error:
            raise MissingExtra("kubernetes_asyncio", "kubernetes", "A compute of the kind kubernetes") from error
        configuration = client.Configuration()
        namespace = await _authenticate(config, configuration)
        return cls(client.ApiClient(configuration), configuration, config.namespace or namespace, config)

    @property
    def pods(self) -> str:
        """The path of the namespace's pods."""
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @property
    def secrets(self) -> str:
        """The path of the namespace's secrets."""
        return f"/api/v1/namespaces/{self.namespace}/secrets"

    async def call(
        self, method: str, path: str, body: Object | None = None, *, query: Mapping[str, Any] | None = None
    ) -> Object:
        """One request.

        :raises flame.runners.kubernetes_cluster.Refused: the answer is no.
        :raises flame.errors.RunnerError: there is no answer.
        """
        timeout = aiohttp.ClientTimeout(total=_ANSWER)
        async with await self._open(method, path, query, timeout, body) as response:
            try:
                answer: Object = msgspec.json.decode(await response.read(), type=dict[str, Any])
            except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
                raise self._unreachable(error) from error
            return answer

    async def read(self, path: str, query: Mapping[str, Any] | None = None) -> AsyncGenerator[bytes, None]:
        """The answer to a GET as it comes, in pieces."""
        timeout = aiohttp.ClientTimeout(sock_connect=_ANSWER, sock_read=_ANSWER)
        async with await self._open("GET", path, query, timeout) as response:
            try:
                async for piece in response.content.iter_any():
                    yield piece
            except (aiohttp.ClientError, TimeoutError) as error:
                raise self._unreachable(error) from error

    async def changes(self, path: str, query: Mapping[str, Any]) -> AsyncGenerator[Object, None]:
        """The events of a watch, until the API server ends it."""
        timeout = aiohttp.ClientTimeout(sock_connect=_ANSWER, sock_read=_WATCH + 15)
        query = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": _WATCH}
        async with await self._open("GET", path, query, timeout) as response:
            try:
                async for line in response.content:
                    event = msgspec.json.decode(line, type=dict[str, Any])
                    if event["type"] == "ERROR":
                        raise _refused(event["object"])
                    yield event
            except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
                raise self._unreachable(error) from error

    @asynccontextmanager
    async def websocket(
        self, path: str, query: Sequence[tuple[str, str]]
    ) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A conversation with something in the cluster, for as long as the context lasts.

        :raises flame.runners.kubernetes_cluster.Refused: the answer is no.
        :raises flame.errors.RunnerError: there is no answer, or the connection breaks.
        """
        from kubernetes_asyncio.stream import WsApiClient

        async with WsApiClient(self._configuration) as client:
            try:
                asking = await client.call_api(
                    path, "GET", query_params=list(query), auth_settings=["BearerToken"], _preload_content=False
                )
                async with asyncio.timeout(_ANSWER):
                    socket: aiohttp.ClientWebSocketResponse = await asking
            except aiohttp.WSServerHandshakeError as error:
                raise _refused({"code": error.status, "message": error.message}) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise self._unreachable(error) from error
            try:
                yield socket
            except aiohttp.ClientError as error:
                raise self._unreachable(error) from error
            finally:
                await socket.close()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.close()

    async def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        timeout: aiohttp.ClientTimeout,
        body: Object | None = None,
    ) -> aiohttp.ClientResponse:
        for renewed in (False, True):
            try:
                response: aiohttp.ClientResponse = await self._client.call_api(
                    path,
                    method,
                    query_params=[(name, str(value)) for name, value in (query or {}).items()],
                    header_params={"Accept": "application/json"},
                    body=body,
                    auth_settings=["BearerToken"],
                    _preload_content=False,
                    _request_timeout=timeout,
                )
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise self._unreachable(error) from error
            if response.status < 300:
                return response
            async with response:
                status = await _status(response)
            if response.status != 401 or renewed:
                break
            await _authenticate(self._config, self._configuration)  # a token that ran out
        raise _refused(status)

    def _unreachable(self, error: Exception) -> RunnerError:
        said = str(error) or type(error).__name__
        return RunnerError(f"The cluster at {self._configuration.host} does not answer: {said}.")


class Watch:
    """All objects of a kind with a label, and every change of them, for as long as it runs.

    It begins with a list, follows what changes from there, and begins anew where the API server has forgotten its
    place. A connection that breaks is taken up again where it was; nothing is asked on a timer.

    :param listed: takes all that there are, at the beginning and whenever it is not known what has happened since.
    :param changed: takes a change: ``ADDED``, ``MODIFIED`` or ``DELETED``, and the object.
    """

    def __init__(
        self,
        cluster: Cluster,
        path: str,
        labels: str,
        *,
        listed: Callable[[Sequence[Object]], None],
        changed: Callable[[str, Object], None],
    ) -> None:
        self._cluster = cluster
        self._path = path
        self._query = {"labelSelector": labels}
        self._listed = listed
        self._changed = changed
        self._place: str | None = None
        self._wanted: list[asyncio.Future[None]] = []
        self._following: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run())

    async def refresh(self) -> None:
        """Ask for a new list, and wait until it was taken.

        :raises flame.errors.RunnerError: it cannot be had now.
        """
        wanted = asyncio.get_running_loop().create_future()
        self._wanted.append(wanted)
        if self._following is not None:
            self._following.cancel()
        await wanted

    async def close(self) -> None:
        """End it."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        for wanted in self._wanted:
            wanted.cancel()

    async def _run(self) -> None:
        pause, away = _PAUSES[0], False
        while True:
            answering, self._wanted = self._wanted, []
            try:
                if answering or self._place is None:
                    await self._list()
                    for wanted in answering:
                        if not wanted.done():
                            wanted.set_result(None)
                    answering = []
                if away:
                    log.info("the cluster's API server is back")
                pause, away = _PAUSES[0], False
                await self._interruptible(self._follow())
            except RunnerError as error:
                for wanted in answering:
                    if not wanted.done():
                        wanted.set_exception(error)
                if isinstance(error, Refused) and error.code == 410:
                    self._place = None
                    continue
                if not away:
                    log.warning("the pods cannot be watched, it is tried again: %s", error.message)
                away = True
                await self._interruptible(asyncio.sleep(pause * random.uniform(0.5, 1.0)))
                pause = min(2 * pause, _PAUSES[1])

    async def _interruptible(self, work: Any) -> None:
        """Do something until it is done, or a new list is wanted."""
        if self._wanted:
            work.close()
            return
        self._following = asyncio.ensure_future(work)
        try:
            await asyncio.wait([self._following])
        finally:
            self._following.cancel()
            following, self._following = self._following, None
            await asyncio.gather(following, return_exceptions=True)
        if not following.cancelled():
            following.result()

    async def _list(self) -> None:
        listing = await self._cluster.call("GET", self._path, query=self._query)
        self._listed(listing.get("items") or [])
        self._place = listing["metadata"]["resourceVersion"]

    async def _follow(self) -> None:
        query = {**self._query, "resourceVersion": self._place}
        async with aclosing(self._cluster.changes(self._path, query)) as events:
            async for event in events:
                if event["type"] != "BOOKMARK":
                    self._changed(event["type"], event["object"])
                self._place = event["object"]["metadata"]["resourceVersion"]


async def _authenticate(config: KubernetesConfig, configuration: Configuration) -> str:
    """Put the credentials into ``configuration``; gives the namespace that goes with them."""
    from kubernetes_asyncio import config as credentials

    try:
        if config.credentials is not None:
            text = yaml.safe_load(config.credentials.reveal())
            await credentials.load_kube_config_from_dict(text, config.context, configuration)
            return _namespace(text, config.context)
        path = config.kubeconfig or os.environ.get("KUBECONFIG")
        if path is None and (_ACCOUNT / "token").exists():
            credentials.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            return (_ACCOUNT / "namespace").read_text().strip()
        path = os.path.expanduser(path or "~/.kube/config")
        namespace = _namespace(yaml.safe_load(Path(path).read_text()), config.context)
        await credentials.load_kube_config(path, config.context, configuration, persist_config=False)
        return namespace
    except (credentials.ConfigException, OSError, yaml.YAMLError, AttributeError, TypeError, LookupError) as error:
        # Not the error's own words where they may quote what is secret.
        why = type(error).__name__ if config.credentials is not None else str(error)
        raise RunnerError(f"The cluster's credentials cannot be read: {why}") from error


def _namespace(kubeconfig: Mapping[str, Any], context: str | None) -> str:
    wanted = context or kubeconfig.get("current-context")
    for one in kubeconfig.get("contexts", ()):
        if one["name"] == wanted:
            return str(one["context"].get("namespace") or "default")
    return "default"


async def _status(response: aiohttp.ClientResponse) -> Object:
    """The Status with which a request was refused; something like one where a proxy has answered."""
    try:
        status: Object = msgspec.json.decode(await response.read(), type=dict[str, Any])
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
        status = {}
    return {"code": response.status, "message": response.reason, **status}


def _refused(status: Mapping[str, Any]) -> Refused:
    message, code = str(status.get("message") or "no reason given"), int(status.get("code") or 0)
    return Refused(f"The cluster refuses ({code}): {message}.", code, str(status.get("reason") or ""))
