"""How a connection begins: an HTTP request that asks for the connection itself. For blocking sockets; see ``opening`` for asyncio.

Kept free of heavy imports, as executors start with it.
"""

from __future__ import annotations

import socket
from typing import Any, NamedTuple

from flame.errors import ServerUnreachable, UsageError
from flame.sessions.sockets import alive
from flame.sessions.wire import UPGRADE

#: Seconds that opening a connection may take.
PATIENCE = 10.0
_HEAD = 1 << 16


class Refused(ServerUnreachable):
    """The server answers, and does not let this caller in.

    :ivar answer: the HTTP answer's status.
    :ivar body: what it says.
    """

    def __init__(self, message: str, answer: int, body: bytes) -> None:
        super().__init__(message)
        self.answer = answer
        self.body = body


class Address(NamedTuple):
    """A server's address, taken apart."""

    host: str
    port: int
    tls: bool
    prefix: str = ""


def parse(server: str) -> Address:
    """Take an address apart.

    :raises flame.errors.UsageError: it is none.
    """
    scheme, _, rest = server.partition("://")
    place, slash, path = rest.partition("/")
    host, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        host, port = place, {"http": "80", "https": "443"}.get(scheme, "")
    if scheme not in ("http", "https") or not host or not port.isdecimal():
        raise UsageError(f"{server!r} is not a server's address; write it like http://127.0.0.1:10100.")
    return Address(host.strip("[]"), int(port), scheme == "https", (slash + path).rstrip("/"))


def request(address: Address, path: str, token: str | None) -> bytes:
    """The bytes that ask for the connection."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"GET {address.prefix}{path} HTTP/1.1",
        f"Host: {host}:{address.port}",
        "Connection: Upgrade",
        f"Upgrade: {UPGRADE}",
    ]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, "", ""]).encode()


def status(head: bytes) -> int:
    """The status in an answer's head; 0 where it is none."""
    words = head.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else 0


def tls_context() -> Any:
    """How a server is known, and what is shown to it: see :mod:`flame.client.tls`."""
    from flame.client.tls import Tls

    return Tls.read().context()


def dial(server: str, path: str, token: str | None) -> socket.socket:
    """A connection, ready for frames.

    :raises OSError: nothing answers.
    :raises flame.sessions.dialing.Refused: the server does not want this caller.
    :raises flame.errors.ServerUnreachable: what answers is no such server.
    """
    address = parse(server)
    connection = socket.create_connection(address[:2], timeout=PATIENCE)
    try:
        if address.tls:
            connection = tls_context().wrap_socket(connection, server_hostname=address.host)
        alive(connection)
        connection.sendall(request(address, path, token))
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(1024)
            if not piece or len(head) > _HEAD:
                raise ServerUnreachable(f"What answers at {server} is no Flame server.")
            head += piece
        answer = status(head)
        if answer != 101:
            refused = answer in (401, 403, 404)
            message = f"The server at {server} refused the connection ({answer})."
            raise Refused(message, answer, b"") if refused else ServerUnreachable(message)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection
