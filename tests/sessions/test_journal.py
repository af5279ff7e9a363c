"""What a journal says after any history, with summaries anywhere in it, is what the book said."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.errors import StoreError
from flame.sessions.lifecycle import Book, Options
from flame.sessions.manager import journal

sys.path.insert(0, str(Path(__file__).parent))
import sessionkit


class Writer:
    """Writes a journal as the committer does, into a dictionary."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.book = Book()
        self.members: dict[str, journal.Member] = {}
        self.keeper = journal.Keeper()
        self.records: dict[int, bytes] = {}
        self.last = 0

    def write(self, data: bytes, kind: int, *rest: int) -> int:
        self.last += 1
        self.records[self.last] = data
        self.keeper.note(self.last, kind, *rest)
        return self.last

    def submit(self) -> None:
        client = self.random.choice("ab")
        member = self.members.setdefault(client, journal.Member())
        payloads = [b"%d" % self.random.randint(0, 9) for _ in range(self.random.randint(1, 4))]
        first = member.last + 1
        begin = self.book.submit(client, first, payloads, Options(2.0, 1))
        member.accept((first, begin, len(payloads)))
        self.write(
            journal.submitted(client, first, begin, Options(2.0, 1), payloads), journal.SUBMITTED, begin, len(payloads)
        )

    def end(self) -> None:
        works = self.book.give("e", self.random.randint(1, 3))
        ends = [self.book.answer("e", work.id, work.attempt, True, b"out") for work in works]
        if ends:
            number = self.write(journal.ended([one for one in ends if one]), journal.ENDED)
            for work in works:
                self.members[work.client].unread.setdefault(number, []).append((work.number, work.id, 0, b"out"))

    def lose(self) -> None:
        works = self.book.give("e", 1)
        self.book.lose("e", b"")
        for work in works:
            if work.id in self.book.live:
                self.write(journal.attempt(work), journal.ATTEMPT)
            else:
                self.write(journal.ended([journal.End(work, 1, b"")]), journal.ENDED)
                self.members[work.client].unread.setdefault(self.last, []).append((work.number, work.id, 1, b""))

    def acknowledge(self) -> None:
        for client, member in self.members.items():
            if member.unread:
                entry = next(iter(member.unread))
                del member.unread[entry]
                self.write(journal.acknowledged(client, [entry]), journal.ACKNOWLEDGED)

    def sum_up(self) -> None:
        outdated = self.keeper.outdated(self.book, self.members)
        self.write(journal.summary(self.book, self.members), journal.SUMMARY)
        for number in outdated:
            del self.records[number]

    def check(self) -> None:
        past = journal.Past()
        for number, data in sorted(self.records.items()):
            past.add(number, data)
        live = {work.id: work for work in self.book.live.values()}
        assert list(past.works) == sorted(live)
        for task, work in past.works.items():
            mine = live[task]
            assert (work.client, work.number, work.payload, work.attempt, work.options) == (
                mine.client,
                mine.number,
                mine.payload,
                mine.attempt,
                mine.options,
            )
        assert past.next == self.book.next
        assert [past.ended[state] for state in range(3)] == [self.book.succeed, self.book.failed, self.book.cancelled]
        for client, member in self.members.items():
            found = past.members[client]
            assert (found.last, list(found.blocks), found.unread) == (member.last, list(member.blocks), member.unread)


@given(
    st.integers(0, 1 << 30),
    st.lists(st.sampled_from(["submit", "submit", "end", "end", "lose", "acknowledge", "sum_up"]), max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_a_journal_says_what_the_book_said(seed: int, events: list[str]) -> None:
    before = journal.HISTORY
    journal.HISTORY = 2
    try:
        writer = Writer(seed)
        for event in events:
            getattr(writer, event)()
            writer.check()
    finally:
        journal.HISTORY = before


def test_a_session_of_many_tasks_does_not_keep_them_all() -> None:
    writer = Writer(0)
    for _ in range(12_000):
        writer.submit()
        writer.end()
        writer.end()
        writer.acknowledge()
        if writer.keeper.due:
            writer.sum_up()
    assert len(writer.records) < journal.HISTORY + 2 * journal.RECORDS
    writer.check()


def test_a_damaged_record_is_said_to_be_damaged() -> None:
    past = journal.Past()
    for data in (b"", b"\x91\x09", b"\x92\x00\x01", b"nonsense"):
        with pytest.raises(StoreError, match="damaged"):
            past.add(1, data)


async def test_the_server_sums_up_a_long_session(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "HISTORY", 5)
    monkeypatch.setattr(journal, "RECORDS", 20)
    async with served.open(sessionkit.square, max_instances=1) as session:
        for n in range(100):
            assert await session.invoke(n) == n * n
        store = served.manager.context.store
        records = await store.recall(journal.name(session.id))
        assert len(records) < 40
        past = journal.Past()
        for number, data in records:
            past.add(number, data)
        assert (past.next, past.ended[0]) == (101, 100)
        found = await served.manager.tasks.find(session.id, 0, 1000)
        assert found[-1].id == 100
        assert len(found) < 100
