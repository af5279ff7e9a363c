"""Reading ``host:port``, the form in which a configuration's ``brokers`` name a meeting point."""

from __future__ import annotations

from flame.errors import SpecError


def split_hostport(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Take ``host:port`` apart.

    :param text: such as ``localhost:10104``, ``10.1.0.4``, ``[::1]:1883``, or with a scheme that is passed over (``mqtt://host``).
    :param default_port: used where the text names no port; None makes the port mandatory.
    :returns: the host, without brackets, and the port (1 to 65535).
    :raises flame.errors.SpecError: the text names no host, or no usable port.
    """
    rest = text.strip().partition("://")[2] or text.strip()
    rest = rest.rstrip("/")
    if rest.startswith("["):
        host, _, tail = rest[1:].partition("]")
        port_text = tail.removeprefix(":")
    elif rest.count(":") > 1:  # an IPv6 address without brackets has no port
        host, port_text = rest, ""
    else:
        host, _, port_text = rest.partition(":")
    if not port_text and default_port is not None:
        port_text = str(default_port)
    if not host or not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        raise SpecError(f"{text!r} is not an address; write host:port, such as localhost:10104.", where="brokers")
    return host, int(port_text)
