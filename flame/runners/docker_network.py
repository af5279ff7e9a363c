"""How a container finds the server.

A server that listens on this host is ``127.0.0.1`` to its neighbours, and something else to containers, which have a loopback of their
own: the engine's host has a name for them. Workers find each other by themselves: each looks up the address that it has on its
way to the server, which is the container's own in its network (see :mod:`flame.sdk.backends.p2p_address`).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from flame.errors import RunnerError
from flame.runners.docker_engine import Engine, log

#: The engine's host, as containers call it.
HOST = "host.docker.internal"
_PATIENCE = 2.0


class Route:
    """The way from the containers of a network to the server.

    :param network: the containers' network.
    """

    def __init__(self, engine: Engine, network: str) -> None:
        self._engine = engine
        self._network = network
        self._open: set[int] = set()

    async def lead(self, environment: Mapping[str, str]) -> dict[str, str]:
        """A worker's environment, in which the server has an address that leads there from within a container.

        :raises flame.errors.RunnerError: none does, since the server listens to its own machine alone.
        """
        url = environment.get("FLAME_SERVER", "")
        parts = urlsplit(url)
        if self._network == "host" or not parts.hostname or not _is_loopback(parts.hostname):
            return dict(environment)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        await self._try(port, url)
        return {**environment, "FLAME_SERVER": parts._replace(netloc=f"{HOST}:{port}").geturl()}

    async def _try(self, port: int, url: str) -> None:
        """Look whether the server can be reached at the address that the engine's host has for containers."""
        gateway = await self._gateway()
        if port in self._open or gateway is None:
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                _, writer = await asyncio.open_connection(gateway, port)
            writer.close()
        except ConnectionRefusedError:
            raise RunnerError(
                f"Containers cannot reach the server at {url}, since it listens to this machine alone. Start it with "
                "--host 0.0.0.0 and a token, or give the compute the address at which its workers find it (`server`)."
            ) from None
        except (OSError, TimeoutError) as error:  # the engine is elsewhere, in a virtual machine perhaps
            log.debug("whether containers reach %s through %s cannot be told: %s", url, gateway, error)
        self._open.add(port)

    async def _gateway(self) -> str | None:
        """The address of the engine's host on the default bridge; None where it is not on this machine."""
        if not self._engine.local:
            return None
        found = await self._engine.find("inspect_network", "bridge")
        configs = (found or {}).get("IPAM", {}).get("Config") or []
        return next((config["Gateway"] for config in configs if config.get("Gateway")), None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
