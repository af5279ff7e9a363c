"""Reports on their way to the server: numbered, in order, in as few requests as the server's pace allows.

A report is put into the box at once and without waiting. While a request is under way the next ones gather and go
together, so a worker that reports a hundred times a second costs a few requests. The server ignores a number that it has seen;
therefore everything that was not acknowledged can be sent again after a broken connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from flame.client.follow import insist
from flame.client.http import Query, Session
from flame.spec.records import Record, Report


class Acked(Record, kw_only=True):
    """The server's answer: it has all reports up to this number."""

    acked: int


class Outbox:
    """The reports of one attempt.

    :param path: where they are sent, with ``query``.
    :param patience: seconds without an answer after which :meth:`run` gives up.
    """

    _MOST = 500  # reports in a request

    def __init__(self, session: Session, path: str, query: Query, *, patience: float) -> None:
        self._session = session
        self._path = path
        self._query = query
        self._patience = patience
        self._pending: deque[Report] = deque()
        self._last = 0
        self._put = 0
        self._moved = asyncio.Event()
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def put(self, type: str, data: dict[str, Any]) -> None:
        """Add a report; see :class:`flame.spec.records.Report` for types and data."""
        self._last += 1
        self._put += 1
        self._pending.append(Report(seq=self._last, type=type, data=data))
        self._empty.clear()
        self._news.set()

    async def flush(self) -> None:
        """Wait until the server has everything."""
        await self._empty.wait()

    async def delivered(self) -> None:
        """Wait until the server has what was put in so far, whatever is put in meanwhile."""
        mark = self._put
        while self._put - len(self._pending) < mark:
            await self._moved.wait()

    async def run(self) -> None:
        """Deliver, forever.

        :raises flame.errors.FlameError: the server refuses the reports, or was away for too long.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            while self._pending:
                self._settle(await insist(self._send, patience=self._patience))
                self._moved.set()
                self._moved = asyncio.Event()
            self._empty.set()

    async def _send(self) -> int:
        batch = [self._pending[i] for i in range(min(len(self._pending), self._MOST))]
        return (await self._session.call("POST", self._path, query=self._query, body=batch, into=Acked)).acked

    def _settle(self, acked: int) -> None:
        if acked > self._last:
            # An earlier flamelet of this very attempt has reported (a container that was restarted in place):
            # its numbers are used up, so what waits here is numbered behind them.
            for offset, report in enumerate(self._pending, start=1):
                report.seq = acked + offset
            self._last = acked + len(self._pending)
            return
        while self._pending and self._pending[0].seq <= acked:
            self._pending.popleft()
