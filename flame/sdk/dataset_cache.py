"""Local copies of datasets: one download a host and version, however many workers ask at once.

A copy is kept by its SHA-256 and is complete or absent; what a URL had when it was last asked, with its ETag, stands beside. So a
worker that comes back asks the source whether its copy is still good, and one whose dataset names its SHA-256 need not ask at all. A download
that breaks off goes on where it was, also after the worker that did it was killed, if the source says that it is the same file.

Whoever downloads holds a lock on the URL; the others wait for it, and find the copy.

Copies are kept until somebody removes them, or with ``FLAME_CACHE_SIZE`` until they are more than that together: whoever has downloaded one
then removes those that were used longest ago, but none of the last hour, which somebody may be about to open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import msgspec

from flame.buckets import BUCKETS
from flame.errors import DatasetError
from flame.sdk.dataset_sources import Answer, Bucket, Interrupted, Refused, Source, Web
from flame.spec.quantities import parse_bytes

#: Seconds without a byte after which a source is given up.
PATIENCE = 120.0
#: Seconds since its last use for which a copy is not removed.
IN_USE = 3600.0
#: Seconds between two words about a long download.
WORD_EVERY = 5.0

Tell = Callable[[str], None]
S = TypeVar("S", bound=msgspec.Struct)


class _Copy(msgspec.Struct, kw_only=True):
    """What a URL had when it was last asked."""

    validator: str
    sha256: str
    size: int
    name: str


class _Begun(msgspec.Struct, kw_only=True):
    """What lies in the file of a download that is under way, or was broken off."""

    validator: str


def local_copy(url: str, sha256: str = "", *, folder: Path | None = None, tell: Tell = lambda _: None) -> Path:
    """A dataset as a file of this host.

    :param url: a path or ``file://`` URL, whose file is given as it is; ``https://``, ``http://``, ``s3://``, ``gs://`` or ``az://``.
    :param sha256: what it must have, in hex; empty for anything.
    :param folder: of the copies; None: see :func:`cache_folder`.
    :param tell: told in a sentence what is waited for.
    :raises flame.errors.DatasetError: it cannot be had, or has another digest.
    :raises flame.errors.MissingExtra: the library for buckets is not installed.
    """
    scheme = urlsplit(url).scheme if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) else ""
    if scheme in ("", "file"):
        return _here(url, scheme, sha256)
    shown = _without_secrets(url)
    try:
        source: Source
        if scheme in ("http", "https"):
            source = Web(url)
        elif scheme in BUCKETS:
            source = Bucket(url)
        else:
            known = ", ".join(["file", "http", "https", *BUCKETS])
            raise Refused(f"{scheme!r} is no scheme that is known here ({known})")
        return _Cache(folder or cache_folder(), shown, tell).get(url, source, sha256.lower())
    except Refused as error:
        raise DatasetError(f"The dataset {shown} cannot be had: {error}.") from error
    except OSError as error:
        raise DatasetError(f"The dataset {shown} cannot be kept: {error.strerror or error}.") from error


def cache_folder() -> Path:
    """Where copies are kept: ``FLAME_CACHE_DIR``, else ``flame`` in the user's cache; in a container without a home, in its temporary folder."""
    if named := os.environ.get("FLAME_CACHE_DIR"):
        return Path(named) / "datasets"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with contextlib.suppress(OSError):
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base / "flame" / "datasets"
    return Path(tempfile.gettempdir()) / f"flame-{os.getuid()}" / "datasets"


def cache_size() -> int | None:
    """How many bytes copies may have together, from ``FLAME_CACHE_SIZE`` (such as ``50G``); None: any number.

    :raises flame.errors.SpecError: it is no amount.
    """
    said = os.environ.get("FLAME_CACHE_SIZE")
    return parse_bytes(said, "FLAME_CACHE_SIZE") if said else None


class _Cache:
    """The copies in a folder: ``files/SHA256/NAME``, ``urls/KEY`` with lock, answer and unfinished download of each URL."""

    def __init__(self, folder: Path, shown: str, tell: Tell) -> None:
        self._folder = folder
        self._shown = shown
        self._tell = tell

    def get(self, url: str, source: Source, sha256: str) -> Path:
        name = _file_name(url)
        if sha256 and (path := self._kept(sha256, name)):
            return path
        place = self._folder / "urls" / hashlib.sha256(url.encode()).hexdigest()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked(place):
            if sha256 and (path := self._kept(sha256, name)):
                return path
            copy = _load(place / "copy.json", _Copy)
            if copy is not None and (self._kept(copy.sha256, name) is None or (sha256 and copy.sha256 != sha256)):
                copy = None
            copy = self._fetch(source, place, copy, sha256, name)
            path = self._kept(copy.sha256, name)
            assert path is not None
        self._make_room()
        return path

    def _fetch(self, source: Source, place: Path, copy: _Copy | None, sha256: str, name: str) -> _Copy:
        """Ask the source; download what is new."""
        silent_since, pause, done = time.monotonic(), 0.1, -1
        while True:
            try:
                return self._attempt(source, place, copy, sha256, name)
            except Interrupted as error:
                size = _size(place / "part")
                if size > done:
                    silent_since, pause, done = time.monotonic(), 0.1, size
                if copy is not None:
                    self._tell(f"dataset {self._shown}: {error}; the copy of an earlier run is used")
                    return copy
                if time.monotonic() - silent_since > PATIENCE:
                    raise Refused(str(error)) from error
                self._tell(f"dataset {self._shown}: {error}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _attempt(self, source: Source, place: Path, copy: _Copy | None, sha256: str, name: str) -> _Copy:
        part = place / "part"
        begun = _load(place / "begun.json", _Begun)
        start = _size(part) if begun is not None and begun.validator else 0
        answer = source.ask(copy.validator if copy else "", begun.validator if begun else "", start)
        if answer is None:
            assert copy is not None
            return copy
        digest = hashlib.sha256()
        if answer.start:
            with part.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        else:
            part.unlink(missing_ok=True)
            _save(place / "begun.json", _Begun(validator=answer.validator))
        size = self._write(part, answer, digest)
        found = digest.hexdigest()
        if sha256 and found != sha256:
            part.unlink()
            raise Refused(f"its SHA-256 is {found}, and {sha256} was promised")
        kept = self._folder / "files" / found
        kept.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.chmod(0o444)  # all workers of this host read the same file
        part.replace(kept / name)
        (place / "begun.json").unlink(missing_ok=True)
        copy = _Copy(validator=answer.validator, sha256=found, size=size, name=name)
        _save(place / "copy.json", copy)
        return copy

    def _write(self, part: Path, answer: Answer, digest: Any) -> int:
        """Write what comes behind what is there; gives the size of the whole."""
        size, said = answer.start, time.monotonic()
        with part.open("ab") as file:
            for piece in answer.pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
                if (now := time.monotonic()) - said > WORD_EVERY:
                    said = now
                    whole = f" of {_bytes(answer.size)}" if answer.size else ""
                    self._tell(f"dataset {self._shown}: {_bytes(size)}{whole} are here")
            file.flush()
            os.fsync(file.fileno())
        if answer.size is not None and size < answer.size:
            raise Interrupted(f"the connection broke off after {size:,} of {answer.size:,} bytes")
        return size

    def _kept(self, sha256: str, name: str) -> Path | None:
        """A copy by its digest, under the name that the URL gives it: users' code goes by endings."""
        folder = self._folder / "files" / sha256
        path = folder / name
        if not path.exists():
            other = next(iter(sorted(folder.glob("*"))), None)
            if other is None:
                return None
            with contextlib.suppress(FileExistsError):
                os.link(other, path)
        with contextlib.suppress(OSError):  # of another user, who lets us read
            os.utime(folder)
        return path

    def _make_room(self) -> None:
        """Remove copies that nobody has used for long while all of them are more than they may be."""
        limit = cache_size()
        if limit is None:
            return
        copies = []
        for folder in (self._folder / "files").iterdir():
            with contextlib.suppress(OSError):  # somebody else removes it, too
                size = max((file.stat().st_size for file in folder.iterdir()), default=0)
                copies.append((folder.stat().st_mtime, size, folder))
        total, now = sum(size for _, size, _ in copies), time.time()
        for used, size, folder in sorted(copies):
            if total <= limit or now - used < IN_USE:
                break
            shutil.rmtree(folder, ignore_errors=True)
            total -= size

    @contextlib.contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        with (place / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._tell(f"dataset {self._shown}: another worker of this host is downloading it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _here(url: str, scheme: str, sha256: str) -> Path:
    """A file of this host."""
    parts = urlsplit(url)
    if scheme and parts.netloc not in ("", "localhost"):
        raise DatasetError(f"The dataset {url} cannot be had: a file URL names no other host.")
    path = Path(url2pathname(parts.path) if scheme else url)
    if not path.exists():
        raise DatasetError(f"The dataset {url} cannot be had: there is no such file on this host.")
    if sha256:
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DatasetError(f"The dataset {url} cannot be read: {error.strerror or error}.") from error
        if found != sha256.lower():
            raise DatasetError(f"The dataset {url} cannot be used: its SHA-256 is {found}, and {sha256} was promised.")
    return path


def _file_name(url: str) -> str:
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)[-200:].lstrip(".") or "data"


def _without_secrets(url: str) -> str:
    """A URL as it may be shown: signed ones carry their key in the query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _load(path: Path, type: type[S]) -> S | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=type)
    except (OSError, msgspec.MsgspecError):
        return None


def _save(path: Path, value: msgspec.Struct) -> None:
    partial = path.with_suffix(".new")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _bytes(count: int) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
