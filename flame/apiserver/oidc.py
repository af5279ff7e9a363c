"""Tokens of an identity provider (OpenID Connect): who they stand for.

A token is a statement that the provider has signed. Its keys are fetched from where the provider says (discovery), and kept; one
that is not known is looked for anew, at most every half minute, so keys may be rotated at any time and nobody can make
the server ask without end. What a token says of its bearer, its claims, is translated by the operator's rules into a role and
projects. Whoever no rule fits is not let in.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from flame.errors import Forbidden, MissingExtra, ServerUnreachable, Unauthorized, UsageError
from flame.spec.people import DEFAULT_PROJECT, Principal, UserRole

#: Signatures that are accepted: none that rests on a shared secret, and not "none".
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
#: Seconds for which keys are good without another look, after which an unknown key is looked for again, and any at all.
KEPT = 600.0
AGAIN = 30.0
SOON = 2.0
#: Seconds that the provider gets, and the most bytes that it may answer.
PATIENCE = 10.0
_MOST = 1 << 20
#: Clocks differ by so many seconds.
_LEEWAY = 30
#: Tokens that were checked lately, and for how long that is believed.
_REMEMBERED = 1000
_BELIEVED = 60.0
_ORDER = (UserRole.ADMIN, UserRole.USER, UserRole.PARTICIPANT, UserRole.VIEWER)


@dataclass(frozen=True, kw_only=True)
class OidcSettings:
    """What an operator has set.

    :ivar issuer: the provider's address, as in its tokens.
    :ivar audience: for whom tokens must have been made out.
    :ivar name_claim: what names somebody.
    :ivar group_claim: what holds their groups: a name, or several with dots for one within another.
    :ivar roles: role by group; the highest one counts.
    :ivar projects: project by group.
    :ivar default_role: of those whom no rule fits; None: they are not let in.
    """

    issuer: str
    audience: str
    name_claim: str = "sub"
    group_claim: str = "groups"
    roles: Mapping[str, UserRole] = field(default_factory=dict)
    projects: Mapping[str, str] = field(default_factory=dict)
    default_role: UserRole | None = None


class Oidc:
    """Checks tokens of one provider.

    :param settings: the operator's choices.
    :raises flame.errors.UsageError: the issuer is no address, or one that anyone on the way could pose as.
    :raises flame.errors.MissingExtra: the library is not installed.
    """

    def __init__(self, settings: OidcSettings) -> None:
        try:
            import jwt
        except ImportError as error:
            raise MissingExtra("jwt", "oidc", "Accepting tokens of an identity provider") from error
        self._jwt: Any = jwt
        _check_address(settings.issuer)
        self._settings = settings
        self._keys: dict[str, Any] = {}
        self._fetched = self._tried = float("-inf")
        self._fetching = asyncio.Lock()
        self._seen: dict[str, tuple[float, Principal]] = {}

    async def __call__(self, token: str) -> Principal:
        """Who a token stands for.

        :raises flame.errors.Unauthorized: it is not the provider's, not for this server, or no longer good.
        :raises flame.errors.Forbidden: it is, and no rule gives its bearer a role.
        :raises flame.errors.ServerUnreachable: the provider's keys cannot be had.
        """
        digest = hashlib.sha256(token.encode(errors="replace")).hexdigest()
        until, principal = self._seen.get(digest, (0.0, None))
        if principal is not None and time.time() < until:
            return principal
        claims = await self._claims(token)
        principal = self._principal(claims)
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[digest] = (min(float(claims["exp"]), time.time() + _BELIEVED), principal)
        return principal

    async def _claims(self, token: str) -> dict[str, Any]:
        settings = self._settings
        try:
            header = self._jwt.get_unverified_header(token)
            if header.get("alg") not in ALGORITHMS:
                raise Unauthorized("This token is signed in a way that is not accepted here.")
            key = await self._key(str(header.get("kid", "")))
            claims: dict[str, Any] = self._jwt.decode(
                token,
                key,
                algorithms=[header["alg"]],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=_LEEWAY,
                options={"require": ["exp", "iss", "aud"]},
            )
        except self._jwt.ExpiredSignatureError as error:
            raise Unauthorized("This token has expired; get a new one from your identity provider.") from error
        except (self._jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
            raise Unauthorized(f"This token is not accepted: {_reason(error)}.") from error
        return claims

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        settings = self._settings
        name = claims.get(settings.name_claim)
        if not isinstance(name, str) or not name:
            raise Unauthorized(f"This token does not say who you are: it has no {settings.name_claim!r}.")
        groups = _groups(claims, settings.group_claim)
        given = {settings.roles[group] for group in groups if group in settings.roles}
        role = next((one for one in _ORDER if one in given), settings.default_role)
        if role is None:
            raise Forbidden("Your identity provider vouches for you, but none of your groups may use this server.")
        projects = tuple(dict.fromkeys(settings.projects[group] for group in groups if group in settings.projects))
        # Marked as the provider's, so that nobody there can go by the name of one of the server's own users.
        until = float(claims["exp"]) + _LEEWAY
        return Principal(f"oidc:{name[:200]}", role, projects or (DEFAULT_PROJECT,), until=until)

    async def _key(self, kid: str) -> Any:
        """The provider's key of that id."""
        async with self._fetching:
            now = time.monotonic()
            stale = now - self._fetched > KEPT
            if (stale or kid not in self._keys) and now - self._tried > (AGAIN if self._keys else SOON):
                self._tried = now
                try:
                    self._keys = await self._fetch()
                    self._fetched = now
                except ServerUnreachable:
                    if kid not in self._keys:
                        raise
        if not self._keys:
            raise ServerUnreachable(f"The identity provider {self._settings.issuer} did not answer a moment ago.")
        if kid not in self._keys:
            raise Unauthorized("This token is signed with a key that your identity provider does not know.")
        return self._keys[kid]

    async def _fetch(self) -> dict[str, Any]:
        import aiohttp

        issuer = self._settings.issuer
        try:
            timeout = aiohttp.ClientTimeout(total=PATIENCE)
            async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as http:
                found = await _document(http, issuer.rstrip("/") + "/.well-known/openid-configuration")
                if found.get("issuer") != issuer:
                    raise ServerUnreachable(f"The identity provider at {issuer} calls itself {found.get('issuer')!r}.")
                _check_address(str(found["jwks_uri"]))
                given = await _document(http, str(found["jwks_uri"]))
            keys = {}
            for one in given["keys"]:
                if one.get("use", "sig") == "sig" and one.get("kty") in ("RSA", "EC", "OKP"):
                    keys[str(one.get("kid", ""))] = self._jwt.PyJWK(one)
        except (
            aiohttp.ClientError,
            OSError,
            TimeoutError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            raise ServerUnreachable(
                f"The keys of the identity provider {issuer} cannot be had ({_reason(error)})."
            ) from error
        except self._jwt.PyJWTError as error:
            raise ServerUnreachable(f"The identity provider {issuer} has keys that cannot be read.") from error
        except UsageError as error:
            raise ServerUnreachable(error.message) from error
        return keys


async def _document(http: Any, url: str) -> dict[str, Any]:
    async with http.get(url, allow_redirects=False) as answer:
        answer.raise_for_status()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        data = await answer.content.read(_MOST)
    import msgspec

    return msgspec.json.decode(data, type=dict[str, Any])


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    near = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and near)):
        raise UsageError(f"The identity provider's address {url!r} must begin with https://.")


def _groups(claims: Mapping[str, Any], path: str) -> list[str]:
    """What a claim holds, as a list; ``a.b`` is ``b`` within ``a``, where there is no claim of the whole name."""
    found: Any = claims.get(path)
    if found is None:
        found = claims
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return [found]
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def _reason(error: BaseException) -> str:
    text = "it took too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    return text.rstrip(".")[:200]
