"""Who gets in, how often one may be wrong, and what is written down of it."""

from __future__ import annotations

import asyncio
import io
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.apiserver.audit import Audit
from flame.apiserver.limiter import ADDRESSES, Limiter
from flame.client import Client
from flame.controller.accounts import PREFIX, Accounts
from flame.controller.standing import Standing
from flame.errors import Conflict, NotFound, SpecError, StoreError, TooManyRequests, Unauthorized, UsageError
from flame.process import run_server
from flame.serve import ServeSettings, serve
from flame.spec.people import LOCAL, NewToken, NewUser, Principal, TokenForm, UserForm, UserRole
from flame.store import Store, open_store

# ------------------------------------------------------------------------------------------------- the limiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_address_may_be_wrong_so_often_and_then_as_often_as_time_allows() -> None:
    clock = Clock()
    limiter = Limiter(burst=3, every=10, clock=clock)
    for _ in range(3):
        assert limiter.blocked("a") == 0
        limiter.failed("a")
    wait = limiter.blocked("a")
    assert 0 < wait <= 11
    assert limiter.blocked("b") == 0
    clock.now += wait
    assert limiter.blocked("a") == 0
    limiter.failed("a")
    assert limiter.blocked("a") > 0


@given(st.lists(st.floats(0, 30), max_size=60))
def test_no_more_failures_pass_than_the_bucket_holds_and_time_gives(steps: list[float]) -> None:
    clock = Clock()
    limiter = Limiter(burst=5, every=4, clock=clock)
    passed = 0
    for step in steps:
        clock.now += step
        if not limiter.blocked("a"):
            passed += 1
            limiter.failed("a")
    assert passed <= 5 + (clock.now - 1000.0) / 4 + 1


def test_the_limiter_forgets_rather_than_grow() -> None:
    limiter = Limiter()
    for number in range(ADDRESSES + 500):
        limiter.failed(str(number))
    assert len(limiter._full_at) == ADDRESSES


async def test_who_is_wrong_too_often_has_to_wait_and_a_neighbour_with_a_token_does_not(make_server: Any) -> None:
    async with make_server(token="a token that is long") as served:
        served.server.api.guard.limiter = Limiter(burst=4, every=60)
        async with Client(served.url, "wrong") as liar:
            for _ in range(4):
                with pytest.raises(Unauthorized):
                    await liar.info()
            with pytest.raises(TooManyRequests, match="Too many wrong tokens"):
                await liar.info()
        assert (await served.client.info()).version
        headers = {"Authorization": "Bearer wrong"}
        async with served.http.get(served.url + "/v1/server", headers=headers) as response:
            assert response.status == 429
            assert 0 < int(response.headers["Retry-After"]) <= 61


async def test_a_worker_s_wrong_key_counts_too(served: Any) -> None:
    served.server.api.guard.limiter = Limiter(burst=2, every=60)
    headers = {"Authorization": "Bearer wrong"}
    path = f"/v1/tasks/{'0' * 40}/manifest?attempt=1"
    assert [(await served.call("GET", path, headers=headers))[0] for _ in range(3)] == [401, 401, 429]


# -------------------------------------------------------------------------------------------------- accounts


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = open_store("sqlite:///state.db", tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def accounts(store: Store) -> Accounts:
    made = Accounts(store, Standing())
    await made.open()
    return made


async def test_what_is_kept_of_a_token_is_no_use_to_who_reads_the_store(store: Store, accounts: Accounts) -> None:
    made = await accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))
    secret = made.token.token
    assert secret.startswith(PREFIX)
    assert len(secret) >= len(PREFIX) + 43
    kept = json.dumps([document.body for document in await store.find("tokens")])
    assert secret not in kept
    assert secret.removeprefix(PREFIX) not in kept
    again = Accounts(store, Standing())
    await again.open()
    found = again.principal(secret)
    assert found is not None
    assert (found.name, found.role) == ("ada", UserRole.ADMIN)
    assert again.principal(secret[:-1]) is None
    assert again.principal(made.token.id) is None


async def test_what_was_made_with_a_token_goes_with_it_if_asked_for(store: Store, accounts: Accounts) -> None:
    def holder(secret: str) -> Principal:
        found = accounts.principal(secret)
        assert found is not None
        return found

    root = (await accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))).token
    stolen = await accounts.create_token(TokenForm(), holder(root.token))
    child = await accounts.create_token(TokenForm(), holder(stolen.token))
    grandchild = await accounts.create_token(TokenForm(), holder(child.token))
    ben = (await accounts.create_user(UserForm(name="ben"), holder(stolen.token))).token
    other = await accounts.create_token(TokenForm(), holder(root.token))
    eve = (await accounts.create_user(UserForm(name="eve"))).token
    assert (root.made_by, stolen.made_by, ben.made_by) == ("", root.id, stolen.id)
    await accounts.revoke(stolen.id, holder(root.token))
    assert accounts.principal(child.token) is not None  # somebody may have made it in good faith
    with pytest.raises(NotFound):
        await accounts.revoke(stolen.id, holder(eve.token), descendants=True)  # none of them is hers
    await accounts.revoke(stolen.id, holder(root.token), descendants=True)
    again = Accounts(store, Standing())
    await again.open()
    for place in (accounts, again):
        good = [
            token.id for token in (root, stolen, child, grandchild, ben, other, eve) if place.principal(token.token)
        ]
        assert good == [root.id, other.id, eve.id]


async def test_nothing_is_made_with_a_token_while_it_is_revoked(store: Store, accounts: Accounts) -> None:
    await accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))
    refused = 0
    for number in range(20):
        stolen = await accounts.create_token(TokenForm(user="ada"), LOCAL)
        thief = accounts.principal(stolen.token)
        assert thief is not None
        work = [
            accounts.create_token(TokenForm(description="theirs"), thief),
            accounts.revoke(stolen.id, LOCAL, descendants=True),
            accounts.create_user(UserForm(name=f"thief-{number}"), thief),
        ]
        ended = await asyncio.gather(*work, return_exceptions=True)
        refused += sum(isinstance(one, Unauthorized) for one in ended)
        assert all(one is None or isinstance(one, Unauthorized | NewToken | NewUser) for one in ended), ended
        assert not [token for token in accounts.tokens(LOCAL) if token.made_by == stolen.id]
        assert {user.name for user in accounts.users()} == {user.body["name"] for user in await store.find("users")}
    assert refused


async def test_tokens_end(accounts: Accounts) -> None:
    await accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))
    short = await accounts.create_token(TokenForm(user="ada", days=1e-12), LOCAL)
    assert accounts.principal(short.token) is None
    assert short.id in {token.id for token in accounts.tokens(LOCAL)}  # it is shown, as people wonder
    long = await accounts.create_token(TokenForm(user="ada"), LOCAL)
    assert accounts.principal(long.token) is not None
    await accounts.revoke(long.id, LOCAL)
    assert accounts.principal(long.token) is None
    with pytest.raises(NotFound):
        await accounts.revoke(long.id, LOCAL)
    with pytest.raises(Conflict, match="already"):
        await accounts.create_user(UserForm(name="ada"))
    with pytest.raises(SpecError, match="no project 'red'"):
        await accounts.create_user(UserForm(name="uma", projects=["red"]))


async def test_names_are_plain(served: Any) -> None:
    for name in ("", "a b", "a/b", "../a", "a\n", "é", "a" * 64, "-a"):
        status, answer = await served.call("POST", "/v1/users", json={"name": name, "role": "admin"})
        assert status == 422, (name, answer)
    for name in ("ada", "ada@example.org", "a.b-c_d", "a" * 63):
        status, _ = await served.call("POST", "/v1/projects", json={"name": name})
        assert status == 201


# --------------------------------------------------------------------------------------------------- openness


def test_beyond_this_machine_it_wants_tls_and_users_or_so_many_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--insecure-plain-http"):
        run_server(ServeSettings(host="0.0.0.0", port=0, data_dir=tmp_path, token="a token that is long"))
    with pytest.raises(UsageError, match="could run code here"):
        run_server(ServeSettings(host="0.0.0.0", port=0, data_dir=tmp_path, insecure_plain_http=True))


async def test_it_listens_beyond_this_machine_once_there_are_users(tmp_path: Path) -> None:
    settings = ServeSettings(host="0.0.0.0", port=0, data_dir=tmp_path, insecure_plain_http=True)
    async with serve(ServeSettings(port=0), tmp_path) as server, Client(server.url) as client:
        made = await client.users.create(UserForm(name="ada", role=UserRole.ADMIN))
    async with serve(settings, tmp_path) as server:
        port = server.url.rpartition(":")[2]
        async with Client(f"http://127.0.0.1:{port}") as stranger:
            with pytest.raises(Unauthorized):
                await stranger.info()
        async with Client(f"http://127.0.0.1:{port}", made.token.token) as ada:
            assert (await ada.whoami()).name == "ada"


# ------------------------------------------------------------------------------------------------------ audit


async def test_changes_and_refusals_are_written_down_and_readings_are_not(make_server: Any) -> None:
    async with make_server() as served:
        made = await served.client.users.create(UserForm(name="ada", role=UserRole.ADMIN))
        async with Client(served.url, made.token.token) as ada:
            viewer = await ada.users.create(UserForm(name="vic", role=UserRole.VIEWER))
            design = await ada.designs.create("digits")
            await ada.designs.list()
            async with Client(served.url, viewer.token.token) as vic:
                await vic.designs.list()
                assert (await served.call("DELETE", f"/v1/designs/{design.id}"))[0] == 401
                headers = {"Authorization": f"Bearer {viewer.token.token}"}
                assert (await served.call("DELETE", f"/v1/designs/{design.id}", headers=headers))[0] == 403
            deeds = [(one.who, one.what, one.status) for one in await ada.audit()]
            assert deeds == [
                ("local", "POST /v1/users", 201),
                ("ada", "POST /v1/users", 201),
                ("ada", "POST /v1/designs", 201),
                ("anyone", "DELETE /v1/designs/{id}", 401),
                ("vic", "DELETE /v1/designs/{id}", 403),
            ]
            assert [one.status for one in await ada.audit(refused=True)] == [401, 403]
            assert [one.who for one in await ada.audit(who="vic")] == ["vic"]
            last = (await ada.audit(1))[0]
            assert (last.token, last.path, last.address) == (viewer.token.id, f"/v1/designs/{design.id}", "127.0.0.1")
            assert "viewer" in last.reason
        path = served.data_dir / "audit.log"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text()
        assert made.token.token not in text
        assert viewer.token.token not in text


async def test_the_log_of_deeds_is_continued_put_aside_when_it_is_large_and_read_when_it_is_torn(
    monkeypatch: pytest.MonkeyPatch, make_server: Any
) -> None:
    async with make_server() as served:
        await served.client.designs.create("one")
        path = served.data_dir / "audit.log"
    with path.open("a") as file:
        file.write('{"time": 1, "who"')  # the disk was full
        file.write("\n")
    async with make_server() as served:
        await served.client.designs.create("two")
        assert [one.what for one in await served.client.audit()] == ["POST /v1/designs"] * 2
        monkeypatch.setattr("flame.apiserver.audit.LARGEST", 10)
        await served.client.designs.create("three")
        assert await served.client.audit() == []
        assert len(list(served.data_dir.glob("audit.log.*"))) == 1


def test_a_log_of_deeds_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        Audit(tmp_path / "nowhere" / "audit.log")


# ------------------------------------------------------------------------------------------------ size limits


async def test_each_route_has_its_own_limit_however_the_body_is_sent(served: Any) -> None:
    large = json.dumps({"name": "x", "description": "y" * (1 << 20)}).encode()

    async def pieces() -> Any:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for body in (io.BytesIO(large), pieces()):
        headers = {"Content-Type": "application/json"}
        status, answer = await served.call("POST", "/v1/designs", data=body, headers=headers)
        assert (status, answer["error"]["type"]) == (413, "UsageError")
    assert await served.client.designs.list() == []


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, served: Any) -> None:
    monkeypatch.setattr("flame.apiserver.app.PATIENCE", 0.05)
    host, port = served.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/designs HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: 20\r\n\r\n{{".encode())
    await writer.drain()
    async with asyncio.timeout(10):
        answer = await reader.read(4096)
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert b"did not come within" in answer
    writer.close()
    await writer.wait_closed()


async def test_an_amount_of_memory_that_is_none_is_refused_where_it_is_read(served: Any) -> None:
    for memory in ("", "much", "-1", "9" * 400, "1e999"):
        application = {"name": "app", "entry": "main:Main", "resources": {"memory": memory}}
        status, answer = await served.call("POST", "/v1/apps", json=application)
        assert (status, answer["error"]["type"]) == (422, "SpecError"), memory
        assert len(answer["error"]["message"]) < 300
    status, answer = await served.call("POST", "/v1/computes", json={"name": "c", "kind": "nothing"})
    assert (status, "no kind of compute" in answer["error"]["message"]) == (422, True)
