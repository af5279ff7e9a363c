"""Datasets by URL: one download a host, cached by digest, resumed, revalidated; from a real web server and a real S3 server."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import blocked_until

from flame.errors import DatasetError, MissingExtra
from flame.sdk import dataset_cache
from flame.sdk.config import Config
from flame.sdk.dataset_cache import local_copy
from flame.sdk.link import Link, install


class Site(http.server.ThreadingHTTPServer):
    """A web server with one file, which counts what it is asked and can break off."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.data = data
        self.tag: str | None = None
        self.cuts: list[int] = []  #: after how many bytes the next answers break off
        self.status: list[int] = []  #: what the next answers are
        self.asked: list[tuple[str, str]] = []  #: Range and status
        self.hold: threading.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/some/data.npz?signature=geheim"

    @property
    def etag(self) -> str:
        return self.tag if self.tag is not None else f'"{hashlib.sha256(self.data).hexdigest()[:16]}"'


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site, asked = self.server, self.headers.get("Range", "")
        status = site.status.pop(0) if site.status else 200
        start = 0
        if status == 200 and site.etag and self.headers.get("If-None-Match") == site.etag:
            status = 304
        elif status == 200 and asked and self.headers.get("If-Range") == site.etag:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(site.data):
                status = 416
        site.asked.append((asked, str(status)))
        body = site.data[start:] if status in (200, 206) else b""
        self.send_response(status)
        if site.etag:
            self.send_header("ETag", site.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(site.data) - 1}/{len(site.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = site.cuts.pop(0) if site.cuts and body else len(body)
        self.wfile.write(body[: cut // 2])
        if site.hold is not None:
            site.hold.wait(30)
        try:
            self.wfile.write(body[cut // 2 : cut])
        except OSError:
            return
        self.close_connection = True


DATA = os.urandom(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site(DATA)
    thread = threading.Thread(target=site.serve_forever, args=(0.02,))
    thread.start()
    yield site
    if site.hold is not None:
        site.hold.set()
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAME_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "datasets"


def test_a_copy_is_downloaded_once_and_asked_about_later(site: Site, cache: Path) -> None:
    path = local_copy(site.url)
    assert path.read_bytes() == DATA
    assert path.name == "data.npz", "users' code goes by the ending"
    assert path.parent.name == SHA
    assert local_copy(site.url) == path
    assert site.asked == [("", "200"), ("", "304")]
    site.data = DATA[:1000]
    second = local_copy(site.url)
    assert second.read_bytes() == DATA[:1000]
    assert path.read_bytes() == DATA, "somebody may still be reading the older one"


def test_a_copy_whose_digest_is_promised_needs_no_asking(site: Site, cache: Path) -> None:
    path = local_copy(site.url, SHA.upper())
    site.shutdown()
    assert local_copy(site.url, SHA) == path
    assert local_copy("https://nowhere.invalid/elsewhere/mirror.npz", SHA).read_bytes() == DATA
    assert len(site.asked) == 1


def test_another_digest_than_promised_is_refused_and_nothing_is_kept(site: Site, cache: Path) -> None:
    with pytest.raises(DatasetError, match=f"its SHA-256 is {SHA}, and {'0' * 64} was promised"):
        local_copy(site.url, "0" * 64)
    assert not list(cache.glob("files/*/*"))
    assert not list(cache.glob("urls/*/part"))
    assert local_copy(site.url).read_bytes() == DATA


def test_a_download_that_breaks_off_goes_on_where_it_was(site: Site, cache: Path) -> None:
    said: list[str] = []
    site.cuts = [1_000_000, 500_000]
    assert local_copy(site.url, tell=said.append).read_bytes() == DATA
    assert site.asked == [("", "200"), ("bytes=1000000-", "206"), ("bytes=1500000-", "206")]
    assert any("broke off after 1,000,000 of 3,000,000 bytes; trying again" in line for line in said)
    assert not [line for line in said if "geheim" in line]


def test_a_file_that_changes_meanwhile_is_begun_anew(site: Site, cache: Path) -> None:
    site.cuts = [1_000_000]
    other = os.urandom(2_000_000)

    def change(_: str) -> None:
        site.data = other

    assert local_copy(site.url, tell=change).read_bytes() == other
    assert site.asked[-1] == ("bytes=1000000-", "200")


def test_without_an_etag_every_download_is_whole(site: Site, cache: Path) -> None:
    site.tag, site.cuts = "", [1_000_000]
    assert local_copy(site.url).read_bytes() == DATA
    assert local_copy(site.url).read_bytes() == DATA
    assert site.asked == [("", "200")] * 3


def test_a_source_that_is_away_is_tried_again_and_an_earlier_copy_is_used_meanwhile(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.status = [503, 429]
    path = local_copy(site.url)
    assert [status for _, status in site.asked] == ["503", "429", "200"]
    said: list[str] = []
    site.status = [500]
    assert local_copy(site.url, tell=said.append) == path
    assert "the copy of an earlier run is used" in said[0]
    monkeypatch.setattr(dataset_cache, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DatasetError, match=r"data.npz cannot be had: Connection refused\.$"):
        local_copy(f"http://127.0.0.1:{port}/data.npz")


def test_what_is_refused_is_not_tried_again(site: Site, cache: Path) -> None:
    site.status = [404, 403]
    for reason in ("404 Not Found", "403 Forbidden"):
        with pytest.raises(DatasetError, match=f"some/data.npz cannot be had: it answers {reason}") as caught:
            local_copy(site.url)
        assert "geheim" not in str(caught.value)
    assert len(site.asked) == 2


ASKS = "import sys; from flame.sdk.dataset_cache import local_copy; print(local_copy(sys.argv[1], tell=lambda m: print(m, file=sys.stderr)))"


def asking(url: str, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as said:
        return subprocess.Popen([sys.executable, "-c", ASKS, url], stdout=subprocess.PIPE, stderr=said, text=True)


def test_copies_make_room_in_the_order_of_their_last_use_but_not_those_in_use(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_CACHE_SIZE", "2500")
    sites = [Site(bytes([number]) * 1000) for number in range(4)]
    for one in sites:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    try:
        first, second, third = (local_copy(one.url, folder=cache) for one in sites[:3])
        assert first.exists()  # all were used just now
        for age, path in ((8000, second), (9000, first), (7000, third)):
            os.utime(path.parent, (time.time() - age,) * 2)
        assert local_copy(sites[0].url, folder=cache) == first  # which is used again by that
        fourth = local_copy(sites[3].url, folder=cache)
        assert [path.exists() for path in (first, second, third, fourth)] == [True, False, False, True]
        assert local_copy(sites[1].url, folder=cache).read_bytes() == bytes([1]) * 1000
    finally:
        for one in sites:
            one.shutdown()
            one.server_close()


def test_of_several_workers_that_ask_at_once_one_downloads(site: Site, cache: Path, tmp_path: Path) -> None:
    site.hold = threading.Event()
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    workers = [asking(site.url, log) for log in logs]
    try:
        blocked_until(
            lambda: sum("another worker of this host is downloading it" in log.read_text() for log in logs) == 3
        )
        site.hold.set()
        paths = {worker.communicate(timeout=60)[0] for worker in workers}
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(paths) == 1
    assert sorted(status for _, status in site.asked) == ["200", "304", "304", "304"]


def test_a_worker_killed_in_mid_download_leaves_what_the_next_one_goes_on_with(
    site: Site, cache: Path, tmp_path: Path
) -> None:
    site.hold = threading.Event()
    worker = asking(site.url, tmp_path / "log")
    blocked_until(lambda: any(part.stat().st_size >= 1_000_000 for part in cache.glob("urls/*/part")))
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    site.hold.set()
    site.hold = None
    assert local_copy(site.url).read_bytes() == DATA
    assert site.asked[-1][1] == "206"


def test_files_of_this_host_are_given_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a b.csv"
    path.write_bytes(DATA)
    assert local_copy(str(path)) == path
    assert local_copy(path.as_uri(), SHA) == path
    with pytest.raises(DatasetError, match="its SHA-256 is"):
        local_copy(str(path), "1" * 64)
    with pytest.raises(DatasetError, match="there is no such file on this host"):
        local_copy("file:///no/such/file")
    with pytest.raises(DatasetError, match="names no other host"):
        local_copy("file://elsewhere/data")
    with pytest.raises(DatasetError, match="'ftp' is no scheme that is known here"):
        local_copy("ftp://host/data")


def test_an_object_of_a_bucket_is_cached_and_asked_about(s3: Any, cache: Path) -> None:
    folder = s3.folder / s3.bucket / "sets"
    folder.mkdir()
    import obstore
    from obstore.store import from_url

    bucket = from_url(f"s3://{s3.bucket}", client_options={"allow_http": True})
    obstore.put(bucket, "sets/digits 1.npz", DATA)
    url = f"s3://{s3.bucket}/sets/digits%201.npz"
    path = local_copy(url)
    assert path.read_bytes() == DATA
    assert path.name == "digits_1.npz"
    written = path.stat().st_mtime_ns
    assert local_copy(url).stat().st_mtime_ns == written
    obstore.put(bucket, "sets/digits 1.npz", DATA[:10])
    assert local_copy(url).read_bytes() == DATA[:10]
    with pytest.raises(DatasetError, match="cannot be had: there is no such object"):
        local_copy(f"s3://{s3.bucket}/sets/other.npz")
    with pytest.raises(DatasetError, match="names a bucket and no object"):
        local_copy(f"s3://{s3.bucket}/")


def test_a_bucket_that_is_killed_in_mid_download_is_waited_for(s3: Any, cache: Path) -> None:
    import obstore
    from obstore.store import from_url

    data = os.urandom(96 << 20)
    obstore.put(from_url(f"s3://{s3.bucket}", client_options={"allow_http": True}), "large", data)
    said: list[str] = []
    killer = threading.Thread(target=lambda: (s3.kill(), s3.start()))

    monitored = dataset_cache._Cache._write

    def write(self: Any, part: Path, answer: Any, digest: Any) -> int:
        def pieces() -> Iterator[bytes]:
            for number, piece in enumerate(answer.pieces):
                yield piece
                if number == 10 and not killer.is_alive() and killer.ident is None:
                    killer.start()
                    killer.join()

        return monitored(self, part, answer._replace(pieces=pieces()), digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_cache._Cache, "_write", write)
        path = local_copy(f"s3://{s3.bucket}/large", tell=said.append)
    assert killer.ident is not None
    assert path.read_bytes() == data


def test_wrong_credentials_are_said_without_showing_them(s3: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheimnis")
    with pytest.raises(DatasetError, match="the credentials of the environment do not allow it") as caught:
        local_copy(f"s3://{s3.bucket}/x")
    assert "geheimnis" not in str(caught.value)


def test_without_the_library_the_extra_that_brings_it_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("obstore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(
        MissingExtra, match=r"A dataset in a bucket needs the package 'obstore': pip install 'flame\[cloud\]'"
    ):
        local_copy("s3://bucket/data")


def config(**fields: Any) -> Config:
    return Config(
        {
            "taskid": "t",
            "role": "trainer",
            "job": {"id": "j", "name": "n"},
            "channels": [{"name": "c", "pair": ["trainer", "aggregator"]}],
            **fields,
        }
    )


def test_a_role_asks_its_configuration_for_the_file(site: Site, cache: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Link):
        def _say_waiting(self, message: str) -> None:
            said.append(message)

    site.cuts = [1000]
    install(Heard(tmp_path))
    try:
        mine = config(dataset=site.url, datasetSha256=SHA)
        assert mine.dataset == site.url
        assert mine.dataset_path.read_bytes() == DATA
        assert mine.dataset_path is mine.dataset_path, "and asks once"
    finally:
        install(None)
    assert "trying again" in said[0]
    assert said[-1] == "", "it waits no longer"
    with pytest.raises(DatasetError, match="The role 'trainer' has no dataset"):
        _ = config().dataset_path


def test_a_digest_that_is_none_is_refused_where_it_is_written() -> None:
    import msgspec

    from flame.spec.nouns import Dataset

    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "x", "url": "/x", "sha256": "abc"}, Dataset)
