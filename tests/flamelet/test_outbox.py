"""Reports arrive once, in order, whatever happens to the requests that carry them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.client import follow
from flame.errors import Forbidden, ServerUnreachable
from flame.flamelet.outbox import Acked, Outbox
from flame.spec.records import Report


class Server:
    """Takes reports as the real one does; a plan says which requests get lost before it, and which answers behind it."""

    def __init__(self, plan: list[str], acked: int = 0) -> None:
        self.plan = plan
        self.acked = acked
        self.kept: list[Any] = []
        self.requests = 0

    async def call(self, method: str, path: str, *, query: object, body: list[Report], into: type[Acked]) -> Acked:
        self.requests += 1
        await asyncio.sleep(0)
        how = self.plan.pop(0) if self.plan else "well"
        if how == "request lost":
            raise ServerUnreachable("away")
        for report in body:
            if report.seq > self.acked:
                assert report.seq == self.acked + 1
                self.acked = report.seq
                self.kept.append(report.data["i"])
        if how == "answer lost":
            raise ServerUnreachable("away")
        return Acked(acked=self.acked)


async def deliver(server: Server, count: int) -> None:
    outbox = Outbox(server, "/reports", {}, patience=60.0)  # type: ignore[arg-type]
    running = asyncio.create_task(outbox.run())
    for i in range(count):
        outbox.put("metrics", {"i": i})
        if i % 3 == 0:
            await asyncio.sleep(0)
    flushing = asyncio.create_task(outbox.flush())
    await asyncio.wait([running, flushing], return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        flushing.cancel()
        running.result()
    running.cancel()


@given(st.lists(st.sampled_from(["well", "request lost", "answer lost"]), max_size=20), st.integers(0, 40))
def test_each_report_arrives_once_and_in_order(plan: list[str], count: int) -> None:
    server = Server(list(plan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow.random, "uniform", lambda low, high: 0.0)
        asyncio.run(deliver(server, count))
    assert server.kept == list(range(count))


@given(st.lists(st.sampled_from(["well", "request lost"]), max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_an_earlier_flamelet_of_the_attempt_has_used_up_its_numbers(plan: list[str], acked: int, count: int) -> None:
    """What is reported once the server has said so is kept, whole and in order."""
    server = Server(list(plan), acked=acked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow.random, "uniform", lambda low, high: 0.0)
        asyncio.run(deliver(server, count + acked))
    assert server.kept == list(range(count + acked))[-len(server.kept) :]
    assert server.kept[-1] == count + acked - 1


async def test_what_gathers_goes_together() -> None:
    server = Server([])
    outbox = Outbox(server, "/reports", {}, patience=60.0)  # type: ignore[arg-type]
    for i in range(1200):
        outbox.put("metrics", {"i": i})
    running = asyncio.create_task(outbox.run())
    await outbox.flush()
    running.cancel()
    assert server.kept == list(range(1200))
    assert server.requests == 3


async def test_a_refusal_ends_the_delivery() -> None:
    class Fenced(Server):
        async def call(self, *_: object, **__: object) -> Acked:
            raise Forbidden("Attempt 1 is over.")

    with pytest.raises(Forbidden):
        await deliver(Fenced([]), 1)


async def test_one_can_wait_for_what_was_said_so_far() -> None:
    server = Server([])
    outbox = Outbox(server, "/reports", {}, patience=60.0)  # type: ignore[arg-type]
    await outbox.delivered()
    running = asyncio.create_task(outbox.run())
    for i in range(3):
        outbox.put("round", {"i": i})
    waiting = asyncio.create_task(outbox.delivered())
    while not waiting.done():
        await asyncio.sleep(0)
        outbox.put("metrics", {"i": server.requests + 100})  # it never becomes empty
    assert server.kept[:3] == [0, 1, 2]
    running.cancel()
