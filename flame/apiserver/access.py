"""Who asks.

A server without users trusts whoever reaches it, so it listens on this machine alone unless told otherwise in so many
words. A browser on this machine reaches it too, in the name of any page that it shows. Such calls are told by what browsers say
about them (``Sec-Fetch-Site``, ``Origin``), and by the name under which they think they have found the server: a page's own
name made to point here (DNS rebinding) is none of the server's.

Once there are users, everyone shows a token: one of the server's own, the one that ``flame serve`` was started with, or
one of an identity provider. What whoever it is may do is decided elsewhere (:mod:`flame.apiserver.permissions`).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flame.apiserver.limiter import Limiter
from flame.apiserver.permissions import Access
from flame.controller.accounts import PREFIX, Accounts
from flame.errors import Forbidden, TooManyRequests, Unauthorized
from flame.spec.people import LOCAL, NOBODY, OPERATOR, Principal

if TYPE_CHECKING:
    from aiohttp import web

#: Who a token of an identity provider stands for; raises Unauthorized with a sentence.
Verifier = Callable[[str], Awaitable[Principal]]


class Guard:
    """Says who asks, or refuses.

    :param accounts: the users.
    :param token: the token of ``flame serve``; None: there is none.
    :param names: host names under which the server may be called, besides its addresses and ``localhost``.
    :param verifier: for tokens that are not the server's own.
    :param certificates: workers must show a certificate, too.
    """

    def __init__(
        self,
        accounts: Accounts,
        token: str | None,
        names: frozenset[str] = frozenset(),
        *,
        verifier: Verifier | None = None,
        certificates: bool = False,
    ) -> None:
        self._accounts = accounts
        self._token = token.encode() if token is not None else None
        self._names = names | {"localhost"}
        self._verifier = verifier
        self._certificates = certificates
        self.limiter = Limiter()

    @property
    def trusting(self) -> bool:
        """Whether nobody has to say who they are."""
        return self._token is None and self._verifier is None and not self._accounts.any

    async def admit(self, request: web.Request, access: Access) -> Principal:
        """Who asks. Keys of workers are checked with their task.

        :raises flame.errors.Unauthorized: a token is needed and not there, or no good.
        :raises flame.errors.Forbidden: a page of another site makes this request.
        """
        headers = request.headers
        if headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            raise Forbidden("Pages of other sites may not call this server.")
        origin = headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise Forbidden("Pages of other sites may not call this server.")
        if self.trusting and not self._known(request.host):
            raise Forbidden(f"This server is not called {request.host!r}: use its address, or start it with a token.")
        if access is Access.OPEN:
            return NOBODY
        if access in (Access.WORKER, Access.INVITED):  # the key or the invite itself is looked at by who has made it
            if self._certificates and not _certificate(request):
                raise Unauthorized("Workers must show a certificate here: set FLAME_TLS_CERT and FLAME_TLS_KEY.")
            return NOBODY
        return LOCAL if self.trusting else await self._who(request)

    async def _who(self, request: web.Request) -> Principal:
        shown = bearer(request)
        if shown is None:
            raise Unauthorized(
                "This server needs a token: `flame login` keeps one, or set FLAME_TOKEN, or token in the configuration file."
            )
        if self._token is not None and hmac.compare_digest(shown.encode(errors="replace"), self._token):
            return OPERATOR
        principal = self._accounts.principal(shown)
        if principal is not None:
            return principal
        if self._verifier is not None and not shown.startswith(PREFIX):
            if wait := self.limiter.blocked(request.remote or ""):  # a signature takes time to check
                raise _wait(wait)
            return await self._verifier(shown)
        raise Unauthorized("This is not this server's token, or it has expired or was revoked.")

    def refused(self, request: web.Request, error: Unauthorized) -> Unauthorized | TooManyRequests:
        """Count a refusal against the address that it went to; what to answer."""
        address = request.remote or ""
        if wait := self.limiter.blocked(address):
            return _wait(wait)
        if bearer(request) is not None:
            self.limiter.failed(address)
        return error

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


def _wait(seconds: int) -> TooManyRequests:
    return TooManyRequests(f"Too many wrong tokens came from your address; wait {seconds} s.", seconds)


def _certificate(request: web.Request) -> bool:
    """Whether the connection shows a certificate. One that was not good has ended its handshake."""
    transport = request.transport
    return bool(transport is not None and transport.get_extra_info("peercert"))


def bearer(request: web.Request) -> str | None:
    """The bearer token of a request, or None."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" and value.strip() else None
