"""Who may call what.

A server without a token trusts whoever reaches it, so it listens on this machine alone unless told otherwise in so many
words. A browser on this machine reaches it too, in the name of any page that it shows. Such calls are told by what browsers say
about them (``Sec-Fetch-Site``, ``Origin``), and by the name under which they think they have found the server: a page's own
name made to point here (DNS rebinding) is none of the server's.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flame.apiserver.routes import Access
from flame.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from aiohttp import web


class Guard:
    """Lets requests in or refuses them.

    :param token: what users must show; None: nobody needs one.
    :param names: host names under which the server may be called, besides its addresses and ``localhost``.
    """

    def __init__(self, token: str | None, names: frozenset[str] = frozenset()) -> None:
        self._token = token.encode() if token is not None else None
        self._names = names | {"localhost"}

    def check(self, request: web.Request, access: Access) -> None:
        """Refuse a request that may not be made. Keys of workers are checked with their task.

        :raises flame.errors.Unauthorized: a token is needed and not there, or wrong.
        :raises flame.errors.Forbidden: a page of another site makes this request.
        """
        headers = request.headers
        if headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            raise Forbidden("Pages of other sites may not call this server.")
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise Forbidden("Pages of other sites may not call this server.")
        if self._token is None and not self._known(request.host):
            raise Forbidden(f"This server is not called {request.host!r}: use its address, or start it with a token.")
        if access is Access.USER and self._token is not None:
            shown = bearer(request)
            if shown is None:
                raise Unauthorized("This server needs a token: set FLAME_TOKEN, or token in the configuration file.")
            if not hmac.compare_digest(shown.encode(errors="replace"), self._token):
                raise Unauthorized("This is not this server's token.")

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def bearer(request: web.Request) -> str | None:
    """The bearer token of a request, or None."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" and value.strip() else None
