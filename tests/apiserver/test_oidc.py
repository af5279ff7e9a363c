"""Tokens of an identity provider: a real one, with its own keys, on this machine."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from flame.apiserver import oidc as module
from flame.apiserver.oidc import Oidc, OidcSettings
from flame.client import Client
from flame.client.http import Session
from flame.errors import FlameError, Forbidden, ServerUnreachable, Unauthorized, UsageError
from flame.spec.people import ProjectForm, UserForm, UserRole


class Provider:
    """An identity provider."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked = 0
        self.issuer = ""
        self.down = False
        self.calls_itself: str | None = None
        self.new_key("first")

    def new_key(self, kid: str, *, curve: bool = False) -> None:
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1()) if curve else rsa.generate_private_key(65537, 2048)

    def token(self, kid: str = "first", *, algorithm: str = "RS256", key: Any = None, **claims: Any) -> str:
        now = int(time.time())
        said = {"iss": self.issuer, "aud": "flame", "sub": "uma", "iat": now, "exp": now + 300, **claims}
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode(said, key or self.keys[kid], algorithm=algorithm, headers={"kid": kid})

    async def discovery(self, request: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=500)
        return web.json_response({"issuer": self.calls_itself or self.issuer, "jwks_uri": f"{self.issuer}/keys"})

    async def jwks(self, request: web.Request) -> web.Response:
        self.asked += 1
        found = []
        for kid, key in self.keys.items():
            kind = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
            plain = jwt.get_algorithm_by_name(kind).to_jwk(key.public_key(), as_dict=True)
            found.append({**plain, "kid": kid, "use": "sig"})
        return web.json_response({"keys": found})


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    one = Provider()
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", one.discovery)
    app.router.add_get("/keys", one.jwks)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.issuer = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


def rules(provider: Provider, **changed: Any) -> OidcSettings:
    given: dict[str, Any] = {
        "issuer": provider.issuer,
        "audience": "flame",
        "roles": {"staff": UserRole.USER, "chiefs": UserRole.ADMIN, "sites": UserRole.PARTICIPANT},
        "projects": {"staff": "red"},
    }
    return OidcSettings(**{**given, **changed})


async def test_who_the_provider_vouches_for_comes_in_with_the_role_of_their_groups(
    provider: Provider, make_server: Any
) -> None:
    async with make_server(oidc=rules(provider)) as served:
        await served.server.controller.accounts.create_project(ProjectForm(name="red"))
        with pytest.raises(Unauthorized, match="needs a token"):
            await served.client.info()
        async with Client(served.url, provider.token(groups=["staff", "others"])) as uma:
            known = await uma.whoami()
            assert (known.name, known.role, known.projects) == ("oidc:uma", UserRole.USER, ["red"])
            design = await uma.designs.create("digits")
            assert (design.project, design.owner) == ("red", "oidc:uma")
            with pytest.raises(Forbidden):
                await uma.users.list()
        async with Client(served.url, provider.token(sub="ada", groups=["staff", "chiefs"])) as ada:
            assert (await ada.whoami()).role is UserRole.ADMIN
            made = await ada.users.create(UserForm(name="uma", role=UserRole.ADMIN))
        async with Client(served.url, made.token.token) as local:  # the server's own users come in beside them
            assert (await local.whoami()).name == "uma"
        async with Client(served.url, provider.token(groups=["strangers"])) as stranger:
            with pytest.raises(Forbidden, match="none of your groups"):
                await stranger.info()
    assert provider.asked == 1


def forged(provider: Provider) -> dict[str, tuple[str, str]]:
    """Tokens that are not to be believed, and words of the refusal."""
    past = int(time.time()) - 1000
    other = rsa.generate_private_key(65537, 2048)
    public = provider.keys["first"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    def by_hand(header: dict[str, str], key: bytes | None) -> str:
        claims = {"iss": provider.issuer, "aud": "flame", "sub": "eve", "exp": time.time() + 99, "groups": ["chiefs"]}
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
        signed = b".".join(parts)
        signature = hmac.digest(key, signed, hashlib.sha256) if key else b""
        return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()

    good = provider.token(groups=["chiefs"])
    head, _, signature = good.split(".")
    body = base64.urlsafe_b64encode(
        json.dumps({"iss": provider.issuer, "aud": "flame", "sub": "eve", "exp": time.time() + 99}).encode()
    ).rstrip(b"=")
    return {
        "expired": (provider.token(exp=past), "has expired"),
        "endless": (provider.token(exp=None), "not accepted"),
        "for somebody else": (provider.token(aud="another"), "not accepted"),
        "for nobody": (provider.token(aud=None), "not accepted"),
        "of another issuer": (provider.token(iss="https://evil.example"), "not accepted"),
        "of another key": (provider.token(key=other), "not accepted"),
        "unsigned": (by_hand({"alg": "none", "kid": "first"}, None), "not accepted here"),
        "signed with the public key": (by_hand({"alg": "HS256", "kid": "first"}, pem), "not accepted here"),
        "changed": (f"{head}.{body.decode()}.{signature}", "not accepted"),
        "not yet good": (provider.token(nbf=int(time.time()) + 1000), "not accepted"),
        "of an unknown key": (provider.token("first", key=other).replace(head, _head("nobody")), "does not know"),
        "of nobody": (provider.token(sub=None, groups=["chiefs"]), "who you are"),
        "rubbish": ("rubbish", "not accepted"),
        "more rubbish": ("a.b.c", "not accepted"),
    }


def _head(kid: str) -> str:
    plain = json.dumps({"alg": "RS256", "typ": "JWT", "kid": kid}).encode()
    return base64.urlsafe_b64encode(plain).rstrip(b"=").decode()


async def test_what_is_forged_is_refused_with_a_sentence(provider: Provider, make_server: Any) -> None:
    async with make_server(oidc=rules(provider, default_role=UserRole.VIEWER)) as served:
        for what, (token, words) in forged(provider).items():
            async with Session(served.url, token) as session:
                with pytest.raises(Unauthorized) as refused:
                    await session.call("GET", "/v1/server")
            assert words in str(refused.value), what
            assert token not in str(refused.value), what


async def test_keys_are_rotated_without_a_restart(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = Oidc(rules(provider))
    await verify(provider.token(groups=["staff"]))
    provider.new_key("second", curve=True)
    fresh = provider.token("second", algorithm="ES256", groups=["staff"])
    with pytest.raises(Unauthorized, match="does not know"):  # it was asked a moment ago
        await verify(fresh)
    assert provider.asked == 1
    monkeypatch.setattr(module, "AGAIN", 0.0)
    assert (await verify(fresh)).role is UserRole.USER
    assert provider.asked == 2
    del provider.keys["first"]
    monkeypatch.setattr(module, "KEPT", 0.0)
    gone = provider.token("second", key=rsa.generate_private_key(65537, 2048), groups=["staff"], sub="x")
    with pytest.raises(Unauthorized):
        await verify(gone)


async def test_many_strangers_make_it_ask_once(provider: Provider) -> None:
    verify = Oidc(rules(provider))
    tokens = [provider.token(key=provider.keys["first"], jti=str(i), groups=["staff"]) for i in range(20)]
    strange = [token.replace(token.split(".")[0], _head(f"k{i}")) for i, token in enumerate(tokens)]
    results = await asyncio.gather(*(verify(token) for token in strange), return_exceptions=True)
    assert all(isinstance(one, Unauthorized) for one in results)
    assert provider.asked == 1


async def test_a_provider_that_is_away_is_said_and_its_known_keys_go_on(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Oidc(rules(provider))
    provider.down = True
    with pytest.raises(ServerUnreachable, match="cannot be had"):
        await verify(provider.token(groups=["staff"]))
    provider.down = False
    with pytest.raises(ServerUnreachable, match="a moment ago"):
        await verify(provider.token(groups=["staff"]))
    monkeypatch.setattr(module, "SOON", 0.0)
    await verify(provider.token(groups=["staff"]))
    provider.down = True
    monkeypatch.setattr(module, "KEPT", 0.0)
    monkeypatch.setattr(module, "AGAIN", 0.0)
    assert (await verify(provider.token(groups=["staff"], sub="ben"))).name == "oidc:ben"


async def test_a_provider_under_another_name_is_not_believed(provider: Provider) -> None:
    provider.calls_itself = "https://evil.example"
    with pytest.raises(ServerUnreachable, match="calls itself"):
        await Oidc(rules(provider))(provider.token(groups=["staff"]))


async def test_groups_may_lie_within_a_claim(provider: Provider) -> None:
    verify = Oidc(rules(provider, group_claim="realm_access.roles", name_claim="email"))
    principal = await verify(provider.token(realm_access={"roles": ["sites"]}, email="site@example.org"))
    assert (principal.name, principal.role) == ("oidc:site@example.org", UserRole.PARTICIPANT)
    for odd in (None, 3, {"roles": "sites"}, {"roles": [1, None]}, ["roles"]):
        with pytest.raises(FlameError):
            await verify(provider.token(realm_access=odd, email=["x"], sub=str(odd)))


def test_a_provider_must_be_one_that_nobody_can_pose_as() -> None:
    for issuer in ("http://example.org", "example.org", "ftp://localhost"):
        with pytest.raises(UsageError, match="https://"):
            Oidc(OidcSettings(issuer=issuer, audience="flame"))
