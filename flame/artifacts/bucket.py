"""Artifacts as objects in a bucket: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

The protocols, the retries and the credentials of each cloud are obstore's. An object is written by one request, or part by part and
completed at the end, so it is complete or absent; an upload that fails is given up with its parts. While the service is away each
request is tried again for a while, and whoever sends is held up meanwhile, not cut off.

Beyond obstore's own retries, which end with a request's answer, an object that breaks off while it is read is
read on from there, if it is still the same one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import TYPE_CHECKING, Any

from flame.artifacts.base import PIECE, Artifact, Artifacts, check_name
from flame.buckets import denied, open_bucket, reason
from flame.errors import MissingExtra, NotFound, StoreError

try:
    import obstore
    from obstore import exceptions
except ImportError as missing:
    raise MissingExtra("obstore", "cloud", "A bucket for artifacts") from missing

if TYPE_CHECKING:
    from obstore.store import ObjectStore

log = logging.getLogger("flame.artifacts")

#: Seconds for which a service that is away is waited for.
PATIENCE = 120.0
#: Parts of 16 MiB: S3 takes 10,000 of them, so objects of up to 160 GB; four on their way at once are 64 MiB of memory.
_PART = 16 << 20
_AT_ONCE = 4


class BucketArtifacts(Artifacts):
    """Artifacts in a bucket.

    :param url: ``s3://BUCKET[/PREFIX]``, ``gs://...``, ``az://...``; the credentials come from the environment, as for the clouds' own tools.
    :param patience: seconds for which a service that is away is waited for.
    """

    apart = True

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        self._store: ObjectStore = open_bucket(url, patience, "A bucket for artifacts")

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> Artifact:
        """See the base class."""
        check_name(name)
        source = _Source(data)
        try:
            first = await source.part()
            if len(first) < _PART:  # all of it
                await obstore.put_async(self._store, name, first, use_multipart=False)
            else:
                await obstore.put_async(
                    self._store,
                    name,
                    source.parts(first),
                    chunk_size=_PART,
                    max_concurrency=_AT_ONCE,
                    use_multipart=True,
                )
        except BaseException as error:
            if source.fault is not None:
                raise source.fault from None
            if isinstance(error, Exception):
                raise self._failure("written", name, error) from error
            raise
        return Artifact(name, source.size, time.time())

    async def stat(self, name: str) -> Artifact | None:
        """See the base class."""
        try:
            return _artifact(await obstore.head_async(self._store, check_name(name)))
        except FileNotFoundError:
            return None
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure("read", name, error) from error

    async def read(self, name: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See the base class."""
        check_name(name)
        same: str | None = None
        deadline = time.monotonic() + self._patience
        while end is None or start < end:
            try:
                options: Any = {}
                if start or end is not None:
                    options["range"] = {"offset": start} if end is None else (start, end)
                if same is not None:
                    options["if_match"] = same
                found = await obstore.get_async(self._store, name, options=options)
                same = found.meta["e_tag"]
                stop = found.meta["size"] if end is None else min(end, found.meta["size"])
                async for piece in found.stream(min_chunk_size=PIECE):
                    start += len(piece)
                    deadline = time.monotonic() + self._patience
                    yield bytes(piece)
                if start >= stop:
                    return
                raise ConnectionError("the answer ended too early")
            except FileNotFoundError:
                raise NotFound(f"There is no artifact {name!r}.") from None
            except (exceptions.BaseError, OSError, ValueError) as error:
                if await self._is_behind(name, start):
                    return
                if isinstance(error, exceptions.PreconditionError):
                    raise StoreError(f"The artifact {name!r} was replaced while it was read; read it again.") from error
                if time.monotonic() > deadline or denied(error):
                    raise self._failure("read", name, error) from error
                log.warning("reading %s from %s goes on at %d: %s", name, self.url, start, reason(error))
            await asyncio.sleep(0.2)

    async def find(self, folder: str) -> list[Artifact]:
        """See the base class."""
        try:
            found = [_artifact(one) async for page in obstore.list(self._store, check_name(folder)) for one in page]
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure("listed", folder, error) from error
        return sorted(found)

    async def delete(self, name: str) -> bool:
        """See the base class."""
        there = await self.stat(name) is not None
        if there:
            try:
                await obstore.delete_async(self._store, name)
            except FileNotFoundError:
                return False
            except (exceptions.BaseError, OSError, ValueError) as error:
                raise self._failure("removed", name, error) from error
        return there

    async def delete_all(self, folder: str) -> None:
        """See the base class."""
        names = [found.name for found in await self.find(folder)]
        try:
            if names:
                await obstore.delete_async(self._store, names)
        except FileNotFoundError:
            return  # somebody else removes them too
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise self._failure("removed", folder, error) from error

    async def check(self) -> None:
        """See the base class. A bucket that is not there would else look like an empty one."""
        try:
            await anext(aiter(obstore.list(self._store, chunk_size=1)), None)
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise StoreError(f"The place of artifacts {self.url} cannot be used: {reason(error)}.") from error

    async def close(self) -> None:
        """See the base class."""

    async def _is_behind(self, name: str, start: int) -> bool:
        """Whether an answer that was refused asked for what is behind the end."""
        try:
            found = await obstore.head_async(self._store, name)
        except (exceptions.BaseError, OSError, ValueError):
            return False
        return bool(start >= found["size"])

    def _failure(self, what: str, name: str, error: Exception) -> StoreError:
        return StoreError(f"The artifact {name!r} cannot be {what} in {self.url}: {reason(error)}.")


class _Source:
    """Bytes to send, in parts of one size; keeps what their giver raises, which passes through a foreign library on its way."""

    def __init__(self, data: bytes | AsyncIterable[bytes]) -> None:
        self._pieces = aiter(_once(data) if isinstance(data, bytes) else data)
        self._kept = bytearray()
        self.size = 0
        self.fault: BaseException | None = None

    async def part(self) -> bytes:
        """The next part; shorter than others at the end, empty behind it."""
        while len(self._kept) < _PART:
            try:
                piece = await anext(self._pieces)
            except StopAsyncIteration:
                break
            except BaseException as error:
                self.fault = error
                raise
            self._kept += piece
        part = bytes(memoryview(self._kept)[:_PART])
        del self._kept[:_PART]
        self.size += len(part)
        return part

    async def parts(self, first: bytes) -> AsyncGenerator[bytes, None]:
        """All parts."""
        part = first
        while part:
            yield part
            part = await self.part()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _artifact(meta: Any) -> Artifact:
    return Artifact(meta["path"], meta["size"], meta["last_modified"].timestamp())
