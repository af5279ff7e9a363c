"""The book of a session's tasks, under any order of events."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.errors import Conflict
from flame.sessions import wire
from flame.sessions.lifecycle import MOST_LOST, Book, End, Options, check_close, check_same, follows
from flame.spec.sessions import Counts, ExecutorState, SessionForm, SessionState


class Model:
    """A book with everything that has come out of it."""

    def __init__(self, seed: int, retries: int, budget: int | None) -> None:
        self.random = random.Random(seed)
        self.book = Book(budget)
        self.options = Options(None, retries)
        self.executors = ["a", "b", "c"]
        self.ends: dict[int, End] = {}
        self.submitted = 0

    def took(self, ends: list[End]) -> None:
        for end in ends:
            assert end.work.id not in self.ends, "a task has ended twice"
            self.ends[end.work.id] = end

    def submit(self) -> None:
        count = self.random.randint(1, 5)
        first = self.book.submit("me", self.submitted + 1, [b"x"] * count, self.options)
        assert first == self.submitted + 1
        self.submitted += count

    def give(self) -> None:
        name = self.random.choice(self.executors)
        before = self.book.first()
        works = self.book.give(name, self.random.randint(1, 4))
        assert [work.id for work in works] == sorted(work.id for work in works)
        if works:
            assert before is works[0]

    def answer(self) -> None:
        name = self.random.choice(self.executors)
        given = self.book.given(name)
        if given:
            work = next(iter(given.values()))
            stale = self.book.answer(name, work.id, work.attempt - 1, True, b"old")
            assert stale is None
            assert work.id in self.book.live
            other = next(one for one in self.executors if one != name)
            assert self.book.answer(other, work.id, work.attempt, True, b"stranger") is None
            end = self.book.answer(name, work.id, work.attempt, self.random.random() < 0.7, b"y")
            self.took([end] if end else [])

    def lose(self) -> None:
        self.took(self.book.lose(self.random.choice(self.executors), b"lost"))

    def give_back(self) -> None:
        name = self.random.choice(self.executors)
        ids = list(self.book.given(name))[1:]
        self.took(self.book.give_back(name, ids))

    def cancel(self) -> None:
        ids = [self.random.randint(1, max(1, self.submitted)) for _ in range(3)]
        ends, held = self.book.cancel(ids)
        self.took(ends)
        for name, some in held.items():
            running = next(iter(self.book.given(name)))
            for one in some:
                if one != running:
                    self.book.live[one].cancelled = True

    def check(self) -> None:
        counts = self.book.counts
        assert counts.total == self.submitted
        assert counts.pending + counts.running + counts.succeed + counts.failed + counts.cancelled == counts.total
        assert counts.succeed + counts.failed + counts.cancelled == len(self.ends)
        assert counts.running <= len(self.executors)
        line = [work.id for work in self.book._line if not work.cancelled]
        assert line == sorted(line), "the line is out of order"
        assert self.book.waiting == len(line)


@given(
    st.integers(0, 1 << 30),
    st.integers(0, 2),
    st.one_of(st.none(), st.integers(0, 3)),
    st.lists(
        st.sampled_from(["submit", "give", "give", "answer", "answer", "lose", "give_back", "cancel"]), max_size=60
    ),
)
@settings(max_examples=200, deadline=None)
def test_every_task_ends_once_and_the_line_keeps_its_order(
    seed: int, retries: int, budget: int | None, events: list[str]
) -> None:
    model = Model(seed, retries, budget)
    for event in events:
        getattr(model, event)()
        model.check()
    model.took(model.book.close())
    model.check()
    assert sorted(model.ends) == list(range(1, model.submitted + 1))
    assert not model.book.live


def test_what_an_executor_was_running_goes_to_the_front_as_the_next_attempt() -> None:
    book = Book()
    book.submit("me", 1, [b""] * 4, Options())
    assert [work.id for work in book.give("a", 2)] == [1, 2]
    assert [work.id for work in book.give("b", 1)] == [3]
    assert book.lose("a", b"") == []
    again = book.give("b", 9)
    assert [(work.id, work.attempt) for work in again] == [(1, 2), (2, 1), (4, 1)]
    assert book.answer("a", 1, 1, True, b"late") is None


def test_a_task_that_takes_its_executors_with_it_fails_in_the_end() -> None:
    book = Book()
    book.submit("me", 1, [b"", b""], Options())
    for _ in range(MOST_LOST - 1):
        book.give("a", 2)
        assert book.lose("a", b"why") == []
    book.give("a", 2)
    ((work, state, payload),) = book.lose("a", b"why")
    assert (work.id, state, payload) == (1, wire.FAILED, b"why")
    assert book.counts == Counts(total=2, pending=1, failed=1)


def test_a_task_with_a_timeout_is_never_sent_ahead() -> None:
    book = Book()
    book.submit("me", 1, [b""] * 2, Options(timeout=1.0))
    book.submit("me", 3, [b""] * 2, Options())
    assert [work.id for work in book.give("a", 9)] == [1]
    assert book.give("a", 9) == []
    assert [work.id for work in book.give("b", 9)] == [2]
    book.answer("a", 1, 1, True, b"")
    assert [work.id for work in book.give("a", 9)] == [3, 4]


def test_after_a_restart_what_runs_is_claimed_by_who_runs_it_and_by_nobody_else() -> None:
    book = Book()
    book.submit("me", 1, [b""] * 3, Options())
    assert book.claim("a", 2, 1)
    assert not book.claim("b", 2, 1)
    assert not book.claim("b", 3, 7)
    assert not book.claim("b", 9, 1)
    assert [work.id for work in book.give("b", 9)] == [1, 3]


def test_the_rules_of_opening_and_closing() -> None:
    form = SessionForm(app="x", id="mine", weight=2.0)
    check_same(form, form, SessionState.OPEN)
    with pytest.raises(Conflict, match="closed"):
        check_same(form, form, SessionState.CLOSED)
    with pytest.raises(Conflict, match=r"minInstances is 0, not 1; weight is 2\.0, not 1\.0|weight.*minInstances"):
        check_same(SessionForm(app="x", id="mine", min_instances=1), form, SessionState.OPEN)
    check_close(Counts(total=3, pending=3), "mine", force=False)
    with pytest.raises(Conflict, match="runs 2 tasks"):
        check_close(Counts(total=3, pending=1, running=2), "mine", force=False)
    check_close(Counts(total=3, running=3), "mine", force=True)


def test_an_executor_goes_round_and_ends_once() -> None:
    order = ["starting", "binding", "bound", "unbinding", "idle", "binding", "bound", "released"]
    states = [ExecutorState(one) for one in order]
    assert all(follows(a, b) for a, b in itertools.pairwise(states))
    assert not any(follows(ExecutorState.RELEASED, state) for state in ExecutorState)
    assert not follows(ExecutorState.BOUND, ExecutorState.IDLE)
