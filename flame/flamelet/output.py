"""The task's log: everything that the child prints, kept in a file and shipped to the server by offset.

The file is the buffer: the child is never held up by a server that is slow or away, memory does not grow, and after a
broken connection the server's own size says where to go on. A piece is shipped as soon as it is there; what comes
while a request is under way goes with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from flame.client.follow import insist
from flame.client.http import Query, Session
from flame.spec.records import Record

_PIECE = 1024 * 1024
_TAIL = 16 * 1024
_STRAGGLERS = 1.0  # seconds for a process that left the group and still holds the pipe


class Size(Record, kw_only=True):
    """The server's answer: how many bytes of the log it has."""

    size: int


class Output:
    """The output of one attempt's child.

    :param path: the file in which it is kept.
    :param patience: seconds without an answer after which :meth:`ship` gives up.
    """

    def __init__(self, path: Path, session: Session, url: str, query: Query, *, patience: float) -> None:
        self._path = path
        self._file = path.open("ab+", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._session = session
        self._url = url
        self._query = query
        self._patience = patience
        self._base = 0  # bytes that the server had of an earlier flamelet of this very attempt
        self._shipped = 0
        self._news = asyncio.Event()
        self._level = asyncio.Event()
        self._level.set()
        self._ended = asyncio.Event()
        self._pipe: int | None = None

    def pipe(self) -> int:
        """A pipe whose other end is read into the log; gives the end to write to, which the caller closes."""
        self._pipe, writable = os.pipe()
        os.set_blocking(self._pipe, False)
        asyncio.get_running_loop().add_reader(self._pipe, self._read)
        return writable

    def write(self, data: bytes) -> None:
        """Add to the log."""
        while data:
            written = self._file.write(data)
            self._size += written
            data = data[written:]
        self._level.clear()
        self._news.set()

    def _read(self) -> None:
        assert self._pipe is not None
        try:
            data = os.read(self._pipe, _PIECE)
        except BlockingIOError:
            return
        if data:
            self.write(data)
        else:
            self._close()

    def _close(self) -> None:
        if self._pipe is not None:
            asyncio.get_running_loop().remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = None
        self._ended.set()

    async def finish(self) -> None:
        """Read the pipe to its end, once the child's group is gone."""
        if self._pipe is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STRAGGLERS):
                await self._ended.wait()
        self._close()

    async def flush(self) -> None:
        """Wait until the server has the whole log."""
        await self._level.wait()

    async def ship(self) -> None:
        """Ship, forever.

        :raises flame.errors.FlameError: the server refuses the log, or was away for too long.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            while self._shipped < self._size:
                self._settle(await insist(self._send, patience=self._patience))
            self._level.set()

    async def _send(self) -> int:
        piece = os.pread(self._file.fileno(), _PIECE, self._shipped)
        query = {**self._query, "offset": self._base + self._shipped}
        return (await self._session.call("POST", self._url, query=query, data=piece, into=Size)).size

    def _settle(self, size: int) -> None:
        if size > self._base + self._size:
            self._base = size - self._shipped
        self._shipped = max(0, size - self._base)

    def tail(self, lines: int = 20) -> list[str]:
        """The last lines of the log."""
        start = max(0, self._size - _TAIL)
        text = os.pread(self._file.fileno(), _TAIL, start).decode("utf-8", "replace")
        return text.splitlines()[-lines:]

    def close(self) -> None:
        """Close the file. What was not shipped stays in it."""
        self._close()
        self._file.close()
