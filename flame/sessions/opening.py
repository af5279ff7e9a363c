"""How a connection begins, in asyncio: an HTTP request that asks for the connection itself."""

from __future__ import annotations

import asyncio

from flame.errors import ServerUnreachable
from flame.sessions import dialing
from flame.sessions.link import Link


class _Opening(asyncio.Protocol):
    """Reads the answer to the request that asks for the connection."""

    def __init__(self, link: Link) -> None:
        self.answered: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._link = link
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end or self.answered.done():
            return
        status = dialing.status(head)
        if status == 101:
            assert self._transport is not None
            self._transport.set_protocol(self._link)
            self._link.connection_made(self._transport)
            self.answered.set_result((status, b""))
            if rest:
                self._link.data_received(rest)
        elif len(rest) >= _content_length(head):
            self.answered.set_result((status, rest))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_result((0, b""))


async def open_link(server: str, path: str, token: str | None, link: Link) -> None:
    """Connect a link with a server.

    :raises flame.sessions.dialing.Refused: the server does not want this caller.
    :raises flame.errors.ServerUnreachable: nothing answers, or no Flame server does.
    """
    address = dialing.parse(server)
    loop = asyncio.get_running_loop()
    opening = _Opening(link)
    try:
        async with asyncio.timeout(dialing.PATIENCE):
            transport, _ = await loop.create_connection(
                lambda: opening, address.host, address.port, ssl=dialing.tls_context() if address.tls else None
            )
            transport.write(dialing.request(address, path, token))
            status, body = await opening.answered
    except (OSError, TimeoutError) as error:
        raise ServerUnreachable(
            f"No server answers at {server} ({error or 'it took too long'}). Start one with `flame serve`, or name another "
            "with FLAME_SERVER or `flame config set server URL`."
        ) from error
    if status != 101:
        transport.abort()
        message = f"The server at {server} refused a session's connection ({status})."
        raise dialing.Refused(message, status, body) if 400 <= status < 500 else ServerUnreachable(message)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return 0
