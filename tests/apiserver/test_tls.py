"""TLS of the server and of a job's workers, with real certificates and real jobs."""

from __future__ import annotations

import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from flame.apiserver.tls import ServerTls
from flame.certificates import JobAuthority, Pair, make_authority, make_certificate
from flame.cli.main import flame
from flame.client import Client
from flame.client.http import Session
from flame.client.tls import Tls
from flame.errors import ServerUnreachable, SpecError, Unauthorized, UsageError
from flame.serve import ServeSettings, serve
from flame.spec.records import JobState

#: Says with whose certificate it speaks to its peers, and that it has no key of its flamelet's.
TELL = """
import os, ssl
for name in ("FLAME_TASK_KEY", "FLAME_TLS_KEY"):
    assert name not in os.environ, name
cert, key, ca = (os.environ["FLAME_P2P_TLS_" + name] for name in ("CERT", "KEY", "CA"))
assert os.stat(key).st_mode & 0o777 == 0o600
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_verify_locations(ca)
context.load_cert_chain(cert, key)
print("authority", context.get_ca_certs()[0]["subject"][0][0][1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``flame cert`` makes for a deployment."""
    where = tmp_path_factory.mktemp("certificates")
    for arguments in (["ca"], ["server", "--host", "flame.test"], ["client", "workers"]):
        result = CliRunner().invoke(flame, ["cert", *arguments, "--dir", str(where)])
        assert result.exit_code == 0, result.output
    return where


def server_tls(folder: Path, *, mutual: bool) -> ServerTls:
    of_workers = {
        "client_ca": folder / "ca.pem",
        "worker_cert": folder / "workers.pem",
        "worker_key": folder / "workers-key.pem",
    }
    return ServerTls(
        cert=folder / "server.pem",
        key=folder / "server-key.pem",
        ca=folder / "ca.pem",
        **(of_workers if mutual else {}),
    )


@pytest.fixture
async def secure(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setenv("FLAME_CA", str(folder / "ca.pem"))
    settings = ServeSettings(port=0, tls=server_tls(folder, mutual=True), p2p_tls=True)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    async with serve(settings, data_dir) as server:
        yield server
        await server.controller.stop_all()


async def test_a_job_runs_where_everyone_shows_a_certificate(
    secure: Any, make_code: Callable[..., bytes], make_form: Any
) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    async with Client(secure.url) as client:
        digest = await client.code.upload(make_code(TELL, TELL))
        job = await client.jobs.create(make_form(digest))
        await client.jobs.start(job.id)
        ended = await client.jobs.wait(job.id)
        assert ended.state is JobState.COMPLETED, ended.failure
        for task in await client.jobs.tasks(job.id):
            log = b"".join([piece async for piece in client.tasks.log(task.id)])
            assert f"authority flame job {job.id}".encode() in log


async def test_a_worker_without_a_certificate_is_refused_whatever_key_it_has(secure: Any, folder: Path) -> None:
    key = secure.controller.context.keys.task("0" * 40, 1)
    query = {"attempt": 1}
    async with Session(secure.url, key, Tls(str(folder / "ca.pem"))) as bare:
        with pytest.raises(Unauthorized, match="must show a certificate"):
            await bare.call("POST", f"/v1/tasks/{'0' * 40}/lease", query=query)
    stranger = make_authority("somebody else", 1)
    theirs = make_certificate(stranger, "workers", 1, server=False)
    tls = Tls(str(folder / "ca.pem"), theirs.certificate, theirs.key)
    async with Session(secure.url, key, tls) as forged:
        with pytest.raises(ServerUnreachable):
            await forged.call("POST", f"/v1/tasks/{'0' * 40}/lease", query=query)


async def test_a_server_that_nobody_vouches_for_is_not_talked_to(
    secure: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_authority("somebody else", 1)
    for tls in (Tls(other.certificate), Tls(None)):
        async with Session(secure.url, "secret", tls) as session:
            with pytest.raises(ServerUnreachable, match="is not trusted"):
                await session.call("GET", "/healthz")
    # The right authority, under a name that the certificate does not have.
    port = secure.url.rpartition(":")[2]
    context = Tls(str(folder / "ca.pem")).context()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.get(f"https://127.0.0.1:{port}/healthz", ssl=context, server_hostname="other.test")
        async with http.get(f"https://127.0.0.1:{port}/healthz", ssl=context, server_hostname="flame.test") as answer:
            assert answer.status == 200


async def test_plain_http_gets_nothing_from_a_server_with_tls(secure: Any) -> None:
    async with Session(secure.url.replace("https", "http"), "secret") as session:
        with pytest.raises(ServerUnreachable):
            await session.call("GET", "/healthz")


def test_old_protocols_are_not_spoken(folder: Path) -> None:
    ours, theirs = server_tls(folder, mutual=False).context(), Tls(str(folder / "ca.pem")).context()
    assert ours is not None
    assert min(ours.minimum_version, theirs.minimum_version) >= ssl.TLSVersion.TLSv1_2


def test_what_is_missing_or_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    cert, key, ca = folder / "server.pem", folder / "server-key.pem", folder / "ca.pem"
    for tls, words in (
        (ServerTls(key=key), "give --tls-cert"),
        (ServerTls(cert=cert, key=tmp_path / "nothing"), "cannot be used"),
        (ServerTls(cert=cert, key=folder / "ca-key.pem"), "cannot be used"),
        (ServerTls(cert=cert, key=key, client_ca=ca), "--tls-worker-cert"),
        (ServerTls(cert=cert, key=key, client_ca=key, worker_cert=cert, worker_key=key), "authority"),
    ):
        with pytest.raises(UsageError, match=words):
            tls.context()
    with pytest.raises(UsageError, match="cannot be read"):
        ServerTls(cert=cert, ca=tmp_path / "nothing").for_workers()
    assert ServerTls().context() is None
    for client in (Tls(str(tmp_path / "nothing")), Tls("-----BEGIN nonsense"), Tls(str(ca), str(key))):
        with pytest.raises(UsageError, match="cannot be used"):
            client.context()


# ----------------------------------------------------------------------------------------------- certificates


def test_openssl_agrees_with_the_certificates(folder: Path) -> None:
    for name, purpose in (("server", "sslserver"), ("workers", "sslclient")):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "-purpose", purpose, f"{name}.pem"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr
    wrong = ["openssl", "verify", "-CAfile", "ca.pem", "-purpose", "sslserver", "workers.pem"]
    assert subprocess.run(wrong, cwd=folder, capture_output=True, check=False).returncode != 0


def test_keys_are_for_their_owner_and_nothing_is_overwritten(folder: Path) -> None:
    for key in folder.glob("*-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = (folder / "ca.pem").read_bytes()
    result = CliRunner().invoke(flame, ["cert", "ca", "--dir", str(folder)])
    assert isinstance(result.exception, UsageError)
    assert "is there already" in str(result.exception)
    assert (folder / "ca.pem").read_bytes() == before
    for name in ("ca", "../x", "server"):
        result = CliRunner().invoke(flame, ["cert", "client", name, "--dir", str(folder)])
        assert isinstance(result.exception, UsageError)


def test_without_an_authority_there_are_no_certificates(tmp_path: Path) -> None:
    result = CliRunner().invoke(flame, ["cert", "server", "--dir", str(tmp_path)])
    assert "`flame cert ca` makes one" in str(result.exception)
    with pytest.raises(SpecError, match="no authority's"):
        make_certificate(Pair("nonsense", "nonsense"), "x", 1, server=True)


def test_a_job_s_authority_is_the_same_after_a_restart_and_another_one_for_another_job() -> None:
    one, again, other = (JobAuthority(seed, "j1", 1_700_000_000.5) for seed in (b"s" * 32, b"s" * 32, b"t" * 32))
    assert one.certificate == again.certificate != other.certificate
    pair = one.issue("task.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=again.certificate)
    assert pair.key not in one.certificate


def test_the_library_is_needed_only_to_make_certificates() -> None:
    script = (
        "import sys; import flame.process, flame.client, flame.flamelet.agent; assert 'cryptography' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
