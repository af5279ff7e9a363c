"""Streams that survive their server: every event once and in order, however often the connection breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.client import follow
from flame.client.follow import Backoff, insist, resumed
from flame.errors import FlameError, Forbidden, ServerError, ServerUnreachable, StoreError
from flame.spec.records import Event

END = 12


class _Answer:
    def __init__(self, lines: Sequence[bytes], error: FlameError | None) -> None:
        self._lines = lines
        self._error = error

    async def lines(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line
        if self._error is not None:
            raise self._error


class _Server:
    """Serves a stream of ``END`` events in connections that end as a plan says."""

    server = "http://fake"

    def __init__(self, plan: list[tuple[int, FlameError | None]]) -> None:
        self.plan = plan
        self.asked: list[int] = []
        self.over = False

    @asynccontextmanager
    async def open(self, method: str, path: str, *, query: dict[str, Any]) -> AsyncIterator[_Answer]:
        after = query["after"]
        self.asked.append(after)
        self.over = not self.plan
        count, error = self.plan.pop(0) if self.plan else (END + 1, None)
        if error is not None and not count:
            raise error
        events = [Event(seq=seq, time=0.0, type="t") for seq in range(max(1, after), END + 1)]  # one is repeated
        yield _Answer([b"", *(msgspec.json.encode(event) for event in events[:count])], error)

    async def ended(self) -> bool:
        return self.over


breaks = st.lists(
    st.tuples(
        st.integers(0, END),
        st.sampled_from([None, ServerUnreachable("away"), ServerError("a proxy"), StoreError("the disk is full")]),
    ),
    max_size=8,
)


@given(breaks)
def test_every_event_comes_once_and_in_order_however_the_connection_breaks(
    plan: list[tuple[int, FlameError | None]],
) -> None:
    server = _Server(list(plan))
    lost: list[FlameError] = []

    async def gather() -> list[int]:
        stream = resumed(server, "/events", query={}, on_lost=lost.append, ended=server.ended)  # type: ignore[arg-type]
        return [event.seq async for event in stream]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow.random, "uniform", lambda low, high: 0.0)
        assert asyncio.run(gather()) == list(range(1, END + 1))
    assert server.asked == sorted(server.asked)
    assert len(lost) >= sum(error is not None for _, error in plan)


async def test_a_refusal_ends_a_stream_at_once() -> None:
    server = _Server([(3, Forbidden("Attempt 1 is over."))])
    seen = []
    with pytest.raises(Forbidden):
        async for event in resumed(server, "/events", query={}):  # type: ignore[arg-type]
            seen.append(event.seq)  # noqa: PERF401 (what came before the error counts)
    assert seen == [1, 2, 3]


async def test_what_is_no_event_is_an_error_of_the_server() -> None:
    class Garbage(_Server):
        @asynccontextmanager
        async def open(self, method: str, path: str, *, query: dict[str, Any]) -> AsyncIterator[_Answer]:
            yield _Answer([b"{no json"], None)

    with pytest.raises(ServerError, match="event"):
        async for _ in resumed(Garbage([]), "/events", query={}, patience=0.0):  # type: ignore[arg-type]
            pass


async def test_a_call_is_repeated_until_it_is_answered() -> None:
    tries = 0

    async def call() -> int:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise ServerUnreachable("away")
        return tries

    assert await insist(call) == 4


async def test_patience_ends() -> None:
    async def call() -> None:
        raise ServerUnreachable("away for good")

    with pytest.raises(ServerUnreachable, match="for good"):
        await insist(call, patience=0.05)


async def test_waits_grow_to_their_limit_and_begin_anew_after_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0.0
        limits.append(high)
        return 0.0

    monkeypatch.setattr(follow.random, "uniform", uniform)
    backoff = Backoff()
    for _ in range(9):
        await backoff.failed(ServerUnreachable("away"))
    assert limits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff.succeeded()
    await backoff.failed(ServerUnreachable("away"))
    assert limits[-1] == 0.05
