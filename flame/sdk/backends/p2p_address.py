"""Where a worker listens, and as what others find it.

An address is ``tcp://HOST:PORT``, or ``unix:HOSTID/NAME``: an abstract unix socket, which exists in one network namespace
of one running kernel. HOSTID names both, so that a peer knows without trying whether it is on the same host; two
containers on one machine are not.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from flame.sdk.backends import shm

_BACKLOG = 512
_ANY = "0.0.0.0"  # noqa: S104 - peers on other hosts must reach it; who connects must know the job's secret


@functools.cache
def host_id() -> str:
    """Names this kernel since its start, and this network namespace; empty where there are no abstract sockets."""
    if not sys.platform.startswith("linux") or not shm.available():
        return ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}.{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return ""


def listen_unix() -> tuple[socket.socket, str] | None:
    """A listening abstract socket and its address; None where there are none."""
    if not host_id():
        return None
    name = "flame-" + secrets.token_hex(8)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(_BACKLOG)
    return sock, f"unix:{host_id()}/{name}"


def listen_tcp(options: Mapping[str, Any], broker: str | None) -> tuple[socket.socket, str]:
    """A listening TCP socket and its address.

    ``FLAME_P2P_HOST`` (or the option ``host``) is the name or address under which others reach this worker, ``FLAME_P2P_PORT``
    (``port``) the port, ``FLAME_P2P_BIND`` (``bind``) what to listen on, such as ``0.0.0.0`` in a container whose name is
    mapped. Without them: the loopback interface where the control plane or the meeting point is there, else this host's
    address on the way to them.

    :raises OSError: it cannot listen there.
    """
    host = str(options.get("host") or os.environ.get("FLAME_P2P_HOST") or own_host(broker))
    bind = str(options.get("bind") or os.environ.get("FLAME_P2P_BIND") or _bind_address(host))
    port = int(options.get("port") or os.environ.get("FLAME_P2P_PORT") or 0)
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((bind, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    return sock, f"tcp://{shown}:{sock.getsockname()[1]}"


def own_host(broker: str | None) -> str:
    """This host's address as seen from the control plane or the meeting point; loopback where they are on it."""
    for url in (os.environ.get("FLAME_SERVER"), broker and f"//{broker.rpartition('//')[2]}"):
        parts = urlsplit(url) if url else None
        if parts is None or not parts.hostname:
            continue
        if parts.hostname == "localhost" or _is_loopback(parts.hostname):
            return "127.0.0.1"
        try:
            info = socket.getaddrinfo(parts.hostname, parts.port or 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
                probe.connect(info[4])  # sends nothing; only the route is looked up
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return "127.0.0.1"


def dialable(addresses: list[str], *, same_host: bool = True) -> list[str]:
    """Those of a peer's addresses that can lead to it from here, best first.

    :param same_host: whether addresses of this host alone are wanted at all.
    """
    mine = f"unix:{host_id()}/"
    usable = [a for a in addresses if a.startswith("tcp://") or (same_host and host_id() and a.startswith(mine))]
    return sorted(usable, key=lambda address: not address.startswith("unix:"))


def target(address: str) -> tuple[socket.AddressFamily, Any] | None:
    """Family and socket address to connect to; None where a name must be looked up first.

    :raises ValueError: the address is none.
    """
    if address.startswith("unix:"):
        return socket.AF_UNIX, "\0" + address.rpartition("/")[2]
    host, port = split(address)
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None
    return family, (host, port)


def split(address: str) -> tuple[str, int]:
    """Host and port of a ``tcp://`` address.

    :raises ValueError: it is none.
    """
    parts = urlsplit(address)
    if not parts.hostname or not parts.port:
        raise ValueError(f"{address!r} is no address")
    return parts.hostname, parts.port


def _bind_address(host: str) -> str:
    try:
        return host if ipaddress.ip_address(host).is_loopback else ("::" if ":" in host else _ANY)
    except ValueError:
        return "127.0.0.1" if host == "localhost" else _ANY


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
