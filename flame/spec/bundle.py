"""Code bundles: a zip with one top-level folder a role, each with a ``main.py``.

A bundle is addressed by the SHA-256 of its bytes, so the same code must give the same bytes: entries are
sorted, dates and modes are fixed, and nothing is compressed, because compressors differ between versions.

Bundles come from strangers. Names are taken apart and judged before anything is written, a link is never made,
and what an entry unfolds to is counted while it is read, whatever its header claims.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

from flame.errors import Conflict, SpecError, UsageError
from flame.spec.shape import listing

MAIN = "main.py"

#: Limits of a bundle: bytes packed, bytes unpacked, files, and folders in each other.
MAX_PACKED = 64 * 1024 * 1024
MAX_UNPACKED = 256 * 1024 * 1024
MAX_FILES = 10_000
MAX_DEPTH = 32

_SKIPPED = ("__pycache__", "__MACOSX")
_BLOCK = 1 << 16


def digest(data: bytes) -> str:
    """A bundle's address: the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def pack(source: Path, roles: Collection[str] | None = None, name: str | None = None) -> bytes:
    """Make a bundle of a folder or of a zip; the same files give the same bytes.

    Hidden files, ``__pycache__`` and compiled Python are left out. A zip, or a folder, whose only content is one folder that holds
    the roles' folders is taken without that wrapping.

    :param source: a folder, or a zip file.
    :param roles: only these top-level folders are taken; None takes all.
    :param name: what to call the source in complaints.
    :raises flame.errors.UsageError: it is not there, or cannot be read.
    :raises flame.errors.SpecError: it is no bundle, or leaves its bounds.
    """
    name = name or str(source)
    try:
        if source.is_dir():
            files = _from_folder(source, roles, name)
        elif source.is_file():
            size = source.stat().st_size
            if size > MAX_PACKED:
                raise SpecError(f"the bundle has {_size(size)}; {_size(MAX_PACKED)} are allowed.", name)
            files = contents(source.read_bytes(), name)
        else:
            raise UsageError(f"{name}: there is no such folder or zip file with the roles' code.")
    except OSError as error:
        raise UsageError(f"{name}: the code cannot be read: {error.strerror or error}.") from error
    files = _unwrapped(files, roles)
    if roles is not None:
        files = {path: data for path, data in files.items() if path[0] in roles and len(path) > 1}
    return _zip(files)


def repack(data: bytes, roles: Collection[str] | None = None, name: str = "the bundle") -> bytes:
    """Make a bundle of a zip that somebody else made; see :func:`pack`."""
    files = _unwrapped(contents(data, name), roles)
    if roles is not None:
        files = {path: data for path, data in files.items() if path[0] in roles and len(path) > 1}
    return _zip(files)


def pack_files(files: dict[str, bytes]) -> bytes:
    """Make a bundle of files by their paths in it.

    :raises flame.errors.SpecError: a path would leave the bundle, or it is too large.
    """
    return _zip({_parts(path, "the code"): content for path, content in files.items()})


def folders(data: bytes, name: str = "the bundle") -> dict[str, bool]:
    """The top-level folders of a bundle, and whether each has a ``main.py``. Reads names only.

    :raises flame.errors.SpecError: it is no zip, or an entry of it would leave its folder.
    """
    found: dict[str, bool] = {}
    with _open(data, name) as archive:
        for info, path in _entries(archive, name):
            if len(path) > 1 or info.is_dir():
                found[path[0]] = found.get(path[0], False) or path[1:] == (MAIN,)
    return found


def check_roles(code: dict[str, bool], roles: Collection[str], name: str = "the code") -> None:
    """Refuse code in which a role is missing.

    :param code: what :func:`folders` gave.
    :raises flame.errors.SpecError: names the role and what to add.
    """
    for role in roles:
        if role not in code:
            there = f"it has {listing(sorted(code))}" if code else "it has no folder at all"
            raise SpecError(f"role {role!r} has no code: add a folder {role!r} with a {MAIN} ({there}).", name)
        if not code[role]:
            raise SpecError(f"role {role!r} has no {MAIN} in its folder; add one.", f"{name}: {role}")


def extract(data: bytes, role: str, into: Path, name: str = "the bundle") -> Path:
    """Unpack one role's folder as ``into/role``: all of it, or nothing.

    :param into: an existing folder; ``into/role`` must not exist.
    :returns: the folder that was made.
    :raises flame.errors.SpecError: the bundle is no zip, leaves its folder or its bounds, or lacks the role's ``main.py``.
    :raises flame.errors.Conflict: ``into/role`` exists already.
    """
    target = into / role
    if Path(role).name != role or role in ("", ".", ".."):
        raise SpecError(f"the role's name {role!r} cannot be a folder's name.", name)
    if os.path.lexists(target):
        raise Conflict(f"{target} exists already; the code of role {role!r} is unpacked into a new folder only.")
    staging = Path(tempfile.mkdtemp(prefix=".unpack-", dir=into))
    try:
        with _open(data, name) as archive:
            entries = [(info, path) for info, path in _entries(archive, name) if path[0] == role]
            files = {path: info for info, path in entries if not info.is_dir()}
            check_roles({role: (role, MAIN) in files} if entries else {}, [role], name)
            budget = _Budget(name)
            for path, info in files.items():
                file = staging.joinpath(*path)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("xb") as out:
                    for block in budget.read(archive, info):
                        out.write(block)
        (staging / role).rename(target)
    except OSError as error:
        raise SpecError(f"the code of role {role!r} cannot be unpacked: {error.strerror or error}.", name) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


class _Budget:
    """Counts what entries really unfold to, block by block, against the limit of the whole bundle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = MAX_UNPACKED

    def read(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
        where = f"{self.name}: {info.filename}"
        try:
            with archive.open(info) as file:
                while block := file.read(_BLOCK):
                    self.left -= len(block)
                    if self.left < 0:
                        raise SpecError(f"the bundle unfolds to more than {_size(MAX_UNPACKED)}.", self.name)
                    yield block
        except SpecError:
            raise
        except (
            Exception
        ) as error:  # zipfile lets zlib's, bz2's, lzma's and struct's errors through, and RuntimeError for a password
            raise SpecError(f"this entry cannot be unpacked: {error}.", where) from error


def _size(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def _open(data: bytes, name: str) -> zipfile.ZipFile:
    if len(data) > MAX_PACKED:
        raise SpecError(f"the bundle has {_size(len(data))}; {_size(MAX_PACKED)} are allowed.", name)
    try:
        return zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # a broken directory makes zipfile raise whatever it stumbles over
        raise SpecError(f"this is no zip file: {error}.", name) from error


def _entries(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[zipfile.ZipInfo, tuple[str, ...]]]:
    """The entries of a bundle with their names taken apart; refuses names that lead out of it, and links."""
    infos = archive.infolist()
    if len(infos) > MAX_FILES:
        raise SpecError(f"the bundle has {len(infos)} entries; {MAX_FILES} are allowed.", name)
    if sum(info.file_size for info in infos) > MAX_UNPACKED:
        raise SpecError(f"the bundle unfolds to more than {_size(MAX_UNPACKED)}.", name)
    seen: dict[tuple[str, ...], bool] = {}
    for info in infos:
        # zipfile cuts a name at a NUL; the name as it was written is the one to judge.
        path = _parts(info.orig_filename, name)
        where = f"{name}: {info.filename}"
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise SpecError("this entry is a link or a device; a bundle holds plain files only.", where)
        if info.flag_bits & 1:
            raise SpecError("this entry is encrypted; a bundle cannot be.", where)
        if any(_skipped(part) for part in path) or path[-1].endswith((".pyc", ".pyo")):
            continue
        if path in seen and not (seen[path] and info.is_dir()):
            raise SpecError("this name stands in the bundle twice.", where)
        for length in range(1, len(path)):
            if seen.get(path[:length]) is False:
                raise SpecError("this entry lies in a folder whose name is also a file's.", where)
            seen[path[:length]] = True
        seen[path] = info.is_dir()
        yield info, path


def _parts(written: str, name: str) -> tuple[str, ...]:
    where = f"{name}: {written!r}"
    parts = written.removesuffix("/").split("/")
    if "\\" in written or "\0" in written or any(ord(letter) < 32 for letter in written):
        raise SpecError("a name with a backslash or a control character cannot be unpacked.", where)
    if written.startswith("/") or (len(parts[0]) == 2 and parts[0][1] == ":"):
        raise SpecError("an absolute path would leave the bundle's folder.", where)
    if any(part in ("", ".", "..") for part in parts):
        raise SpecError("this path would leave the bundle's folder, or names no file.", where)
    if any("\ud800" <= letter <= "\udfff" for letter in written):
        raise SpecError("a name that is no UTF-8 cannot be packed.", where)
    if len(parts) > MAX_DEPTH or any(len(part.encode()) > 255 for part in parts):
        raise SpecError("this path is too long or too deep.", where)
    return tuple(parts)


def _skipped(part: str) -> bool:
    return part.startswith(".") or part in _SKIPPED


def contents(data: bytes, name: str = "the bundle") -> dict[tuple[str, ...], bytes]:
    """The files of a bundle, by their paths taken apart.

    :raises flame.errors.SpecError: it is no zip, leaves its folder or its bounds.
    """
    budget = _Budget(name)
    with _open(data, name) as archive:
        return {
            path: b"".join(budget.read(archive, info)) for info, path in _entries(archive, name) if not info.is_dir()
        }


def _from_folder(folder: Path, roles: Collection[str] | None, name: str) -> dict[tuple[str, ...], bytes]:
    files: dict[tuple[str, ...], bytes] = {}
    root = folder.resolve()
    total = 0
    wanted = set(roles) if roles is not None and any((folder / role).is_dir() for role in roles) else None
    for here, below, names in os.walk(folder):
        at = Path(here).relative_to(folder).parts
        below[:] = sorted(one for one in below if not _skipped(one) and (at or wanted is None or one in wanted))
        for one in below:
            if (Path(here) / one).is_symlink():
                raise SpecError(
                    "a link to a folder cannot be packed; put the folder itself here.", _inside(name, at, one)
                )
        if not at and wanted is not None:
            continue
        for one in sorted(names):
            path = Path(here) / one
            if _skipped(one) or one.endswith((".pyc", ".pyo")):
                continue
            where = _inside(name, at, one)
            try:
                inside = path.resolve().is_relative_to(root)
            except RuntimeError:
                inside = False  # a loop of links
            if not inside:
                raise SpecError("this link leads out of the code's folder; put the file itself here.", where)
            if not path.is_file():
                raise SpecError("this is no plain file, and cannot be packed.", where)
            _parts("/".join((*at, one)), name)
            total += path.stat().st_size
            if total > MAX_UNPACKED or len(files) >= MAX_FILES:
                raise SpecError(
                    f"the code has more than {_size(MAX_UNPACKED)} or {MAX_FILES} files; data do not belong into it.",
                    where,
                )
            files[(*at, one)] = path.read_bytes()
    return files


def _inside(name: str, at: tuple[str, ...], one: str) -> str:
    return f"{name}: {'/'.join((*at, one))}"


def _unwrapped(files: dict[tuple[str, ...], bytes], roles: Collection[str] | None) -> dict[tuple[str, ...], bytes]:
    """Without the one folder around the roles' folders, where there is one."""
    tops = {path[0] for path in files if len(path) > 1}
    if len(tops) != 1:
        return files
    (top,) = tops
    if top in (roles or ()) or (top, MAIN) in files:
        return files
    inner = {path[1] for path in files if path[0] == top and len(path) > 2}
    if (inner & set(roles)) if roles is not None else any((top, one, MAIN) in files for one in inner):
        return {path[1:]: data for path, data in files.items() if path[0] == top and len(path) > 1}
    return files


def _zip(files: dict[tuple[str, ...], bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(files):
            info = zipfile.ZipInfo("/".join(path), date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, files[path])
    packed = buffer.getvalue()
    if len(packed) > MAX_PACKED:
        raise SpecError(
            f"the code has {_size(len(packed))}; {_size(MAX_PACKED)} are allowed; data do not belong into it."
        )
    return packed
