"""Who gets a connection of sessions, over what, and what a strange one gets."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import flame.sessions
from flame.apiserver.tls import ServerTls
from flame.cli.main import flame as command
from flame.errors import Forbidden, NotFound, ServerUnreachable, Unauthorized
from flame.serve import ServeSettings, serve
from flame.sessions import dialing, wire
from flame.spec.people import ProjectForm, UserForm, UserRole
from flame.spec.sessions import Application

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


@pytest.fixture
async def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A server with TLS that asks workers for certificates."""
    where = tmp_path / "certificates"
    where.mkdir()
    for arguments in (["ca"], ["server", "--host", "flame.test"], ["client", "workers"]):
        result = CliRunner().invoke(command, ["cert", *arguments, "--dir", str(where)])
        assert result.exit_code == 0, result.output
    tls = ServerTls(
        cert=where / "server.pem",
        key=where / "server-key.pem",
        ca=where / "ca.pem",
        client_ca=where / "ca.pem",
        worker_cert=where / "workers.pem",
        worker_key=where / "workers-key.pem",
    )
    (tmp_path / "data").mkdir()
    async with serve(ServeSettings(port=0, tls=tls, token="secret"), tmp_path / "data") as server:
        yield server, where
        await server.api.sessions.stop_all()


async def test_sessions_run_over_tls_and_executors_show_a_certificate(
    secure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, where = secure
    with pytest.raises(ServerUnreachable):
        async with flame.sessions.connect(server.url, "secret"):
            pass
    monkeypatch.setenv("FLAME_CA", str(where / "ca.pem"))
    async with (
        flame.sessions.connect(server.url, "secret") as connection,
        connection.open(sessionkit.square, max_instances=1) as session,
    ):
        assert await asyncio.gather(*session.submit_many(range(100))) == [n * n for n in range(100)]


async def test_a_connection_needs_the_token_and_sessions_of_others_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    async with serve(ServeSettings(port=0, token="secret"), tmp_path / "data") as server:
        with pytest.raises(Unauthorized):
            async with flame.sessions.connect(server.url, "wrong"):
                pass
        accounts = server.controller.accounts
        tokens = {}
        await accounts.create_user(UserForm(name="ada", role=UserRole.ADMIN))
        for name, role in (("red", UserRole.USER), ("blue", UserRole.USER), ("vic", UserRole.VIEWER)):
            if role is UserRole.USER:
                await accounts.create_project(ProjectForm(name=name))
            made = await accounts.create_user(
                UserForm(name=name, role=role, projects=[name if role is UserRole.USER else "red"])
            )
            tokens[name] = made.token.token
        with pytest.raises(Forbidden):
            async with flame.sessions.connect(server.url, tokens["vic"]):
                pass
        app = Application(entry="operator:neg")
        async with (
            flame.sessions.connect(server.url, tokens["red"]) as red,
            flame.sessions.connect(server.url, tokens["blue"]) as blue,
            red.open(app, id="theirs", max_instances=1) as session,
        ):
            assert await session.invoke(1) == -1
            with pytest.raises(NotFound):
                async with blue.join("theirs"):
                    pass
            with pytest.raises(Exception, match="choose another id"):
                async with blue.open(app, id="theirs", max_instances=1):
                    pass
        await server.api.sessions.stop_all()


async def test_an_executor_needs_its_own_key_and_one_that_was_given_up_stays_out(served: Any) -> None:
    manager = served.manager
    async with served.open(sessionkit.square, max_instances=1) as session:
        await session.invoke(1)
        (name,) = manager.register.live(session.id).executors
        keys = manager.context.keys

        def knock(executor: str, key: str, attempt: int = 1) -> int:
            try:
                dialing.dial(served.url, f"/v1/executors/{executor}/link?attempt={attempt}", key).close()
            except dialing.Refused as refused:
                return refused.answer
            return 101

        assert await asyncio.to_thread(knock, name, keys.task("0" * 16, 1)) == 401
        assert await asyncio.to_thread(knock, name, keys.task(name, 2), 2) == 403
        assert await asyncio.to_thread(knock, "0" * 16, keys.task("0" * 16, 1)) == 403
        # Who has stolen the key and says nothing is shut out with the executor.
        stolen = await asyncio.to_thread(
            dialing.dial, served.url, f"/v1/executors/{name}/link?attempt=1", keys.task(name, 1)
        )
    await manager.stop_all()
    with stolen:
        stolen.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.to_thread(stolen.recv, 1) == b""
    assert await asyncio.to_thread(knock, name, keys.task(name, 1)) == 403


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        wire.frame(99, 1),
        wire.frame(wire.SUBMIT, 7, 1, [b"x"], None),
        wire.frame(wire.SUBMIT),
        wire.frame(wire.CANCEL, {}, [], 3),
        wire.frame(wire.OPEN, 1, {"weight": "heavy"}, "", "me"),
        wire.frame(wire.OPEN, [1], 5, {}, b"")[:-1],
    ],
)
async def test_nonsense_ends_the_connection_or_is_refused_and_harms_nobody(served: Any, data: bytes) -> None:
    async with served.open(sessionkit.square, max_instances=1) as session:
        assert await session.invoke(3) == 9

        def talk() -> bytes:
            with dialing.dial(served.url, "/v1/session-link", None) as connection:
                connection.settimeout(1.0)
                connection.sendall(data)
                try:
                    return connection.recv(1 << 16)
                except TimeoutError:
                    return b"silence"

        answer = await asyncio.to_thread(talk)
        assert answer in (b"", b"silence") or wire.decode(answer[4:])[0] == wire.REFUSED
        assert await session.invoke(4) == 16
